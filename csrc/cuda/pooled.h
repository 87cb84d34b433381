// SPDX-License-Identifier: Apache-2.0
//
// What the passes that pool features share on the host: whether finish_pass or the kernels of long_relation.h make
// relations of the features, and where everything lies.
#pragma once

#include "long_relation.h"
#include "pooled_finish.h"

namespace codmd::cuda {

struct PooledOutputs {
  float *frame_grad, *batch_grad, *pooled, *terms, *frame_term;  // any may be null
};

struct PooledPlan {
  bool fused;
  Cut cut;
  float* partial;
  FinishPass finish;
};

// Of finish_pass: the table, and the relation where it is wanted.
inline int64_t shared_floats(int64_t n, int64_t features, bool relation) {
  return relation ? fused_floats(n, features) : n * row_pitch(features);
}

// One block makes a sample's relation, one the batch's: beyond these sizes they would be the slowest part by far.
constexpr int64_t kFusedRows = 64;

inline bool fits_fused(const Shape& shape, int64_t features, bool frames, bool batch) {
  return shape.frames <= kFusedRows && shared_floats(shape.frames, features, frames) <= kFusedFloats &&
         (!batch || (shape.batch <= kFusedRows && fused_floats(shape.batch, features) <= kFusedFloats));
}

inline PooledPlan plan_pooled(const Run& run, Arena& arena, const Cut& split, const Cut& whole,
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
inline void finish(const Run& run, Arena& arena, const PooledPlan& plan, const RelationWeights& weights,
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

}  // namespace codmd::cuda
