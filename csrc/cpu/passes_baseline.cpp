// SPDX-License-Identifier: Apache-2.0
//
// Every processor, in the compiler's default target (SSE2 on x86-64, NEON on AArch64): vector extensions where the
// compiler has them, plain loops otherwise.
#include "half.h"
#include "passes.h"

namespace {

constexpr int kFour = 4;

#if defined(__GNUC__)

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

inline Floats widen(bf16, Words bits) { return Floats(bits << 16); }
inline Floats widen(f16, Words bits) {  // to_float(f16), four at a time
  const Words sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const Words subnormal = Words(Floats(magnitude + 0x38800000u) - 6.103515625e-5f);
  const Words finite = magnitude < 0x00800000u ? subnormal : magnitude + 0x38000000u;
  return Floats(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

inline Floats load_four(const float* from) {
  Floats out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
template <class Half>
inline Floats load_four(const Half* from) {
  return widen(Half{}, Words{from[0].bits, from[1].bits, from[2].bits, from[3].bits});
}
// Eight elements, in an order of its own.
inline void load_eight(const float* from, Floats& first, Floats& second) {
  first = load_four(from);
  second = load_four(from + kFour);
}
template <class Half>
inline void load_eight(const Half* from, Floats& first, Floats& second) {
  Words pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  first = widen(Half{}, pairs & 0xffffu);
  second = widen(Half{}, pairs >> 16);
}

#else

struct Floats {
  float lane[kFour];
  float& operator[](int k) { return lane[k]; }
  float operator[](int k) const { return lane[k]; }
};

inline Floats operator+(Floats a, Floats b) {
  for (int k = 0; k < kFour; ++k) a[k] += b[k];
  return a;
}
inline Floats operator-(Floats a, Floats b) {
  for (int k = 0; k < kFour; ++k) a[k] -= b[k];
  return a;
}
inline Floats operator*(Floats a, Floats b) {
  for (int k = 0; k < kFour; ++k) a[k] *= b[k];
  return a;
}
template <class T>
inline Floats load_four(const T* from) {
  return {to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
}
template <class T>
inline void load_eight(const T* from, Floats& first, Floats& second) {
  first = load_four(from);
  second = load_four(from + kFour);
}

#endif

struct V {
  static constexpr int kWidth = kFour;
  static constexpr int kTile = 3;
  using Float = Floats;
  struct Sum {
    double lane[kWidth] = {};
  };

  static Float set1(float value) { return Float{value, value, value, value}; }
  static Float zero() { return set1(0.0f); }
  template <class T>
  static Float load(const T* from) {
    return load_four(from);
  }
  template <class T>
  static void load_two(const T* from, Float& first, Float& second) {
    load_eight(from, first, second);
  }
  template <class T>
  static Float load_tail(const T* from, int64_t n, bool) {
    T padded[kWidth] = {};
    for (int64_t k = 0; k < n; ++k) padded[k] = from[k];
    return load(padded);
  }
  template <class T>
  static void store(T* to, Float value) {
    for (int k = 0; k < kWidth; ++k) from_float(value[k], to[k]);
  }
  static Float add(Float a, Float b) { return a + b; }
  static Float multiplier_add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float fma(Float a, Float b, Float c) { return c + a * b; }
  static void add_to(Sum& sum, Float value) {
    for (int k = 0; k < kWidth; ++k) sum.lane[k] += double(value[k]);
  }
  static void add_to(Sum& sum, const float* from) { add_to(sum, load(from)); }
  static double total(const Sum& sum) { return (sum.lane[0] + sum.lane[1]) + (sum.lane[2] + sum.lane[3]); }
  static float total(Float value) { return (value[0] + value[1]) + (value[2] + value[3]); }
};

}  // namespace

#include "passes.inl"

namespace codmd {
extern const Passes passes_baseline = CODMD_PASSES("baseline");
}
