// SPDX-License-Identifier: Apache-2.0
//
// One read of student, real and fake: the features of x, r and d = f - r, a block to each unit of a Cut.
#pragma once

#include "feature_row.h"

namespace codmd::cuda {

template <class T>
struct RelationPass {
  static constexpr const char* kName = "relation_pass";
  static constexpr int kBlocksPerMultiprocessor = 4;

  Cut cut;
  Tensor student, real, fake;
  FrameMask mask;
  float* partial;  // [splits, B, F, 3K + 1]

  CODMD_DEVICE void operator()(Block& block) const {
    const Unit unit = cut.at(block.index(), kVector<T>);
    const bool valid = mask.valid(unit.b, unit.f);
    PerThread<Values<float, 3>> sums;
    block.each([&](int t) {
      sums[t] = {};
      if (valid) add(unit, t, sums[t]);
    });
    const PerThread<float> total = block_sum(block, sums);
    const FeatureRow row(cut, unit, block.index(), partial);
    block.each([&](int t) {
      if (t < 3) row.write(t, total[t]);
      if (t == 3) row.write_count(valid);
    });
  }

  CODMD_DEVICE void add(const Unit& unit, int thread, Values<float, 3>& sums) const {
    const View<T> x(student, unit), r(real, unit), f(fake, unit);
    each_chunk<T>(cut, unit, student, thread, [&](int64_t row, int64_t column, auto count) {
      constexpr int n = decltype(count)::value;
      float a[n], b[n], c[n];
      x.read(row, column, a, count);
      r.read(row, column, b, count);
      f.read(row, column, c, count);
CODMD_UNROLL
      for (int i = 0; i < n; ++i) c[i] = difference_of(b[i], c[i]);
      sums.at[0] += sum_of<n>(a);
      sums.at[1] += sum_of<n>(b);
      sums.at[2] += sum_of<n>(c);
    });
  }
};

}  // namespace codmd::cuda
