// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dispatch.h"
#include "long_rows.h"

namespace codmd::cuda {

// Relations among rows of `dtype` that are too long or too many for pooled_finish.h.
struct LongRows {
  Shape shape;  // shape.batch relations of shape.frames rows
  DType dtype;
  Tensor student, real, other;
  bool is_difference;  // other is d itself, not fake
  Validity validity;
  const float* unit_norms;  // of GramProducts
};

// A table [relations, n, 3K + 1] of float features as such rows, and its unit vectors in the workspace.
LongRows table_rows(const float* table, int64_t relations, int64_t n, int64_t features);
LongRows unit_rows(const Run& run, Arena& arena, const float* table, int64_t relations, int64_t n, int64_t features);

// scale * M [relations, n, n] into `matrix`, or, where that is null, into the workspace. The returned part points to
// divergences in the workspace.
TermPart long_relation(const Run& run, Arena& arena, const LongRows& rows, Number<float> temperature, float scale,
                       float*& matrix);

// Means over the rows that take part, [relations, 3K + 1].
void long_means(const Run& run, const Arena& arena, const LongRows& rows, float* out);

// out[b, i] = scale * sum_j matrix[b, first_row + i, j] x[b, j] + batch_scale / valid * batch_grad[b].
void long_mix(const Run& run, const Arena& arena, const LongRows& rows, const float* matrix, Scale<float> scale,
              const float* batch_grad, Scale<float> batch_scale, const Tensor& out, int64_t first_row, int64_t count);

void long_terms(const Run& run, const Arena& arena, const TermsPass& pass);

// The whole of a forward pass. With `pooled_features` frame_grad is [B, F, K], otherwise the matrices [B, F, F]; `dmd`
// is (loss, mean|g|) of an objective, or null.
void long_forward(const Run& run, Arena& arena, const LongRows& rows, const Numbers& numbers, bool pooled_features,
                  const float* dmd, const Found& found);

int64_t long_counters(int64_t relations, int64_t n);

}  // namespace codmd::cuda
