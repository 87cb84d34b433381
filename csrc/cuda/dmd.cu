// SPDX-License-Identifier: Apache-2.0
#include "dmd_pass.h"
#include "pooled.h"

namespace codmd::cuda {
namespace {

Predictions predictions_of(const DmdScores& scores) {
  return {scores.fake,  scores.real,        scores.real_uncond,
          scores.fake_uncond, scores.noisy, scores.sigma,
          {scores.sigma_stride[0], scores.sigma_stride[1]}, scores.real_scale, scores.fake_scale};
}

struct Outputs {
  float *values, *norms, *factors;
};

// The pass over the latents, with feature tables in `partial` or without, and the algebra of its moments.
void run_moments(const Run& run, Arena& arena, const DmdScores& scores, const DmdRule& rule, bool magnitude,
                 const Cut& cut, const FrameMask& mask, float* partial, const Outputs& outputs) {
  const Shape& shape = scores.shape;
  UnitMoments* moments = arena.take<UnitMoments>(cut.units());
  Moments* by_frame = arena.take<Moments>(shape.batch * shape.frames);
  SampleValue* by_sample = arena.take<SampleValue>(shape.batch);
  if (arena.counting()) return;
  with_type(scores.dtype, [&](auto element) {
    const DmdPass<decltype(element)> pass{cut,  scores.student, predictions_of(scores), {scores.mask}, rule,
                                          mask, moments,        partial};
    launch(pass, cut.units(), 0, run.stream);
  });
  const DmdFinishPass finish{shape.batch,
                             shape.frames,
                             cut.units() / (shape.batch * shape.frames),
                             shape.channels * shape.height * shape.width,
                             rule,
                             scores.sample_weight,
                             magnitude,
                             moments,
                             by_frame,
                             by_sample,
                             outputs.values,
                             outputs.norms,
                             outputs.factors,
                             run.counters};
  launch(finish, shape.batch, 8, run.stream);
}

Cut forward_cut(const Run& run, const DmdScores& s, const Grid& grid, bool may_split) {
  return cut_planes(s.shape, grid, element_size(s.dtype),
                    {s.student, s.fake, s.real, s.real_uncond, s.fake_uncond, s.noisy}, s.mask, run.processors,
                    may_split);
}

}  // namespace

int64_t dmd_forward(const Run& run, const DmdScores& scores, const DmdRule& rule, bool magnitude, float* values,
                    float* norms, float* factors) {
  const DeviceGuard guard(run.device);
  Arena arena(run.workspace);
  run_moments(run, arena, scores, rule, magnitude, forward_cut(run, scores, {1, 1}, true), {}, nullptr,
              {values, norms, factors});
  return arena.bytes();
}

int64_t codmd_forward(const Run& run, const DmdScores& scores, const DmdRule& rule, bool magnitude,
                      const FrameMask& mask, const Grid& grid, double temperature, float* values, float* norms,
                      float* factors, float* frame_term, float* frame_grad, float* pooled) {
  const DeviceGuard guard(run.device);
  Arena arena(run.workspace);
  const RelationWeights weights{temperature, 0.0, 1.0};
  const PooledOutputs outputs{frame_grad, nullptr, pooled, nullptr, frame_term};
  const PooledPlan plan = plan_pooled(run, arena, forward_cut(run, scores, grid, true),
                                      forward_cut(run, scores, grid, false), weights, outputs);
  run_moments(run, arena, scores, rule, magnitude, plan.cut, mask, plan.partial, {values, norms, factors});
  finish_pooled(run, arena, plan, weights, outputs);
  return arena.bytes();
}

void dmd_backward(const Run& run, const DmdScores& scores, const DmdRule& rule, const float* norms,
                  const float* factors, const DmdUpstream& upstream, const FrameMask& mask, const Grid& grid,
                  const float* frame_grad, const float* batch_grad, double batch_weight, double frame_weight,
                  const Tensor& grad) {
  const DeviceGuard guard(run.device);
  const bool dmd = upstream.total || upstream.dmd;
  const Scale dmd_scale{upstream.total, upstream.dmd, 1.0f};
  const Scale frame_scale{upstream.total, upstream.frame, float(frame_weight)};
  const Scale batch_scale{upstream.total, upstream.batch, float(batch_weight)};
  // A term that no gradient reaches must not spread its NaN as 0 * NaN.
  if (!upstream.total && !upstream.frame) frame_grad = nullptr;
  if (!upstream.total && !upstream.batch) batch_grad = nullptr;
  const Cut cut = cut_planes(scores.shape, grid, element_size(scores.dtype),
                             {grad, scores.fake, scores.real, scores.real_uncond, scores.fake_uncond}, scores.mask,
                             run.processors, true);
  with_type(scores.dtype, [&](auto element) {
    const DmdBackwardPass<decltype(element)> pass{
        cut,     predictions_of(scores), {scores.mask}, rule,
        norms,   factors,                dmd_scale,     dmd,
        {frame_grad, batch_grad, frame_scale, batch_scale, mask}, grad};
    launch(pass, cut.units(), 0, run.stream);
  });
}

}  // namespace codmd::cuda
