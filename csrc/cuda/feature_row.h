// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensors.h"

namespace codmd::cuda {

// Where a unit's part of its frame's row goes: the tables of all splits [splits, B, F, 3K + 1] add up to the means.
struct FeatureRow {
  float* row;
  int64_t features, k, split;
  float area;

  CODMD_DEVICE FeatureRow(const Cut& cut, const Unit& unit, int64_t index, float* tables)
      : features(cut.features()), k(unit.k), split(index - quotient(index, cut.splits) * cut.splits),
        area(float(unit.area())) {
    row = tables + ((split * cut.shape.batch + unit.b) * cut.shape.frames + unit.f) * row_pitch(features);
  }
  CODMD_DEVICE void write(int part, float sum) const { row[part * features + k] = sum / area; }
  CODMD_DEVICE void write_count(bool valid) const {
    if (k == 0) row[3 * features] = valid && split == 0 ? 1.0f : 0.0f;
  }
};

}  // namespace codmd::cuda
