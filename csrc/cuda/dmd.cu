// SPDX-License-Identifier: Apache-2.0
#include "dmd_pass.h"
#include "gradient_pass.h"
#include "pooled.h"

namespace codmd::cuda {
namespace {

Predictions predictions_of(const DmdScores& scores, const Numbers& numbers) {
  return {scores.real,  scores.fake,        scores.real_uncond,
          scores.fake_uncond, scores.noisy, scores.sigma,
          {scores.sigma_stride[0], scores.sigma_stride[1]}, numbers.real_scale, numbers.fake_scale};
}

// The pass over the latents, with feature tables in `partial` or without, and the algebra of its moments. The terms
// are written where no relation follows.
void run_moments(const Run& run, Arena& arena, const DmdScores& scores, const DmdRule& rule, const Numbers& numbers,
                 const Cut& cut, const FrameMask& mask, float* partial, float* loss, const Found& found) {
  const Shape& shape = scores.shape;
  UnitMoments* moments = arena.take<UnitMoments>(cut.units());
  Moments* by_frame = arena.take<Moments>(shape.rows());
  SampleValue* by_sample = arena.take<SampleValue>(shape.batch);
  if (arena.counting()) return;
  with_type(scores.dtype, [&](auto element) {
    const DmdPass<decltype(element)> pass{cut,  scores.student, predictions_of(scores, numbers), {scores.mask}, rule,
                                          mask, moments,        partial};
    launch(pass, cut.units(), 0, run.stream);
  });
  const DmdFinishPass finish{shape.batch,
                             shape.frames,
                             cut.units() / shape.rows(),
                             shape.pixels(),
                             rule,
                             scores.sample_weight,
                             numbers,
                             moments,
                             by_frame,
                             by_sample,
                             loss,
                             partial ? nullptr : found.terms,
                             found.norms,
                             found.factors,
                             run.counters};
  launch(finish, shape.batch, 8, run.stream);
}

}  // namespace

int64_t objective(const Run& run, const DmdScores& scores, const DmdRule& rule, bool related, const FrameMask& mask,
                  const Grid& grid, const Numbers& numbers, const Found& found) {
  const DeviceGuard guard(run.device);
  Arena arena(run.workspace);
  const auto cut = [&](const Grid& regions, bool may_split) {
    return cut_planes(scores.shape, regions, element_size(scores.dtype),
                      {scores.student, scores.real, scores.fake, scores.real_uncond, scores.fake_uncond, scores.noisy},
                      scores.mask, run.processors, may_split);
  };
  float* loss = arena.take<float>(2);
  if (!related) {
    run_moments(run, arena, scores, rule, numbers, cut({1, 1}, true), {}, nullptr, loss, found);
    return arena.bytes();
  }
  const PooledPlan plan = plan_pooled(run, arena, cut(grid, true), cut(grid, false), numbers, loss, found);
  run_moments(run, arena, scores, rule, numbers, plan.cut, mask, plan.partial, loss, found);
  finish_pooled(run, arena, plan, found);
  return arena.bytes();
}

void gradient(const Run& run, const DmdScores& scores, const DmdRule& rule, const FrameMask& mask, const Grid& grid,
              const Numbers& numbers, const Upstream& upstream, const Found& found, const Tensor& out) {
  const DeviceGuard guard(run.device);
  const Scales<float> scales(upstream, numbers, found.norms != nullptr);
  // A term that no gradient reaches must not spread its NaN as 0 * NaN.
  const FeatureGradient relation{scales.frame.reached() ? found.frame_grad : nullptr,
                                 scales.batch.reached() ? found.batch_grad : nullptr, scales.frame, scales.batch,
                                 mask};
  const Cut cut = cut_planes(scores.shape, grid, element_size(scores.dtype),
                             {out, scores.real, scores.fake, scores.real_uncond, scores.fake_uncond}, scores.mask,
                             run.processors, true);
  const auto write = [&](auto element, auto dmd) {
    const GradientPass<decltype(element), decltype(dmd)::value> pass{
        cut,         predictions_of(scores, numbers), {scores.mask}, rule, found.norms, found.factors,
        scales.dmd, relation,                        out};
    launch(pass, cut.units(), 0, run.stream);
  };
  with_type(scores.dtype, [&](auto element) {
    if (found.norms && scales.dmd.reached())
      write(element, std::true_type{});
    else
      write(element, std::false_type{});
  });
}

}  // namespace codmd::cuda
