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

// `split` and `whole` cut the same latents, with regions split between units or not.
PooledPlan plan_pooled(const Run& run, Arena& arena, const Cut& split, const Cut& whole, const RelationWeights& weights,
                       const PooledOutputs& outputs);

// The relations of the tables that the pass wrote.
void finish_pooled(const Run& run, Arena& arena, const PooledPlan& plan, const RelationWeights& weights,
                   const PooledOutputs& outputs);

// The batch relation of rows [samples, 3K + 1] by one block; false, and nothing done, when they are too many for it.
bool finish_gathered(const Run& run, const Arena& arena, const float* pooled, int64_t samples, int64_t features,
                     int64_t first_row, int64_t rows, const float* frame_term, const RelationWeights& weights,
                     double grad_scale, float* terms, float* batch_grad);

}  // namespace codmd::cuda
