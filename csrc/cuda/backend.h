// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend for its binding: plain pointers, sizes, element strides and the stream. A forward function returns
// the bytes of workspace that it needs; called with workspace 0 it does nothing else. Nothing is allocated, nothing
// waits, and the counters are zero before and after.
#pragma once

#include <cstdint>
#include <string>

#include "../dmd.h"
#include "../types.h"

namespace codmd::cuda {

// The device's queue; a host compiler's build ignores it.
using Stream = uintptr_t;

struct Run {
  int device;
  int processors;  // multiprocessors, which decide how far planes are split
  Stream stream;
  uintptr_t workspace;
  uint32_t* counters;  // counters_of them, private to the stream
};

// The relation alone. With found.rows, the stage before a gather: everything but the batch term.
int64_t relation(const Run& run, const Scores& scores, const Numbers& numbers, const Found& found);

// The distribution matching loss and, with `related`, the pooled relation of the guided predictions, from one read.
// `mask` and `grid` are the relation's.
int64_t objective(const Run& run, const DmdScores& scores, const DmdRule& rule, bool related, const FrameMask& mask,
                  const Grid& grid, const Numbers& numbers, const Found& found);

// The batch term of gathered rows: terms and batch_grad [count, K].
int64_t gathered(const Run& run, const Gathered& all, const Numbers& numbers, float* terms, float* batch_grad);

// Writes `out`, rounded once: upstream * factor * G and the pooled relation's share. Without found.norms, the latter
// alone. Reads neither student nor noisy; needs no workspace.
void gradient(const Run& run, const DmdScores& scores, const DmdRule& rule, const FrameMask& mask, const Grid& grid,
              const Numbers& numbers, const Upstream& upstream, const Found& found, const Tensor& out);

// The gradient of a relation that keeps every pixel, from its matrices and the student; needs no workspace.
void whole_gradient(const Run& run, const Shape& shape, DType dtype, const Tensor& student, const FrameMask& mask,
                    const Numbers& numbers, const Upstream& upstream, const Found& found, const Tensor& out);

// Counters that every function above makes do with.
int64_t counters_of(int64_t samples, int64_t frames);

// Why this binary cannot run on the device; empty when it can.
std::string device_problem(int device);

}  // namespace codmd::cuda
