// SPDX-License-Identifier: Apache-2.0
//
// Plain C++: every processor, vectorised as far as the compiler's default target allows.
#include "half.h"
#include "passes.h"

namespace {

struct V {
  static constexpr int kWidth = 8;
  static constexpr int kTile = 2;
  struct Float {
    float lane[kWidth];
  };
  struct Sum {
    double lane[kWidth];
  };

  static Float set1(float value) {
    Float out;
    for (int k = 0; k < kWidth; ++k) out.lane[k] = value;
    return out;
  }
  static Float zero() { return set1(0.0f); }
  template <class T>
  static Float load(const T* from) {
    Float out;
    for (int k = 0; k < kWidth; ++k) out.lane[k] = to_float(from[k]);
    return out;
  }
  template <class T>
  static void load_two(const T* from, Float& first, Float& second) {
    first = load(from);
    second = load(from + kWidth);
  }
  template <class T>
  static Float load_first(const T* from, int64_t n) {
    Float out = zero();
    for (int64_t k = 0; k < n; ++k) out.lane[k] = to_float(from[k]);
    return out;
  }
  template <class T>
  static void store(T* to, const Float& value) {
    for (int k = 0; k < kWidth; ++k) from_float(value.lane[k], to[k]);
  }
  static Float add(Float a, const Float& b) {
    for (int k = 0; k < kWidth; ++k) a.lane[k] += b.lane[k];
    return a;
  }
  static Float sub(Float a, const Float& b) {
    for (int k = 0; k < kWidth; ++k) a.lane[k] -= b.lane[k];
    return a;
  }
  static Float mul(Float a, const Float& b) {
    for (int k = 0; k < kWidth; ++k) a.lane[k] *= b.lane[k];
    return a;
  }
  static Float fma(const Float& a, const Float& b, Float c) {
    for (int k = 0; k < kWidth; ++k) c.lane[k] += a.lane[k] * b.lane[k];
    return c;
  }
  static void add_to(Sum& sum, const Float& value) {
    for (int k = 0; k < kWidth; ++k) sum.lane[k] += double(value.lane[k]);
  }
  static double total(const Sum& sum) {
    double out = 0;
    for (int k = 0; k < kWidth; ++k) out += sum.lane[k];
    return out;
  }
  static float total(const Float& value) {
    float out = 0;
    for (int k = 0; k < kWidth; ++k) out += value.lane[k];
    return out;
  }
};

}  // namespace

#include "passes.inl"

namespace codmd {
extern const Passes passes_baseline = CODMD_PASSES("baseline");
}
