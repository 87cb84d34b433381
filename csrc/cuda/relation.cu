// SPDX-License-Identifier: Apache-2.0
#include "broadcast.h"
#include "pooled.h"
#include "relation_pass.h"

namespace codmd::cuda {
namespace {

int64_t forward(const Run& run, const RelationScores& scores, const RelationWeights& weights,
                const PooledOutputs& outputs) {
  const DeviceGuard guard(run.device);
  Arena arena(run.workspace);
  if (scores.grid.height == 0) {
    const LongRows rows{scores.shape, scores.dtype, scores.student, scores.real, scores.fake, false,
                        {scores.mask, nullptr, 0, 0}, nullptr};
    long_forward(run, arena, rows, weights, false, outputs.frame_grad, outputs.batch_grad, outputs.pooled,
                 outputs.terms, outputs.frame_term);
    return arena.bytes();
  }
  const int64_t bytes = element_size(scores.dtype);
  const auto cut = [&](bool may_split) {
    return cut_planes(scores.shape, scores.grid, bytes, {scores.student, scores.real, scores.fake}, {}, run.processors,
                      may_split);
  };
  const PooledPlan plan = plan_pooled(run, arena, cut(true), cut(false), weights, outputs);
  if (!arena.counting())
    with_type(scores.dtype, [&](auto element) {
      const RelationPass<decltype(element)> pass{plan.cut,    scores.student, scores.real,
                                                 scores.fake, scores.mask,    plan.partial};
      launch(pass, plan.cut.units(), 0, run.stream);
    });
  finish_pooled(run, arena, plan, weights, outputs);
  return arena.bytes();
}

}  // namespace

int64_t relation_counters(int64_t samples, int64_t frames) {
  const int64_t grams = long_counters(samples, frames), batch = long_counters(1, samples);
  return grams > batch ? grams : batch;
}

int64_t relation_forward(const Run& run, const RelationScores& scores, const RelationWeights& weights, float* terms,
                         float* frame_grad, float* batch_grad) {
  return forward(run, scores, weights, {frame_grad, batch_grad, nullptr, terms, nullptr});
}

int64_t relation_frames(const Run& run, const RelationScores& scores, const RelationWeights& weights,
                        float* frame_term, float* frame_grad, float* pooled) {
  return forward(run, scores, weights, {frame_grad, nullptr, pooled, nullptr, frame_term});
}

int64_t relation_batch(const Run& run, const float* pooled, int64_t samples, int64_t features, int64_t first_row,
                       int64_t rows, const float* frame_term, const RelationWeights& weights, double grad_scale,
                       float* terms, float* batch_grad) {
  const DeviceGuard guard(run.device);
  Arena arena(run.workspace);
  if (finish_gathered(run, arena, pooled, samples, features, first_row, rows, frame_term, weights, grad_scale, terms,
                      batch_grad))
    return arena.bytes();
  float* matrix = nullptr;
  const LongRows table = unit_rows(run, arena, pooled, 1, samples, features);
  const TermPart batch = long_relation(run, arena, table, float(weights.temperature), float(grad_scale), matrix);
  const Tensor out{batch_grad, {0, features, 0, 0, 1}};
  long_mix(run, arena, table, matrix, {nullptr, nullptr, 1.0f}, nullptr, {}, out, first_row, rows);
  long_terms(run, arena, {}, batch, frame_term, weights, terms, nullptr);
  return arena.bytes();
}

void relation_backward(const Run& run, const Shape& shape, DType dtype, const Tensor& student, const Tensor& grad,
                       const FrameMask& mask, const Grid& grid, const Upstream& upstream, const float* frame_grad,
                       const float* batch_grad, double batch_weight, double frame_weight) {
  const DeviceGuard guard(run.device);
  const Scale frame_scale{upstream.total, upstream.frame, float(frame_weight)};
  const Scale batch_scale{upstream.total, upstream.batch, float(batch_weight)};
  // A term that no gradient reaches must not spread its NaN as 0 * NaN.
  if (!upstream.total && !upstream.frame) frame_grad = nullptr;
  if (!upstream.total && !upstream.batch) batch_grad = nullptr;
  if (grid.height == 0) {
    const LongRows rows{shape, dtype, student, {}, {}, false, {mask, nullptr, 0, 0}, nullptr};
    return long_mix(run, Arena(1), rows, frame_grad, frame_scale, batch_grad, batch_scale, grad, 0, shape.frames);
  }
  const Cut cut = cut_planes(shape, grid, element_size(dtype), {grad}, {}, run.processors, true);
  with_type(dtype, [&](auto element) {
    const BroadcastPass<decltype(element)> pass{cut, grad, {frame_grad, batch_grad, frame_scale, batch_scale, mask}};
    launch(pass, cut.units(), 0, run.stream);
  });
}

}  // namespace codmd::cuda
