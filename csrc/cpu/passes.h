// SPDX-License-Identifier: Apache-2.0
//
// The loops that touch latents, one table of them per instruction set. Every table is compiled from passes.inl.
#pragma once

#include <cstdint>

namespace codmd {

struct Plane {
  const void* data;
  int64_t row, column;  // element strides
};

// Chunks of pixels are padded with zeros to a multiple of this many floats.
constexpr int64_t kLane = 16;

struct Passes {
  const char* name;

  // sums[3] = sums over rows x columns of student, real and (fake - real). Index: DType.
  void (*reduce[3])(const Plane& student, const Plane& real, const Plane& fake, int64_t rows, int64_t columns,
                    double* sums);
  // plane = value.
  void (*fill[3])(const Plane& plane, int64_t rows, int64_t columns, float value);
  // to[0..n) = from[0..n), in float32.
  void (*load[3])(const void* from, int64_t stride, int64_t n, float* to);
  void (*store[3])(const float* from, int64_t n, void* to, int64_t stride);

  // fake := fake - real; returns the sum of fake^2.
  double (*subtract)(const float* real, float* fake, int64_t n);
  // to += scale * from.
  void (*accumulate)(float scale, const float* from, float* to, int64_t n);
  // gram[i, j] += row_i . row_j for j >= i (and some j < i of the same tile). length: a multiple of kLane.
  void (*gram)(const float* rows, int64_t pitch, int64_t n, int64_t length, double* gram);
  // out_i = row_scale * sum_j matrix[i, columns[j]] row_j + shared_scale * shared, for `outputs` rows of the matrix.
  void (*combine)(const float* rows, int64_t pitch, int64_t n, const int32_t* columns, const float* const* matrix,
                  int64_t outputs, float row_scale, const float* shared, float shared_scale, int64_t length,
                  float* out);
  // Inner products of two rows of short features: xx, rr, rd, dr, dd.
  void (*inner)(const double* const i[3], const double* const j[3], int64_t features, double* sums);
};

extern const Passes passes_baseline;
#if defined(CODMD_X86)
extern const Passes passes_avx2;
extern const Passes passes_avx512;
#endif

const Passes& passes();

}  // namespace codmd
