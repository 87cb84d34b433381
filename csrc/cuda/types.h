// SPDX-License-Identifier: Apache-2.0
//
// Tensors by address, sizes and element strides: what the binding passes and kernels receive.
#pragma once

#include <cstdint>

#include "../algebra.h"

namespace codmd::cuda {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Shape {
  int64_t batch, frames, channels, height, width;
};

// Strides of (batch, frame, channel, y, x) in elements, whatever the order in memory; null data stands for none.
struct Tensor {
  const void* data;
  int64_t stride[5];

  CODMD_HD int64_t offset(int64_t b, int64_t f, int64_t c, int64_t y, int64_t x) const {
    return b * stride[0] + f * stride[1] + c * stride[2] + y * stride[3] + x * stride[4];
  }
  // Rows follow each other without a gap: a plane is one long row.
  CODMD_HD bool flat(const Shape& shape) const {
    return !data || shape.height == 1 || stride[3] == shape.width * stride[4];
  }
};

// Bytes [B, F], non-zero where the frame counts; null means that every frame does.
struct FrameMask {
  const uint8_t* data;
  int64_t stride[2];
  CODMD_HD bool valid(int64_t b, int64_t f) const { return !data || data[b * stride[0] + f * stride[1]] != 0; }
  CODMD_HD int64_t count(int64_t b, int64_t frames) const {
    if (!data) return frames;
    int64_t sum = 0;
    for (int64_t f = 0; f < frames; ++f) sum += valid(b, f) ? 1 : 0;
    return sum;
  }
};

struct Grid {
  int64_t height, width;  // {0, 0} keeps every pixel
};

}  // namespace codmd::cuda
