// SPDX-License-Identifier: Apache-2.0
//
// Features that keep every pixel: latents are streamed once per direction, in chunks, and never copied whole.
#pragma once

#include "../relation_cpu.h"

namespace codmd {

void every_pixel_forward(const Scores& scores, const Weights& weights, int threads, float* terms, float* frame_grad,
                         float* batch_grad);

void every_pixel_frames(const Scores& scores, const Weights& weights, int threads, float* frame_term,
                        float* frame_grad, float* pooled);

void every_pixel_backward(const Shape& shape, DType dtype, const Latent& student, const Latent& grad,
                          const FrameMask& mask, const float* frame_grad, const float* batch_grad,
                          double frame_scale, double batch_scale, int threads);

}  // namespace codmd
