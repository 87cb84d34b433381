// SPDX-License-Identifier: Apache-2.0
//
// Features pooled over a grid of regions: the pass that reads the three latents, and the one that writes the
// gradient, constant over a region.
#pragma once

#include "../relation_cpu.h"

namespace codmd {

void pooled_forward(const Scores& scores, const Weights& weights, int threads, float* terms, float* frame_grad,
                    float* batch_grad);

void pooled_frames(const Scores& scores, const Weights& weights, int threads, float* frame_term, float* frame_grad,
                   float* pooled);

void pooled_backward(const Shape& shape, DType dtype, const Latent& grad, const FrameMask& mask, const Grid& grid,
                     const float* frame_grad, const float* batch_grad, double frame_scale, double batch_scale,
                     int threads);

}  // namespace codmd
