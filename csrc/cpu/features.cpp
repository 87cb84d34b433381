// SPDX-License-Identifier: Apache-2.0
#include "features.h"

#include <algorithm>

namespace codmd {

Features::Features(const Shape& shape, const FrameMask& mask, const Grid& grid)
    : shape(shape), size(grid.features(shape)), valid(mask, shape.batch, shape.frames) {
  for (auto* phi : {&x, &r, &d}) phi->resize(size_t(shape.rows() * size));
}

RowProducts Features::of_frames(int64_t b) const {
  RowProducts products;
  products.x = x.data(), products.r = r.data(), products.d = d.data();
  products.row = valid.rows_of(b), products.features = size, products.least = kLeastDouble;
  return products;
}

RowProducts Features::of_samples() const {
  RowProducts products;
  products.x = psi_[0].data(), products.r = psi_[1].data(), products.d = psi_[2].data();
  products.row = valid.sample.data(), products.features = size, products.least = kLeastDouble;
  return products;
}

void Features::average(const Worker& worker) {
  const std::vector<double>* phi[3] = {&x, &r, &d};
  const int64_t total = shape.batch * size, end = worker.end(total);
  for (int64_t item = worker.begin(total); item < end; ++item) {
    const int64_t b = item / size, k = item % size, n = valid.count(b);
    const double share = n ? 1.0 / double(n) : 0.0;
    for (int part = 0; part < 3; ++part) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += (*phi[part])[size_t(valid.rows_of(b)[i] * size + k)];
      psi_[part][size_t(item)] = sum * share;
    }
  }
}

Terms Features::relate(double temperature, int threads, const Found& found) {
  if (found.batch_grad || found.rows)
    for (auto& psi : psi_) psi.resize(size_t(shape.batch * size));
  std::vector<Relation> relations;
  for (int64_t b = 0; b < shape.batch && found.frame_grad; ++b)
    relations.emplace_back(int(valid.count(b)), of_frames(b));
  const int batch_relation = int(relations.size());
  if (found.batch_grad) relations.emplace_back(int(valid.sample.size()), of_samples());
  if (found.frame_grad) std::fill_n(found.frame_grad, shape.rows() * size, 0.0f);
  if (found.batch_grad) std::fill_n(found.batch_grad, shape.batch * size, 0.0f);

  RelationTeam team(relations, temperature, threads);
  parallel(team.useful_threads(size), [&](const Worker& worker) {
    if (!psi_[0].empty()) {
      average(worker);
      worker.barrier();
    }
    team.run(worker, [&](int which, int row, const double* matrix_row) {
      const Relation& relation = relations[size_t(which)];
      const RowProducts& products = relation.products();
      const bool frames = which != batch_relation;
      float* out = (frames ? found.frame_grad : found.batch_grad) + products.row[row] * size;
      feature_gradient(products, relation.rows(), matrix_row, frames ? 1.0 / double(shape.batch) : 1.0, out);
    });
  });

  Terms terms;
  for (int which = 0; which < batch_relation; ++which) terms.frame += relations[size_t(which)].divergence();
  terms.frame /= double(shape.batch);
  if (found.batch_grad) terms.batch = relations.back().divergence();
  float* row = found.rows;
  for (int64_t b = 0; row && b < shape.batch; ++b) {
    for (const auto& psi : psi_)
      for (int64_t k = 0; k < size; ++k) *row++ = float(psi[size_t(b * size + k)]);
    for (int64_t k = 0; k < size; ++k) {
      const size_t at = size_t(b * size + k);
      row[k - size] = kept_apart(row[k - 2 * size], row[k - size], psi_[1][at] + psi_[2][at] == 0.0);
    }
    *row++ = float(valid.count(b));
  }
  return terms;
}

}  // namespace codmd
