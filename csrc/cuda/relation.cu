// SPDX-License-Identifier: Apache-2.0
#include "pooled.h"
#include "relation_pass.h"

namespace codmd::cuda {

int64_t counters_of(int64_t samples, int64_t frames) {
  const int64_t grams = long_counters(samples, frames), batch = long_counters(1, samples);
  return grams > batch ? grams : batch;
}

int64_t relation(const Run& run, const Scores& scores, const Numbers& numbers, const Found& found) {
  const DeviceGuard guard(run.device);
  Arena arena(run.workspace);
  if (scores.grid.every_pixel()) {
    const LongRows rows{scores.shape, scores.dtype, scores.student, scores.real, scores.fake, false,
                        {scores.mask, nullptr, 0, 0}, nullptr};
    long_forward(run, arena, rows, numbers, false, nullptr, found);
    return arena.bytes();
  }
  const int64_t bytes = element_size(scores.dtype);
  const auto cut = [&](bool may_split) {
    return cut_planes(scores.shape, scores.grid, bytes, {scores.student, scores.real, scores.fake}, {}, run.processors,
                      may_split);
  };
  const PooledPlan plan = plan_pooled(run, arena, cut(true), cut(false), numbers, nullptr, found);
  if (!arena.counting())
    with_type(scores.dtype, [&](auto element) {
      const RelationPass<decltype(element)> pass{plan.cut,    scores.student, scores.real,
                                                 scores.fake, scores.mask,    plan.partial};
      launch(pass, plan.cut.units(), 0, run.stream);
    });
  finish_pooled(run, arena, plan, found);
  return arena.bytes();
}

int64_t gathered(const Run& run, const Gathered& all, const Numbers& numbers, float* terms, float* batch_grad) {
  const DeviceGuard guard(run.device);
  Arena arena(run.workspace);
  if (finish_gathered(run, arena, all, numbers, terms, batch_grad)) return arena.bytes();
  float* matrix = nullptr;
  const Scale<float> one{nullptr, nullptr, {1.0f, nullptr}, {1.0f, nullptr}};
  const LongRows table = unit_rows(run, arena, all.rows, 1, all.samples, all.features);
  const TermPart batch = long_relation(run, arena, table, numbers.temperature, float(all.scale), matrix);
  const Tensor out{batch_grad, {0, all.features, 0, 0, 1}};
  long_mix(run, arena, table, matrix, one, nullptr, one, out, all.first, all.count);
  long_terms(run, arena, {{}, batch, numbers, nullptr, all.kept, all.objective, terms});
  return arena.bytes();
}

void whole_gradient(const Run& run, const Shape& shape, DType dtype, const Tensor& student, const FrameMask& mask,
                    const Numbers& numbers, const Upstream& upstream, const Found& found, const Tensor& out) {
  const DeviceGuard guard(run.device);
  const Scales<float> scales(upstream, numbers, false);
  // A term that no gradient reaches must not spread its NaN as 0 * NaN.
  const float* frame_grad = scales.frame.reached() ? found.frame_grad : nullptr;
  const float* batch_grad = scales.batch.reached() ? found.batch_grad : nullptr;
  const LongRows rows{shape, dtype, student, {}, {}, false, {mask, nullptr, 0, 0}, nullptr};
  long_mix(run, Arena(1), rows, frame_grad, scales.frame, batch_grad, scales.batch, out, 0, shape.frames);
}

}  // namespace codmd::cuda
