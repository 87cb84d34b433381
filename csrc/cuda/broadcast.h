// SPDX-License-Identifier: Apache-2.0
//
// The gradient of pooled features spread over the pixels they average: one write of the latents, nothing read.
#pragma once

#include "long_rows.h"

namespace codmd::cuda {

// d(loss)/d(x) of the pixels of a unit: frame_grad[b, f, k] and batch_grad[b, k] over the region's area.
struct FeatureGradient {
  const float *frame_grad, *batch_grad;  // null: nothing
  Scale frame_scale, batch_scale;
  FrameMask mask;

  CODMD_DEVICE float at(const Cut& cut, const Unit& unit) const {
    if (!mask.valid(unit.b, unit.f)) return 0.0f;
    const int64_t features = cut.features();
    float value = 0.0f;
    if (frame_grad)
      value += frame_scale() * frame_grad[(unit.b * cut.shape.frames + unit.f) * features + unit.k];
    if (batch_grad) {
      const float share = batch_scale() / float(mask.count(unit.b, cut.shape.frames));
      value += share * batch_grad[unit.b * features + unit.k];
    }
    return value / float(unit.area());
  }
};

template <class T>
struct BroadcastPass {
  static constexpr const char* kName = "broadcast_pass";
  static constexpr int kBlocksPerMultiprocessor = 4;

  Cut cut;
  Tensor out;
  FeatureGradient gradient;

  CODMD_DEVICE void operator()(Block& block) const {
    const Unit unit = cut.at(block.index(), kVector<T>);
    const float value = gradient.at(cut, unit);
    T* to = static_cast<T*>(const_cast<void*>(out.data)) + out.offset(unit.b, unit.f, unit.c, unit.y, unit.x);
    block.each([&](int t) {
      each_chunk<T>(cut, unit, out, t, [&](int64_t row, int64_t column, auto count) {
        float values[decltype(count)::value];
CODMD_UNROLL
        for (float& v : values) v = value;
        store<T>(to + row * out.stride[3] + column * out.stride[4], values, count);
      });
    });
  }
};

}  // namespace codmd::cuda
