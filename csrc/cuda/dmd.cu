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

Augmentation augmentation_of(const DmdScores& scores) { return {scores.augment_real, scores.augment_uncond}; }

// Norms, factors and the loss from the units' moments; of a decoupled loss, whose `second` norms are known, from those
// of g. The terms are written where no relation follows.
struct Finish {
  const Run& run;
  const DmdScores& scores;
  const DmdRule& rule;
  const Numbers& numbers;
  const Cut& cut;
  Moments* by_frame;
  SampleValue* by_sample;

  void operator()(const UnitMoments* moments, const float* second, float* loss, float* terms, float* norms,
                  float* factors) const {
    const Shape& shape = scores.shape;
    const DmdFinishPass pass{shape.batch, shape.frames, cut.units() / shape.rows(), shape.pixels(), rule,
                             scores.sample_weight, numbers, moments, second, by_frame, by_sample, loss, terms, norms,
                             factors, run.counters};
    launch(pass, shape.batch, 8, run.stream);
  }
};

// The pass over the latents, with feature tables in `partial` or without, and the algebra of its moments. A decoupled
// loss takes three passes, each with its algebra: x, f and c, with the features, for the first norms; x and c2 for the
// second ones; f, c, c2 and u2 for g.
void run_moments(const Run& run, Arena& arena, const DmdScores& scores, const DmdRule& rule, const Numbers& numbers,
                 const Cut& cut, const FrameMask& mask, float* partial, float* loss, const Found& found) {
  const Shape& shape = scores.shape;
  UnitMoments* moments = arena.take<UnitMoments>(cut.units());
  Moments* by_frame = arena.take<Moments>(shape.rows());
  SampleValue* by_sample = arena.take<SampleValue>(shape.batch);
  UnitMoments* second_moments = scores.decoupled() ? arena.take<UnitMoments>(cut.units()) : nullptr;
  if (arena.counting()) return;
  const Predictions predictions = predictions_of(scores, numbers);
  const Finish finish{run, scores, rule, numbers, cut, by_frame, by_sample};
  float* terms = partial ? nullptr : found.terms;
  with_type(scores.dtype, [&](auto element) {
    using T = decltype(element);
    const DmdPass<T> pass{cut, scores.student, predictions, {scores.mask}, rule, mask, moments, partial};
    launch(pass, cut.units(), 0, run.stream);
    finish(moments, nullptr, loss, terms, found.norms, found.factors);
    if (!scores.decoupled()) return;
    float* second = found.norms + rule.norms(shape);
    Predictions level{};
    level.real = level.fake = scores.augment_real;
    const DmdPass<T> distances{cut, scores.student, level, {scores.mask}, rule, {}, second_moments, nullptr};
    launch(distances, cut.units(), 0, run.stream);
    finish(second_moments, nullptr, loss, nullptr, second, found.factors);
    const DecoupledPass<T> directions{cut,  predictions, augmentation_of(scores), {scores.mask},
                                      rule, found.norms, moments};
    launch(directions, cut.units(), 0, run.stream);
    finish(moments, second, loss, terms, found.norms, found.factors);
  });
}

}  // namespace

int64_t objective(const Run& run, const DmdScores& scores, const DmdRule& rule, bool related, const FrameMask& mask,
                  const Grid& grid, const Numbers& numbers, const Found& found) {
  const DeviceGuard guard(run.device);
  Arena arena(run.workspace);
  const auto cut = [&](const Grid& regions, bool may_split) {
    return cut_planes(scores.shape, regions, element_size(scores.dtype),
                      {scores.student, scores.real, scores.fake, scores.real_uncond, scores.fake_uncond, scores.noisy,
                       scores.augment_real, scores.augment_uncond},
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
                             {out, scores.real, scores.fake, scores.real_uncond, scores.fake_uncond,
                              scores.augment_real, scores.augment_uncond},
                             scores.mask,
                             run.processors, true);
  const auto write = [&](auto element, auto moved) {
    const GradientPass<decltype(element), decltype(moved)::value> pass{
        cut,  predictions_of(scores, numbers), augmentation_of(scores), {scores.mask},
        rule, found.norms,                     found.factors,           scales.dmd,
        relation, out};
    launch(pass, cut.units(), 0, run.stream);
  };
  with_type(scores.dtype, [&](auto element) {
    if (!found.norms || !scales.dmd.reached())
      write(element, std::integral_constant<Moved, Moved::none>{});
    else if (scores.decoupled())
      write(element, std::integral_constant<Moved, Moved::decoupled>{});
    else
      write(element, std::integral_constant<Moved, Moved::plain>{});
  });
}

}  // namespace codmd::cuda
