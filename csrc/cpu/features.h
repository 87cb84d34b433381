// SPDX-License-Identifier: Apache-2.0
//
// Pooled features of student, real and fake - real: phi [B, F, K] and their means over frames psi [B, K], in double,
// and the relations among them.
#pragma once

#include <vector>

#include "parallel.h"
#include "relations.h"
#include "valid_rows.h"

namespace codmd {

struct Terms {
  double batch = 0, frame = 0;
};

struct Features {
  Features(const Shape& shape, const FrameMask& mask, const Grid& grid);

  // From phi to gradients, rows and terms, where they are wanted.
  Terms relate(double temperature, int threads, const Found& found);

  const Shape shape;
  const int64_t size;
  const ValidRows valid;
  std::vector<double> x, r, d;

 private:
  void average(const Worker& worker);
  RowProducts of_frames(int64_t b) const;
  RowProducts of_samples() const;

  std::vector<double> psi_[3];
};

}  // namespace codmd
