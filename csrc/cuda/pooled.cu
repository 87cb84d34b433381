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

  const float* pooled;
  int64_t samples, first_row, rows;
  int features;
  Weights weights;
  float grad_scale;
  const float* frame_term;
  float *terms, *batch_grad;

  CODMD_DEVICE void operator()(Block& block) const {
    const int64_t size = samples * row_pitch(features);
    float* table = block.shared() + kReserved;
    block.each([&](int t) {
      for (int64_t at = t; at < size; at += kThreads) table[at] = pooled[at];
    });
    block.sync();
    const float batch = fused_relation(block, table, features, samples, first_row, rows, weights.temperature,
                                       grad_scale, batch_grad, table + size);
    block.each([&](int t) {
      if (t == 0) write_terms(terms, batch, *frame_term, weights);
    });
  }
};

}  // namespace

PooledPlan plan_pooled(const Run& run, Arena& arena, const Cut& split, const Cut& whole,
                              const RelationWeights& weights, const PooledOutputs& outputs) {
  const Shape& shape = split.shape;
  const int64_t features = split.features(), rows = shape.batch * shape.frames;
  PooledPlan plan;
  plan.fused = fits_fused(shape, features, outputs.frame_grad, outputs.batch_grad);
  plan.cut = plan.fused ? split : whole;
  plan.partial = arena.take<float>(plan.cut.splits * rows * row_pitch(features));
  float* pooled = outputs.pooled;
  float* losses = nullptr;
  if (plan.fused) {
    losses = arena.take<float>(shape.batch);
    if (outputs.batch_grad && !pooled) pooled = arena.take<float>(shape.batch * row_pitch(features));
  }
  plan.finish = {shape.batch,
                 shape.frames,
                 plan.cut.splits,
                 int(features),
                 {float(weights.temperature), float(weights.batch), float(weights.frame)},
                 plan.partial,
                 pooled,
                 losses,
                 outputs.frame_grad,
                 outputs.batch_grad,
                 outputs.terms,
                 outputs.frame_term,
                 run.counters};
  return plan;
}

// The relations of the tables that the pass wrote.
void finish_pooled(const Run& run, Arena& arena, const PooledPlan& plan, const RelationWeights& weights,
                   const PooledOutputs& outputs) {
  const Shape& shape = plan.cut.shape;
  const int64_t features = plan.cut.features();
  if (!plan.fused) {
    const LongRows table = table_rows(plan.partial, shape.batch, shape.frames, features);
    long_forward(run, arena, table, weights, true, outputs.frame_grad, outputs.batch_grad, outputs.pooled,
                 outputs.terms, outputs.frame_term);
  } else if (!arena.counting()) {
    const int64_t frames = shared_floats(shape.frames, features, outputs.frame_grad);
    const int64_t batch = shared_floats(shape.batch, features, outputs.batch_grad);
    launch(plan.finish, shape.batch, frames > batch ? frames : batch, run.stream);
  }
}

bool finish_gathered(const Run& run, const Arena& arena, const float* pooled, int64_t samples, int64_t features,
                     int64_t first_row, int64_t rows, const float* frame_term, const RelationWeights& weights,
                     double grad_scale, float* terms, float* batch_grad) {
  const int64_t shared = fused_floats(samples, features);
  if (samples > kFusedRows || shared > kFusedFloats) return false;
  if (arena.counting()) return true;
  const Weights narrow{float(weights.temperature), float(weights.batch), float(weights.frame)};
  const GatheredPass pass{pooled, samples,           first_row,  rows,  int(features),
                          narrow, float(grad_scale), frame_term, terms, batch_grad};
  launch(pass, 1, shared, run.stream);
  return true;
}

}  // namespace codmd::cuda
