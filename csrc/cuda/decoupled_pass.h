// SPDX-License-Identifier: Apache-2.0
//
// The direction of a decoupled loss, g = repaired(d / matching) + repaired(a / augmentation) with d = f - c (guided by
// the critic) and a = k (u2 - c2) of a second noise level (arXiv 2511.22677), and its moments. Both norms are known
// before: DmdPass finds the distances of either level.
#pragma once

#include "dmd_pass.h"

namespace codmd::cuda {

// The teacher's predictions at the second level; null data where the loss is not decoupled.
struct Augmentation {
  Tensor real, uncond;
};

// The five predictions of one unit, and its two norms.
template <class T>
struct DecoupledViews {
  PredictionViews<T> matching;
  View<T> real, uncond;
  Direction first, second;

  CODMD_DEVICE DecoupledViews(const Predictions& p, const Augmentation& augmentation, const Unit& unit,
                              const DmdRule& rule, const NormPair& norms)
      : matching(p, unit),
        real(augmentation.real, unit),
        uncond(augmentation.uncond, unit),
        first(rule, norms.matching),
        second(rule, norms.augmentation) {}

  // d and a of N pixels.
  template <int N>
  CODMD_DEVICE void read_halves(int64_t row, int64_t column, float (&d)[N], float (&a)[N], Count<N> count) const {
    float r[N];
    matching.read(row, column, d, r, false, count);
    uncond.read(row, column, a, count);
    real.read(row, column, r, count);
CODMD_UNROLL
    for (int i = 0; i < N; ++i) a[i] = matching.real_scale * (a[i] - r[i]);
  }

  CODMD_DEVICE float direction(float d, float a) const { return first(d) + second(a); }
};

// The sums of g^2 and |g| of a unit in place of those of d. A NaN of d is none of g's; what poisons the loss adds up.
template <class T>
struct DecoupledPass {
  static constexpr const char* kName = "decoupled_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  Cut cut;
  Predictions predictions;
  Augmentation augmentation;
  Selection selection;
  DmdRule rule;
  const float* norms;    // of the first level, then of the second
  UnitMoments* moments;  // [units], of a DmdPass over the same cut

  struct Sums {
    Values<double, 2> moments;   // g^2, |g|
    Values<uint32_t, 2> counts;  // g NaN, wild
  };

  CODMD_DEVICE void operator()(Block& block) const {
    const Unit unit = cut.at(block.index(), kVector<T>);
    const float* norm = norms + rule.norm_of(unit.b, unit.f, cut.shape.frames);
    const NormPair pair{norm[0], norm[rule.norms(cut.shape)]};
    PerThread<Values<double, 2>> sums;
    PerThread<Values<uint32_t, 2>> counts;
    block.each([&](int t) {
      Sums own{};
      add(unit, t, pair, own);
      sums[t] = own.moments;
      counts[t] = own.counts;
    });
    const PerThread<double> total = block_sum(block, sums);
    const PerThread<uint32_t> elements = block_sum(block, counts);
    UnitMoments& out = moments[block.index()];
    block.each([&](int t) {
      if (t < 2) out.sums[1 + t] = total[t];
      if (t == 0) out.counts[1] = elements[t];
      if (t == 1) out.counts[2] += elements[t];
    });
  }

  // Float32 within a chunk, double from chunk to chunk.
  CODMD_DEVICE void add(const Unit& unit, int thread, const NormPair& norms, Sums& sums) const {
    const DecoupledViews<T> views(predictions, augmentation, unit, rule, norms);
    const uint8_t* selected = selection.start(unit);
    each_chunk<T>(cut, unit, predictions.real, thread, [&](int64_t row, int64_t column, auto count) {
      constexpr int n = decltype(count)::value;
      float d[n], a[n];
      views.read_halves(row, column, d, a, count);
      float odd = 0.0f;
CODMD_UNROLL
      for (int i = 0; i < n; ++i) {
        const bool in = selection.at(selected, row, column + i);
        if (in) odd += (d[i] - d[i]) + (a[i] - a[i]);
        const float g = in ? views.direction(d[i], a[i]) : 0.0f;
        d[i] = g * g;
        a[i] = fabsf(g);
      }
      const float penalty = sum_of<n>(d), magnitude = sum_of<n>(a);
      if (odd != 0.0f || !in_range(0.0f, penalty, magnitude))
        return add_exact(views, selected, norms, row, column, n, sums);
      sums.moments.at[0] += double(penalty);
      sums.moments.at[1] += double(magnitude);
    });
  }

  CODMD_DEVICE void add_exact(const DecoupledViews<T>& views, const uint8_t* selected, const NormPair& norms,
                              int64_t row, int64_t column, int n, Sums& sums) const {
    Moments own{};
CODMD_ROLLED
    for (int i = 0; i < n; ++i) {
      if (!selection.at(selected, row, column + i)) continue;
      const Element at = views.matching.at(views.uncond, row, column + i);
      float real[1];
      views.real.read(row, column + i, real, Count<1>{});
      double d = at.fake - at.real;
      if (views.matching.fake_uncond.data) d += double(views.matching.fake_scale) * (at.fake - at.fake_uncond);
      // What `at` calls the student is the second level's unconditional prediction.
      own.add_decoupled(rule, d, double(views.matching.real_scale) * (at.student - double(real[0])), norms);
    }
    sums.moments.at[0] += own.penalty;
    sums.moments.at[1] += own.magnitude;
    sums.counts.at[0] += uint32_t(own.nans);
    sums.counts.at[1] += uint32_t(own.wild);
  }
};

}  // namespace codmd::cuda
