// SPDX-License-Identifier: Apache-2.0
//
// What the passes that pool features share on the host: whether finish_pass or the kernels of long_relation.h make
// relations of the features, and where everything lies.
#pragma once

#include "long_relation.h"
#include "pooled_finish.h"

namespace codmd::cuda {

struct PooledPlan {
  bool fused;
  Cut cut;
  float* partial;
  FinishPass finish;
};

// `split` and `whole` cut the same latents, with regions split between units or not.
PooledPlan plan_pooled(const Run& run, Arena& arena, const Cut& split, const Cut& whole, const Numbers& numbers,
                       const float* dmd, const Found& found);

// The relations of the tables that the pass wrote.
void finish_pooled(const Run& run, Arena& arena, const PooledPlan& plan, const Found& found);

// The batch relation of gathered rows by one block; false, and nothing done, when they are too many for it.
bool finish_gathered(const Run& run, const Arena& arena, const Gathered& all, const Numbers& numbers, float* terms,
                     float* batch_grad);

}  // namespace codmd::cuda
