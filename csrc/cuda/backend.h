// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend for its binding: plain pointers, sizes, element strides and the stream. A forward function returns
// the bytes of workspace that it needs; called with workspace 0 it does nothing else. Nothing is allocated, nothing
// waits, and the counters are zero before and after.
#pragma once

#include <cstdint>
#include <string>

#include "dmd_algebra.h"
#include "types.h"

namespace codmd::cuda {

// The device's queue; a host compiler's build ignores it.
using Stream = uintptr_t;

struct Run {
  int device;
  int processors;  // multiprocessors, which decide how far planes are split
  Stream stream;
  uintptr_t workspace;
  uint32_t* counters;  // relation_counters of them, private to the stream
};

struct RelationScores {
  Shape shape;
  DType dtype;
  Tensor student, real, fake;
  FrameMask mask;
  Grid grid;
};

struct RelationWeights {
  double temperature, batch, frame;
};

// Upstream gradients are device scalars; null stands for none.
struct Upstream {
  const float *total, *batch, *frame;
};

// terms[3] = (total, batch, frame). A null gradient means that its term is not computed and is 0. frame_grad:
// [B, F, K] for a grid, [B, F, F] (the matrices M / B) for every pixel; batch_grad: [B, K].
int64_t relation_forward(const Run& run, const RelationScores& scores, const RelationWeights& weights, float* terms,
                         float* frame_grad, float* batch_grad);

// The frame term alone, and the rows psi_x | psi_r | psi_d | valid frames, [B, 3K + 1].
int64_t relation_frames(const Run& run, const RelationScores& scores, const RelationWeights& weights,
                        float* frame_term, float* frame_grad, float* pooled);

// The batch term of gathered rows [N, 3K + 1], and grad_scale times the gradient of `rows` of them.
int64_t relation_batch(const Run& run, const float* pooled, int64_t samples, int64_t features, int64_t first_row,
                       int64_t rows, const float* frame_term, const RelationWeights& weights, double grad_scale,
                       float* terms, float* batch_grad);

// Writes the student's gradient; its values are read when the grid keeps every pixel. Needs no workspace.
void relation_backward(const Run& run, const Shape& shape, DType dtype, const Tensor& student, const Tensor& grad,
                       const FrameMask& mask, const Grid& grid, const Upstream& upstream, const float* frame_grad,
                       const float* batch_grad, double batch_weight, double frame_weight);

// Absent latents have null data. With sigma, the predictions are velocities and x0 = noisy - sigma v.
struct DmdScores {
  Shape shape;
  DType dtype;
  Tensor student, fake, real, real_uncond, fake_uncond, noisy;
  const float* sigma;  // [B, F] by strides, or null
  int64_t sigma_stride[2];
  Tensor mask;                   // bytes, or null
  const float* sample_weight;    // [B], or null
  float real_scale, fake_scale;  // k in c + k (c - u)
};

struct DmdUpstream {
  const float *total, *dmd, *batch, *frame;
};

// values[2] = (loss, mean |g| or 0). norms: [B], [1] or [B, segments]. factors [B]: dL/dx = factor G(f - r, norm).
int64_t dmd_forward(const Run& run, const DmdScores& scores, const DmdRule& rule, bool magnitude, float* values,
                    float* norms, float* factors);

// The same read also pools: frame_term [1], frame_grad [B, F, K] and rows [B, 3K + 1] as relation_frames, where not
// null. `mask` is the relation's.
int64_t codmd_forward(const Run& run, const DmdScores& scores, const DmdRule& rule, bool magnitude,
                      const FrameMask& mask, const Grid& grid, double temperature, float* values, float* norms,
                      float* factors, float* frame_term, float* frame_grad, float* pooled);

// Writes the gradient of both terms, rounded once. Reads neither student nor noisy; needs no workspace.
void dmd_backward(const Run& run, const DmdScores& scores, const DmdRule& rule, const float* norms,
                  const float* factors, const DmdUpstream& upstream, const FrameMask& mask, const Grid& grid,
                  const float* frame_grad, const float* batch_grad, double batch_weight, double frame_weight,
                  const Tensor& grad);

// Counters that every function above makes do with.
int64_t relation_counters(int64_t samples, int64_t frames);

// Why this binary cannot run on the device; empty when it can.
std::string device_problem(int device);

}  // namespace codmd::cuda
