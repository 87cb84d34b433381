// SPDX-License-Identifier: Apache-2.0
//
// How latents are cut, decided on the host from sizes, strides and addresses alone.
#pragma once

#include <initializer_list>

#include "tensors.h"

namespace codmd::cuda {

// Units wanted per multiprocessor before regions stop being split, and chunks that a thread should keep.
constexpr int64_t kWaves = 4;
constexpr int64_t kChunksPerThread = 2;
constexpr int64_t kMostSplits = 32;

// Whether 16-byte boundaries fall on the same elements of all tensors, wherever a row starts.
inline bool boundaries_agree(const Shape& shape, int64_t bytes, std::initializer_list<Tensor> tensors) {
  const int64_t vector = 16 / bytes, sizes[4] = {shape.batch, shape.frames, shape.channels, shape.height};
  const Tensor* first = nullptr;
  for (const Tensor& tensor : tensors) {
    if (!tensor.data) continue;
    if (tensor.stride[4] != 1 && shape.width > 1) return false;
    if (!first) first = &tensor;
    const int64_t apart = int64_t(reinterpret_cast<uintptr_t>(tensor.data) / uintptr_t(bytes)) -
                          int64_t(reinterpret_cast<uintptr_t>(first->data) / uintptr_t(bytes));
    if (apart % vector) return false;
    for (int axis = 0; axis < 4; ++axis)
      if (sizes[axis] > 1 && (tensor.stride[axis] - first->stride[axis]) % vector) return false;
  }
  return true;
}

// `masks` are read one byte at a time and only have to be flat.
inline Cut cut_planes(const Shape& shape, const Grid& grid, int64_t bytes, std::initializer_list<Tensor> tensors,
                      const Tensor& mask, int processors, bool may_split) {
  Cut cut{shape, grid, 1, grid.width == 1 && mask.flat(shape), boundaries_agree(shape, bytes, tensors)};
  for (const Tensor& tensor : tensors) cut.flat = cut.flat && tensor.flat(shape);
  if (!may_split) return cut;
  // The splits size the workspace, so they follow from the shape alone.
  const int64_t chunks = shape.height * shape.width * bytes / 16 / (grid.height * grid.width);
  const int64_t wanted = (kWaves * processors + cut.units() - 1) / cut.units();
  const int64_t useful = chunks / (kThreads * kChunksPerThread);
  cut.splits = wanted < useful ? wanted : useful;
  if (cut.splits > kMostSplits) cut.splits = kMostSplits;
  if (cut.splits < 1) cut.splits = 1;
  return cut;
}

}  // namespace codmd::cuda
