// SPDX-License-Identifier: Apache-2.0
//
// The relation of features pooled over a grid of regions: the pass that reads the three latents.
#include "relation.h"

#include <cmath>

#include "features.h"
#include "passes.h"

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
bool one_run(const Tensor& latent, const Shape& shape, const Grid& grid) {
  return grid.height * grid.width == 1 && latent.stride[4] == 1 && latent.stride[3] == shape.width;
}

Plane plane(const Tensor& latent, DType dtype, int64_t b, int64_t f, int64_t c, const Region& region) {
  return {address(latent, dtype, b, f, c, region.y, region.x), latent.stride[3], latent.stride[4]};
}

// fake - real, one rounding off where real hides a fake that is not zero.
double difference_of(double real, double fake) {
  const double difference = fake - real;
  return real + difference == 0.0 && fake != 0.0 ? std::nextafter(difference, 0.0) : difference;
}

void reduce(const Scores& scores, const Worker& worker, Features& features) {
  const Shape& shape = scores.shape;
  const Grid& grid = scores.grid;
  const auto sum_region = passes().reduce[int(scores.dtype)];
  const bool flat = one_run(scores.student, shape, grid) && one_run(scores.real, shape, grid) &&
                    one_run(scores.fake, shape, grid);

  const int64_t planes = int64_t(features.valid.row.size()) * shape.channels, end = worker.end(planes);
  for (int64_t item = worker.begin(planes); item < end; ++item) {
    const int64_t row = features.valid.row[size_t(item / shape.channels)], c = item % shape.channels;
    const int64_t b = row / shape.frames, f = row % shape.frames;
    size_t at = size_t(row * features.size + c * grid.height * grid.width);
    for (int64_t gy = 0; gy < grid.height; ++gy) {
      for (int64_t gx = 0; gx < grid.width; ++gx, ++at) {
        Region region = region_of(shape, grid, gy, gx);
        if (flat) region = {0, 0, 1, region.rows * region.columns};
        double sums[3];
        sum_region(plane(scores.student, scores.dtype, b, f, c, region),
                   plane(scores.real, scores.dtype, b, f, c, region),
                   plane(scores.fake, scores.dtype, b, f, c, region), region.rows, region.columns, sums);
        if (std::fabs(sums[1] + sums[2]) < kLeastFloat * std::fabs(sums[1])) {
          // A sum of fake that rounding to fake - real would cost its digits, from fake itself.
          double fakes[3];
          const Plane fake = plane(scores.fake, scores.dtype, b, f, c, region);
          sum_region(fake, fake, fake, region.rows, region.columns, fakes);
          sums[2] = difference_of(sums[1], fakes[0]);
        }
        const double area = double(region.rows * region.columns);
        features.x[at] = sums[0] / area;
        features.r[at] = sums[1] / area;
        features.d[at] = sums[2] / area;
      }
    }
  }
}

}  // namespace

Terms pooled_relation(const Scores& scores, double temperature, int threads, const Found& found) {
  Features features(scores.shape, scores.mask, scores.grid);
  threads = useful_threads(threads, 3 * scores.shape.bytes(scores.dtype));
  parallel(threads, [&](const Worker& worker) { reduce(scores, worker, features); });
  return features.relate(temperature, threads, found);
}

}  // namespace codmd
