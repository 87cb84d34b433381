// SPDX-License-Identifier: Apache-2.0
//
// The relation loss on the CPU: plain pointers, sizes and element strides in, float32 out. No torch, no Python.
#pragma once

#include <cstdint>

namespace codmd {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Shape {
  int64_t batch, frames, channels, height, width;
};

// Element strides of (batch, frame, channel, height, width), whatever the order in memory.
struct Latent {
  const void* data;
  int64_t stride[5];
};

// Region i of a grid covers rows i*H/height .. (i+1)*H/height - 1; {0, 0} keeps every pixel.
struct Grid {
  int64_t height, width;
  bool every_pixel() const { return height == 0; }
  int64_t features(const Shape& s) const { return s.channels * (every_pixel() ? s.height * s.width : height * width); }
};

// Bytes [B, F], non-zero where the frame counts; null means that every frame does.
struct FrameMask {
  const uint8_t* data;
  int64_t stride[2];
  bool valid(int64_t b, int64_t f) const { return !data || data[b * stride[0] + f * stride[1]] != 0; }
};

struct Scores {
  Shape shape;
  DType dtype;
  Latent student, real, fake;
  FrameMask mask;
  Grid grid;
};

struct Weights {
  double temperature, batch, frame;
};

// Writes terms[3] = (total, batch, frame). A null gradient means that its term is not computed and is 0.
// frame_grad: [B, F, K] for a grid, [B, F, F] (the matrices M / B) for every pixel. batch_grad: [B, K].
void relation_forward(const Scores& scores, const Weights& weights, int threads, float* terms, float* frame_grad,
                      float* batch_grad);

// The frame term alone, and the rows psi_x | psi_r | psi_d | valid frames, [B, 3K + 1], that a group gathers.
void relation_frames(const Scores& scores, const Weights& weights, int threads, float* frame_term,
                     float* frame_grad, float* pooled);

// The batch term of the gathered rows; the gradient of `rows` rows from first_row on, times grad_scale.
void relation_batch(const float* pooled, int64_t samples, int64_t features, int64_t first_row, int64_t rows,
                    const float* frame_term, const Weights& weights, double grad_scale, int threads, float* terms,
                    float* batch_grad);

// Writes grad (an own shape-like tensor) from the two feature gradients; frame_scale and batch_scale are the
// upstream gradients of the two terms, weights included. student is read for every_pixel() grids only.
void relation_backward(const Shape& shape, DType dtype, const Latent& student, const Latent& grad,
                       const FrameMask& mask, const Grid& grid, const float* frame_grad, const float* batch_grad,
                       double frame_scale, double batch_scale, int threads);

// "avx512", "avx2" or "baseline": what this processor runs.
const char* active_isa();

// Narrows the choice, for tests and diagnosis; false when the processor or the build lacks it.
bool select_isa(const char* name);

}  // namespace codmd
