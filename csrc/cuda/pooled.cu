// SPDX-License-Identifier: Apache-2.0
#include "pooled.h"

namespace codmd::cuda {
namespace {

// Of finish_pass: the table, and the relation where it is wanted.
int64_t shared_floats(int64_t n, int64_t features, bool relation) {
  return relation ? fused_floats(n, features) : n * row_pitch(features);
}

// One block makes a sample's relation, one the batch's: beyond these sizes they would be the slowest part by far.
constexpr int64_t kFusedRows = 64;

bool fits_fused(const Shape& shape, int64_t features, bool frames, bool batch) {
  return shape.frames <= kFusedRows && shared_floats(shape.frames, features, frames) <= kFusedFloats &&
         (!batch || (shape.batch <= kFusedRows && fused_floats(shape.batch, features) <= kFusedFloats));
}

// The whole batch relation by one block, of gathered rows that fit its shared memory.
struct GatheredPass {
  static constexpr const char* kName = "gathered_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  Gathered all;
  Numbers numbers;
  float *terms, *batch_grad;

  CODMD_DEVICE void operator()(Block& block) const {
    const int features = int(all.features);
    const int64_t size = all.samples * row_pitch(features);
    float* table = block.shared() + kReserved;
    block.each([&](int t) {
      for (int64_t at = t; at < size; at += kThreads) table[at] = all.rows[at];
    });
    block.sync();
    const float batch = fused_relation(block, table, features, all.samples, all.first, all.count,
                                       float(numbers.temperature()), float(all.scale), batch_grad, table + size);
    block.each([&](int t) {
      if (t == 0) write_gathered_terms(terms, batch, numbers, all.kept, all.objective);
    });
  }
};

}  // namespace

PooledPlan plan_pooled(const Run& run, Arena& arena, const Cut& split, const Cut& whole, const Numbers& numbers,
                       const float* dmd, const Found& found) {
  const Shape& shape = split.shape;
  const int64_t features = split.features(), rows = shape.rows();
  PooledPlan plan;
  plan.fused = fits_fused(shape, features, found.frame_grad, found.batch_grad);
  plan.cut = plan.fused ? split : whole;
  plan.partial = arena.take<float>(plan.cut.splits * rows * row_pitch(features));
  float* pooled = found.rows;
  float* losses = nullptr;
  if (plan.fused) {
    losses = arena.take<float>(shape.batch);
    if (found.batch_grad && !pooled) pooled = arena.take<float>(shape.batch * row_pitch(features));
  }
  plan.finish = {shape.batch,      shape.frames,     plan.cut.splits, int(features), numbers,
                 plan.partial,     pooled,           losses,          found.frame_grad,
                 found.batch_grad, found.terms,      dmd,             run.counters};
  return plan;
}

// The relations of the tables that the pass wrote.
void finish_pooled(const Run& run, Arena& arena, const PooledPlan& plan, const Found& found) {
  const Shape& shape = plan.cut.shape;
  const int64_t features = plan.cut.features();
  if (!plan.fused) {
    const LongRows table = table_rows(plan.partial, shape.batch, shape.frames, features);
    long_forward(run, arena, table, plan.finish.numbers, true, plan.finish.dmd, found);
  } else if (!arena.counting()) {
    const int64_t frames = shared_floats(shape.frames, features, found.frame_grad);
    const int64_t batch = shared_floats(shape.batch, features, found.batch_grad);
    launch(plan.finish, shape.batch, frames > batch ? frames : batch, run.stream);
  }
}

bool finish_gathered(const Run& run, const Arena& arena, const Gathered& all, const Numbers& numbers, float* terms,
                     float* batch_grad) {
  const int64_t shared = fused_floats(all.samples, all.features);
  if (all.samples > kFusedRows || shared > kFusedFloats) return false;
  if (arena.counting()) return true;
  launch(GatheredPass{all, numbers, terms, batch_grad}, 1, shared, run.stream);
  return true;
}

}  // namespace codmd::cuda
