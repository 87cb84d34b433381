// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "../types.h"

namespace codmd {

// The valid frames of every sample, and the samples that have any. Relations see these rows only.
struct ValidRows {
  ValidRows(const FrameMask& mask, int64_t batch, int64_t frames) : first(1, 0) {
    row.reserve(size_t(batch * frames));
    frame.reserve(size_t(batch * frames));
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t f = 0; f < frames; ++f) {
        if (!mask.valid(b, f)) continue;
        row.push_back(int32_t(b * frames + f));
        frame.push_back(int32_t(f));
      }
      first.push_back(int64_t(row.size()));
      if (count(b) > 0) sample.push_back(int32_t(b));
    }
  }

  int64_t count(int64_t b) const { return first[size_t(b) + 1] - first[size_t(b)]; }
  const int32_t* rows_of(int64_t b) const { return row.data() + first[size_t(b)]; }
  const int32_t* frames_of(int64_t b) const { return frame.data() + first[size_t(b)]; }

  std::vector<int32_t> row;     // b * F + f
  std::vector<int32_t> frame;   // f
  std::vector<int64_t> first;   // [B + 1]: where a sample starts in the two above
  std::vector<int32_t> sample;  // b
};

inline const char* address(const Tensor& tensor, DType dtype, int64_t b, int64_t f, int64_t c, int64_t y, int64_t x) {
  return static_cast<const char*>(tensor.data) + tensor.offset(b, f, c, y, x) * element_size(dtype);
}

}  // namespace codmd
