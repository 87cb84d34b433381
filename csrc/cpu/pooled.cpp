// SPDX-License-Identifier: Apache-2.0
#include "pooled.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "passes.h"
#include "relations.h"
#include "valid_rows.h"

namespace codmd {
namespace {

struct Region {
  int64_t y, x, rows, columns;
};

Region region_of(const Shape& shape, const Grid& grid, int64_t gy, int64_t gx) {
  const int64_t top = gy * shape.height / grid.height, left = gx * shape.width / grid.width;
  return {top, left, (gy + 1) * shape.height / grid.height - top, (gx + 1) * shape.width / grid.width - left};
}

// A whole plane without gaps is one row.
bool one_run(const Latent& latent, const Shape& shape, const Grid& grid) {
  return grid.height * grid.width == 1 && latent.stride[4] == 1 && latent.stride[3] == shape.width;
}

Region flattened(const Region& region) { return {region.y, region.x, 1, region.rows * region.columns}; }

Plane plane(const Latent& latent, DType dtype, int64_t b, int64_t f, int64_t c, const Region& region) {
  return {address(latent, dtype, b, f, c, region.y, region.x), latent.stride[3], latent.stride[4]};
}

// Features of student, real and fake - real: phi [B, F, K] and psi [B, K], in double.
class Features {
 public:
  Features(const Scores& scores, const ValidRows& valid, bool averaged)
      : scores_(scores), valid_(valid), size(scores.grid.features(scores.shape)) {
    const size_t frames = size_t(scores.shape.batch * scores.shape.frames * size);
    for (auto* values : {&x, &r, &d}) values->resize(frames);
    if (!averaged) return;
    for (auto* values : {&psi_x, &psi_r, &psi_d}) values->resize(size_t(scores.shape.batch * size));
  }

  void reduce(const Worker& worker);
  void average(const Worker& worker);

  RowProducts of_frames(int64_t b) const {
    RowProducts products;
    products.x = x.data(), products.r = r.data(), products.d = d.data();
    products.row = valid_.rows_of(b), products.features = size;
    return products;
  }
  RowProducts of_samples() const {
    RowProducts products;
    products.x = psi_x.data(), products.r = psi_r.data(), products.d = psi_d.data();
    products.row = valid_.sample.data(), products.features = size;
    return products;
  }

 private:
  const Scores& scores_;
  const ValidRows& valid_;

 public:
  const int64_t size;
  std::vector<double> x, r, d, psi_x, psi_r, psi_d;
};

void Features::reduce(const Worker& worker) {
  const Shape& shape = scores_.shape;
  const Grid& grid = scores_.grid;
  const auto sum_region = passes().reduce[int(scores_.dtype)];
  const bool flat = one_run(scores_.student, shape, grid) && one_run(scores_.real, shape, grid) &&
                    one_run(scores_.fake, shape, grid);

  const int64_t planes = int64_t(valid_.row.size()) * shape.channels, end = worker.end(planes);
  for (int64_t item = worker.begin(planes); item < end; ++item) {
    const int64_t row = valid_.row[size_t(item / shape.channels)], c = item % shape.channels;
    const int64_t b = row / shape.frames, f = row % shape.frames;
    size_t at = size_t(row * size + c * grid.height * grid.width);
    for (int64_t gy = 0; gy < grid.height; ++gy) {
      for (int64_t gx = 0; gx < grid.width; ++gx, ++at) {
        Region region = region_of(shape, grid, gy, gx);
        if (flat) region = flattened(region);
        double sums[3];
        sum_region(plane(scores_.student, scores_.dtype, b, f, c, region),
                   plane(scores_.real, scores_.dtype, b, f, c, region),
                   plane(scores_.fake, scores_.dtype, b, f, c, region), region.rows, region.columns, sums);
        const double area = double(region.rows * region.columns);
        x[at] = sums[0] / area;
        r[at] = sums[1] / area;
        d[at] = sums[2] / area;
      }
    }
  }
}

void Features::average(const Worker& worker) {
  const int64_t total = scores_.shape.batch * size, end = worker.end(total);
  for (int64_t item = worker.begin(total); item < end; ++item) {
    const int64_t b = item / size, k = item % size, n = valid_.count(b);
    double sum[3] = {0, 0, 0};
    for (int64_t i = 0; i < n; ++i) {
      const size_t at = size_t(valid_.rows_of(b)[i] * size + k);
      sum[0] += x[at];
      sum[1] += r[at];
      sum[2] += d[at];
    }
    const double share = n ? 1.0 / double(n) : 0.0;
    psi_x[size_t(item)] = sum[0] * share;
    psi_r[size_t(item)] = sum[1] * share;
    psi_d[size_t(item)] = sum[2] * share;
  }
}

std::vector<Relation> frame_relations(const Features& features, const ValidRows& valid, int64_t batch) {
  std::vector<Relation> relations;
  for (int64_t b = 0; b < batch; ++b) relations.emplace_back(int(valid.count(b)), features.of_frames(b));
  return relations;
}

int64_t bytes_of(const Shape& s, DType dtype) {
  return s.batch * s.frames * s.channels * s.height * s.width * element_size(dtype);
}

}  // namespace

void pooled_forward(const Scores& scores, const Weights& weights, int threads, float* terms, float* frame_grad,
                    float* batch_grad) {
  const Shape& shape = scores.shape;
  const ValidRows valid(scores.mask, shape.batch, shape.frames);
  Features features(scores, valid, batch_grad != nullptr);

  std::vector<Relation> relations;
  if (frame_grad) relations = frame_relations(features, valid, shape.batch);
  const int batch_relation = int(relations.size());
  if (batch_grad) relations.emplace_back(int(valid.sample.size()), features.of_samples());

  if (frame_grad) std::fill_n(frame_grad, shape.batch * shape.frames * features.size, 0.0f);
  if (batch_grad) std::fill_n(batch_grad, shape.batch * features.size, 0.0f);
  threads = useful_threads(threads, 3 * bytes_of(shape, scores.dtype));
  RelationTeam team(relations, weights.temperature, threads);
  parallel(threads, [&](const Worker& worker) { features.reduce(worker); });
  parallel(team.useful_threads(features.size), [&](const Worker& worker) {
    if (batch_grad) {
      features.average(worker);
      worker.barrier();
    }
    team.run(worker, [&](int which, int row, const double* matrix_row) {
      const Relation& relation = relations[size_t(which)];
      const RowProducts& products = relation.products();
      const bool frames = which != batch_relation;
      float* out = (frames ? frame_grad : batch_grad) + products.row[row] * features.size;
      feature_gradient(products, relation.rows(), matrix_row, frames ? 1.0 / double(shape.batch) : 1.0, out);
    });
  });

  double frame = 0;
  for (int which = 0; which < batch_relation; ++which) frame += relations[size_t(which)].divergence();
  frame /= double(shape.batch);
  const double batch = batch_grad ? relations.back().divergence() : 0.0;
  write_terms(weights, batch, frame, terms);
}

void pooled_frames(const Scores& scores, const Weights& weights, int threads, float* frame_term, float* frame_grad,
                   float* pooled) {
  const Shape& shape = scores.shape;
  const ValidRows valid(scores.mask, shape.batch, shape.frames);
  Features features(scores, valid, true);
  std::vector<Relation> relations;
  if (frame_grad) {
    relations = frame_relations(features, valid, shape.batch);
    std::fill_n(frame_grad, shape.batch * shape.frames * features.size, 0.0f);
  }
  threads = useful_threads(threads, 3 * bytes_of(shape, scores.dtype));
  RelationTeam team(relations, weights.temperature, threads);
  parallel(threads, [&](const Worker& worker) { features.reduce(worker); });
  parallel(team.useful_threads(features.size), [&](const Worker& worker) {
    features.average(worker);
    team.run(worker, [&](int which, int row, const double* matrix_row) {
      const RowProducts& products = relations[size_t(which)].products();
      feature_gradient(products, relations[size_t(which)].rows(), matrix_row, 1.0 / double(shape.batch),
                       frame_grad + products.row[row] * features.size);
    });
  });

  const int64_t size = features.size;
  for (int64_t b = 0; b < shape.batch; ++b) {
    float* out = pooled + b * (3 * size + 1);
    for (int64_t k = 0; k < size; ++k) {
      out[k] = float(features.psi_x[size_t(b * size + k)]);
      out[size + k] = float(features.psi_r[size_t(b * size + k)]);
      out[2 * size + k] = float(features.psi_d[size_t(b * size + k)]);
    }
    out[3 * size] = float(valid.count(b));
  }
  double frame = 0;
  for (const Relation& relation : relations) frame += relation.divergence();
  *frame_term = float(frame / double(shape.batch));
}

void pooled_backward(const Shape& shape, DType dtype, const Latent& grad, const FrameMask& mask, const Grid& grid,
                     const float* frame_grad, const float* batch_grad, double frame_scale, double batch_scale,
                     int threads) {
  const int64_t size = grid.features(shape), per_channel = grid.height * grid.width;
  const ValidRows valid(mask, shape.batch, shape.frames);
  const auto fill = passes().fill[int(dtype)];
  const bool flat = one_run(grad, shape, grid);
  const int64_t planes = shape.batch * shape.frames * shape.channels;
  parallel(useful_threads(threads, bytes_of(shape, dtype)), [&](const Worker& worker) {
    const int64_t end = worker.end(planes);
    for (int64_t item = worker.begin(planes); item < end; ++item) {
      const int64_t row = item / shape.channels, c = item % shape.channels;
      const int64_t b = row / shape.frames, f = row % shape.frames;
      const bool counts = mask.valid(b, f);
      int64_t k = c * per_channel;
      for (int64_t gy = 0; gy < grid.height; ++gy) {
        for (int64_t gx = 0; gx < grid.width; ++gx, ++k) {
          Region region = region_of(shape, grid, gy, gx);
          if (flat) region = flattened(region);
          double value = 0;
          if (counts && frame_grad) value += frame_scale * double(frame_grad[row * size + k]);
          if (counts && batch_grad) value += batch_scale / double(valid.count(b)) * double(batch_grad[b * size + k]);
          fill(plane(grad, dtype, b, f, c, region), region.rows, region.columns,
               float(value / double(region.rows * region.columns)));
        }
      }
    }
  });
}

}  // namespace codmd
