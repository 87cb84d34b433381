// SPDX-License-Identifier: Apache-2.0
#include "relation.h"

#include <algorithm>
#include <vector>

#include "grams.h"
#include "passes.h"

namespace codmd {
namespace {

constexpr int64_t kShortFeatures = 4096;

// Rows of `pooled` whose sample has a valid frame.
std::vector<int32_t> present_rows(const float* pooled, int64_t samples, int64_t features) {
  std::vector<int32_t> rows;
  for (int64_t b = 0; b < samples; ++b)
    if (!(pooled[b * row_pitch(features) + 3 * features] <= 0.0f)) rows.push_back(int32_t(b));
  return rows;
}

}  // namespace

void relation(const Scores& scores, const Numbers& numbers, int threads, const Found& found) {
  Terms terms;
  if (found.frame_grad || found.batch_grad || found.rows)
    terms = (scores.grid.every_pixel() ? whole_relation : pooled_relation)(scores, numbers.temperature(), threads,
                                                                           found);
  write_terms(found.terms, terms.batch, terms.frame, numbers, nullptr);
}

void gathered(const Gathered& all, const Numbers& numbers, int threads, float* terms, float* batch_grad) {
  const float* pooled = all.rows;
  const int64_t features = all.features;
  const std::vector<int32_t> present = present_rows(pooled, all.samples, features);
  const int64_t n = int64_t(present.size()), pitch = row_pitch(features);
  const bool is_short = features <= kShortFeatures;
  std::fill_n(batch_grad, all.count * features, 0.0f);
  threads = useful_threads(threads, all.samples * pitch * int64_t(sizeof(float)));

  std::vector<double> copies[3];
  std::vector<GramSums> sums;
  std::vector<float> matrix, buffers;
  std::vector<Relation> relation;
  const size_t per_worker = size_t(4 * n * kChunk);
  if (is_short) {
    for (int part = 0; part < 3; ++part) {
      copies[part].resize(size_t(all.samples * features));
      for (int32_t b : present)
        std::copy_n(pooled + b * pitch + part * features, features, copies[part].begin() + b * features);
    }
    RowProducts products;
    products.x = copies[0].data(), products.r = copies[1].data(), products.d = copies[2].data();
    products.row = present.data(), products.features = features, products.least = kLeastFloat;
    relation.emplace_back(int(n), products);
  } else {
    sums.assign(size_t(threads), GramSums(n));
    matrix.resize(size_t(n * n));
    buffers.resize(per_worker * size_t(threads));
    relation.emplace_back(int(n), sums[0].products(kLeastFloat));
  }

  RelationTeam team(relation, numbers.temperature(), threads);
  parallel(threads, [&](const Worker& worker) {
    if (is_short) {
      team.run(worker, [&](int, int row, const double* matrix_row) {
        const int64_t local = present[size_t(row)] - all.first;
        if (local >= 0 && local < all.count)
          feature_gradient(relation[0].products(), int(n), matrix_row, all.scale, batch_grad + local * features);
      });
      return;
    }
    float* buffer = buffers.data() + per_worker * size_t(worker.index);
    for (const bool exact : {false, true}) {
      add_gathered(pooled, pitch, features, present, worker, exact, buffer, sums[size_t(worker.index)]);
      worker.barrier();
      if (worker.index == 0)
        for (size_t other = 1; other < sums.size(); ++other) sums[0].merge(sums[other]);
      worker.barrier();
      if (sums[0].in_range()) break;
      worker.barrier();
    }
    team.run(worker, [&](int, int row, const double* matrix_row) {
      relation[0].narrow(row, matrix_row, 1.0, matrix.data() + row * n, nullptr);
    });
    worker.barrier();
    mix_rows(pooled, pitch, present.data(), n, matrix.data(), all.scale, batch_grad, features, all.first,
             all.count, features, worker, buffer);
  });
  write_gathered_terms(terms, relation[0].divergence(), numbers, all.kept, all.objective);
}

}  // namespace codmd
