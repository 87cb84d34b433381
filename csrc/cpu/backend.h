// SPDX-License-Identifier: Apache-2.0
//
// The CPU backend for its binding: plain pointers, sizes and element strides in, float32 out.
#pragma once

#include "../dmd.h"
#include "../types.h"

namespace codmd {

// The relation alone. With found.rows, the stage before a gather: everything but the batch term.
void relation(const Scores& scores, const Numbers& numbers, int threads, const Found& found);

// The distribution matching loss and, with `related`, the pooled relation of the guided predictions, from one read;
// a decoupled loss reads f, c1 and c2 twice, for its norms and for its direction.
// `mask` and `grid` are the relation's.
void objective(const DmdScores& scores, const DmdRule& rule, bool related, const FrameMask& mask, const Grid& grid,
               const Numbers& numbers, int threads, const Found& found);

// The batch term of gathered rows: terms and batch_grad [count, K].
void gathered(const Gathered& all, const Numbers& numbers, int threads, float* terms, float* batch_grad);

// Writes `out`, rounded once: upstream * factor * G and the pooled relation's share. Without found.norms, the latter
// alone. Reads neither student nor noisy.
void gradient(const DmdScores& scores, const DmdRule& rule, const FrameMask& mask, const Grid& grid,
              const Numbers& numbers, const Upstream& upstream, int threads, const Found& found, const Tensor& out);

// The gradient of a relation that keeps every pixel, from its matrices and the student.
void whole_gradient(const Shape& shape, DType dtype, const Tensor& student, const FrameMask& mask,
                    const Numbers& numbers, const Upstream& upstream, int threads, const Found& found,
                    const Tensor& out);

// "avx512", "avx2" or "baseline": what this processor runs.
const char* active_isa();

// Narrows the choice, for tests and diagnosis; false when the processor or the build lacks it.
bool select_isa(const char* name);

}  // namespace codmd
