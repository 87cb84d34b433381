// SPDX-License-Identifier: Apache-2.0
//
// The distribution matching loss, alone or with the relation term, on the CPU: one pass over the latents forward,
// one backward. Plain pointers, sizes and element strides in, float32 out. No torch, no Python.
#pragma once

#include <cstdint>

#include "relation_cpu.h"

namespace codmd {

enum class NormScope : int { sample = 0, batch = 1, block = 2 };
enum class Guard : int { none = 0, clamp = 1, add = 2 };
enum class NanPolicy : int { to_num = 0, zero_sample = 1, keep = 2 };

// L = coefficient * reduce(penalty(g)), g = repaired((f - r) / norm); see Convention in codmd/conventions.py.
struct DmdRule {
  NormScope scope;
  const int64_t* edges;  // [segments + 1]: the frames where segments of a sample start, then the number of frames
  int64_t segments;
  bool first_alone;  // segment 0 has norm 1
  Guard guard;
  double eps;
  NanPolicy nan;
  double huber_c;  // 0 for the squared penalty
  double coefficient;
  bool sum;
  bool norm_divides_loss;
  bool weight_on_direction;
};

// Absent latents have null data. With sigma, the predictions are velocities and x0 = noisy - sigma * v.
struct DmdScores {
  Shape shape;
  DType dtype;
  Latent student, fake, real, real_uncond, fake_uncond, noisy;
  const float* sigma;  // [B, F] by strides, or null
  int64_t sigma_stride[2];
  const uint8_t* mask;  // one byte an element by strides, or null
  int64_t mask_stride[5];
  const float* sample_weight;  // [B] or null
  float real_scale, fake_scale;  // k in c + k (c - u)
};

struct RelationPart {
  FrameMask mask;
  Grid grid;
  double temperature;
};

// values[2] = loss, mean|g|. norms: [B], [1] or [B, segments]. factors [B]: dL/dx = factor * G(f - r, norm).
void dmd_forward(const DmdScores& scores, const DmdRule& rule, int threads, float* values, float* norms,
                 float* factors);

// The same pass also pools features: frame_term [1], frame_grad [B, F, K] and the rows psi_x | psi_r | psi_d | valid
// frames, [B, 3K + 1]. A null frame_grad or pooled is not computed.
void codmd_forward(const DmdScores& scores, const DmdRule& rule, const RelationPart& relation, int threads,
                   float* values, float* norms, float* factors, float* frame_term, float* frame_grad, float* pooled);

// grad = upstream * factor * G + the relation's share, rounded once. Null feature gradients add nothing, a false
// `dmd` leaves the first part out. Reads neither student nor noisy.
void dmd_backward(const DmdScores& scores, const DmdRule& rule, const float* norms, const float* factors,
                  double upstream, bool dmd, const RelationPart& relation, const float* frame_grad,
                  const float* batch_grad, double frame_scale, double batch_scale, const Latent& grad, int threads);

}  // namespace codmd
