// SPDX-License-Identifier: Apache-2.0
#include "../relation_cpu.h"

#include <algorithm>
#include <vector>

#include "every_pixel.h"
#include "grams.h"
#include "passes.h"
#include "pooled.h"
#include "relations.h"

namespace codmd {
namespace {

constexpr int64_t kShortFeatures = 4096;

// Rows of `pooled` whose sample has a valid frame.
std::vector<int32_t> present_rows(const float* pooled, int64_t samples, int64_t features) {
  std::vector<int32_t> rows;
  for (int64_t b = 0; b < samples; ++b)
    if (!(pooled[b * (3 * features + 1) + 3 * features] <= 0.0f)) rows.push_back(int32_t(b));
  return rows;
}

}  // namespace

void relation_forward(const Scores& scores, const Weights& weights, int threads, float* terms, float* frame_grad,
                      float* batch_grad) {
  if (!frame_grad && !batch_grad) return write_terms(weights, 0.0, 0.0, terms);
  const auto forward = scores.grid.every_pixel() ? every_pixel_forward : pooled_forward;
  forward(scores, weights, threads, terms, frame_grad, batch_grad);
}

void relation_frames(const Scores& scores, const Weights& weights, int threads, float* frame_term,
                     float* frame_grad, float* pooled) {
  const auto frames = scores.grid.every_pixel() ? every_pixel_frames : pooled_frames;
  frames(scores, weights, threads, frame_term, frame_grad, pooled);
}

void relation_backward(const Shape& shape, DType dtype, const Latent& student, const Latent& grad,
                       const FrameMask& mask, const Grid& grid, const float* frame_grad, const float* batch_grad,
                       double frame_scale, double batch_scale, int threads) {
  if (grid.every_pixel())
    every_pixel_backward(shape, dtype, student, grad, mask, frame_grad, batch_grad, frame_scale, batch_scale, threads);
  else
    pooled_backward(shape, dtype, grad, mask, grid, frame_grad, batch_grad, frame_scale, batch_scale, threads);
}

void relation_batch(const float* pooled, int64_t samples, int64_t features, int64_t first_row, int64_t rows,
                    const float* frame_term, const Weights& weights, double grad_scale, int threads, float* terms,
                    float* batch_grad) {
  const double frame = double(*frame_term);
  if (!batch_grad) return write_terms(weights, 0.0, frame, terms);
  const std::vector<int32_t> present = present_rows(pooled, samples, features);
  const int64_t n = int64_t(present.size()), pitch = 3 * features + 1;
  const bool is_short = features <= kShortFeatures;
  std::fill_n(batch_grad, rows * features, 0.0f);
  threads = useful_threads(threads, samples * pitch * int64_t(sizeof(float)));

  std::vector<double> copies[3];
  std::vector<GramSums> sums;
  std::vector<float> matrix, buffers;
  std::vector<Relation> relation;
  const size_t per_worker = size_t((3 * n + 1) * kChunk);
  if (is_short) {
    for (int part = 0; part < 3; ++part) {
      copies[part].resize(size_t(samples * features));
      for (int32_t b : present)
        std::copy_n(pooled + b * pitch + part * features, features, copies[part].begin() + b * features);
    }
    RowProducts products;
    products.x = copies[0].data(), products.r = copies[1].data(), products.d = copies[2].data();
    products.row = present.data(), products.features = features;
    relation.emplace_back(int(n), products);
  } else {
    sums.assign(size_t(threads), GramSums(n));
    matrix.resize(size_t(n * n));
    buffers.resize(per_worker * size_t(threads));
    relation.emplace_back(int(n), sums[0].products());
  }

  RelationTeam team(relation, weights.temperature, threads);
  parallel(threads, [&](const Worker& worker) {
    if (is_short) {
      team.run(worker, [&](int, int row, const double* matrix_row) {
        const int64_t local = present[size_t(row)] - first_row;
        if (local >= 0 && local < rows)
          feature_gradient(relation[0].products(), int(n), matrix_row, grad_scale, batch_grad + local * features);
      });
      return;
    }
    float* buffer = buffers.data() + per_worker * size_t(worker.index);
    add_gathered(pooled, pitch, features, present, worker, buffer, sums[size_t(worker.index)]);
    worker.barrier();
    if (worker.index == 0)
      for (size_t other = 1; other < sums.size(); ++other) sums[0].merge(sums[other]);
    worker.barrier();
    team.run(worker, [&](int, int row, const double* matrix_row) {
      for (int64_t j = 0; j < n; ++j) matrix[size_t(row * n + j)] = float(matrix_row[j]);
    });
    worker.barrier();
    mix_rows(pooled, pitch, present.data(), n, matrix.data(), grad_scale, batch_grad, features, first_row, rows,
             features, worker, buffer);
  });
  write_terms(weights, relation[0].divergence(), frame, terms);
}

}  // namespace codmd
