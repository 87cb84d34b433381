// SPDX-License-Identifier: Apache-2.0
//
// Long features (every pixel): Grams streamed over chunks of pixels, float32 within a chunk and double across. Where
// squares leave float32's range, a norm is clamped or fake far under real, the stream is read again with `exact`: in
// double throughout, and with the products of the rows of fake.
#pragma once

#include <vector>

#include "parallel.h"
#include "relations.h"
#include "../types.h"

namespace codmd {

constexpr int64_t kChunk = 512;  // pixels; a multiple of kLane

inline int64_t chunks_of(int64_t pixels) { return (pixels + kChunk - 1) / kChunk; }

// Pixels first .. first + n of frame (b, f), in (channel, height, width) order, as float32; zeros up to a multiple
// of kLane.
void load_pixels(const Tensor& latent, const Shape& shape, DType dtype, int64_t b, int64_t f, int64_t first,
                 int64_t n, float* to);
void store_pixels(const float* from, const Tensor& latent, const Shape& shape, DType dtype, int64_t b, int64_t f,
                  int64_t first, int64_t n);
int64_t padded(int64_t n);

class GramSums {
 public:
  explicit GramSums(int64_t rows)
      : rows_(rows),
        students_(size_t(rows * rows)),
        scores_(size_t(4 * rows * rows)),
        fakes_(size_t(rows * rows)),
        fake_squared_(size_t(rows)) {}

  // students [n, kChunk], scores [2n, kChunk]: the rows of real, then those of fake - real, and with `exact` those of
  // fake; length: see padded().
  void add(const float* students, const float* scores, int64_t length, bool exact);
  void add_fake_squared(int64_t row, double value) { fake_squared_[size_t(row)] += value; }
  void merge(const GramSums& other);
  void clear();
  // Whether every square was large and small enough for float32 chunks, no norm is clamped and no fake far under real.
  bool in_range() const;

  // `least` as in norms() of algebra.h; 0 for rows that were read from fake itself.
  RowProducts products(double least) const {
    RowProducts result;
    result.least = least;
    result.students = students_.data(), result.scores = scores_.data();
    result.fake_pairs = fakes_.data(), result.fake_squared = fake_squared_.data();
    return result;
  }

 private:
  int64_t rows_;
  std::vector<double> students_, scores_, fakes_, fake_squared_;
};

double square_of(const float* row, int64_t length);

// fake := fake - real, `kept` a copy of fake with `exact`; returns |fake|^2.
double subtract(const float* real, float* fake, int64_t length, bool exact, float* kept);

// kept := real + difference with `exact`, and scratch for its length else; returns its square.
double fake_squared(const float* real, const float* difference, int64_t length, bool exact, float* kept);

// The Grams of the gathered rows psi_x | psi_r | psi_d (pitch floats apart) over this worker's chunks.
void add_gathered(const float* gathered, int64_t pitch, int64_t features, const std::vector<int32_t>& rows,
                  const Worker& worker, bool exact, float* buffer, GramSums& sums);  // buffer [4n, kChunk]

// to_i = scale * sum_j matrix[i, j] from_j over `features` columns, for the relation's rows i whose index row[i]
// lies in [first, first + count); row[i] addresses `from`, row[i] - first addresses `to`. from may be to.
void mix_rows(const float* from, int64_t from_pitch, const int32_t* row, int64_t n, const float* matrix, double scale,
              float* to, int64_t to_pitch, int64_t first, int64_t count, int64_t features, const Worker& worker,
              float* buffer);  // [2n, kChunk]

}  // namespace codmd
