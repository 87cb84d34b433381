// SPDX-License-Identifier: Apache-2.0
//
// The gradient of the distribution matching loss and of pooled features, spread over the pixels that they average: one
// write of the latents, rounded once.
#pragma once

#include "decoupled_pass.h"

namespace codmd::cuda {

// d(loss)/d(x) of the pixels of a unit: frame_grad[b, f, k] and batch_grad[b, k] over the region's area.
struct FeatureGradient {
  const float *frame_grad, *batch_grad;  // null: nothing
  Scale<float> frame_scale, batch_scale;
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

// What moves a pixel beside the relation: nothing, d / norm, or the two quotients of a decoupled loss.
enum class Moved { none, plain, decoupled };

// upstream * factor * G plus the relation's share. Reads neither student nor noisy; without the DMD term, no latents.
template <class T, Moved kMoved>
struct GradientPass {
  static constexpr const char* kName = "gradient_pass";
  static constexpr bool kDmd = kMoved != Moved::none;
  static constexpr int kBlocksPerMultiprocessor = kDmd ? 2 : 4;

  Cut cut;
  Predictions predictions;
  Augmentation augmentation;
  Selection selection;
  DmdRule rule;
  const float *norms, *factors;
  Scale<float> upstream;
  FeatureGradient relation;
  Tensor out;

  CODMD_DEVICE void operator()(Block& block) const {
    const Unit unit = cut.at(block.index(), kVector<T>);
    const float share = relation.at(cut, unit);
    float own = 0.0f, factor = 0.0f;
    NormPair norm{1.0f, 1.0f};
    if constexpr (kDmd) {
      own = factors[unit.b];
      if (own != 0.0f) factor = upstream() * own;
      const float* at = norms + rule.norm_of(unit.b, unit.f, cut.shape.frames);
      norm.matching = at[0];
      if constexpr (kMoved == Moved::decoupled) norm.augmentation = at[rule.norms(cut.shape)];
    }
    const bool active = own != 0.0f;
    const DecoupledViews<T> views(predictions, augmentation, unit, rule, norm);
    const uint8_t* selected = selection.start(unit);
    T* to = static_cast<T*>(const_cast<void*>(out.data)) + out.offset(unit.b, unit.f, unit.c, unit.y, unit.x);
    block.each([&](int t) {
      each_chunk<T>(cut, unit, out, t, [&](int64_t row, int64_t column, auto count) {
        constexpr int n = decltype(count)::value;
        float d[n], r[n];
        if constexpr (kMoved == Moved::plain) {
          if (active) views.matching.read(row, column, d, r, false, count);
        } else if constexpr (kMoved == Moved::decoupled) {
          if (active) views.read_halves(row, column, d, r, count);
        }
CODMD_UNROLL
        for (int i = 0; i < n; ++i) {
          const bool moved = kDmd && active && selection.at(selected, row, column + i);
          if constexpr (kMoved == Moved::decoupled)
            d[i] = moved ? factor * views.direction(d[i], r[i]) + share : share;
          else
            d[i] = moved ? factor * views.first(d[i]) + share : share;
        }
        store<T>(to + row * out.stride[3] + column * out.stride[4], d, count);
      });
    });
  }
};

}  // namespace codmd::cuda
