// SPDX-License-Identifier: Apache-2.0
//
// float32, bfloat16 and float16 in memory, float32 in registers: one element or 16 bytes of them at a time.
#pragma once

#include <cstdint>

#include "block.h"

#if !defined(__CUDACC__)
#include "../cpu/half.h"
#endif

namespace codmd::cuda {

#if defined(__CUDACC__)

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

CODMD_DEVICE float to_float(float value) { return value; }
CODMD_DEVICE float to_float(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
CODMD_DEVICE float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

CODMD_DEVICE void from_float(float value, float& out) { out = value; }
CODMD_DEVICE void from_float(float value, bf16& out) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = __float_as_uint(value), even = bits >> 16 & 1;
  out.bits = value != value ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + even) >> 16);
#endif
}
CODMD_DEVICE void from_float(float value, f16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value)); }

#endif

// Elements in one 16-byte access.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <int N>
struct Count {
  static constexpr int value = N;
};

template <class T>
struct alignas(16) Vector {
  T at[kVector<T>];
};

// `out` = N elements from `from` on, N = 1 or kVector<T>; the latter needs a 16-byte boundary.
template <class T, int N>
CODMD_DEVICE void load(const T* from, float (&out)[N], Count<N>) {
  if constexpr (N == 1) {
    out[0] = to_float(*from);
  } else {
#if defined(__CUDACC__)
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    Vector<T> vector;
    *reinterpret_cast<uint4*>(&vector) = raw;
#else
    if (reinterpret_cast<uintptr_t>(from) % 16) __builtin_trap();
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from);
#endif
CODMD_UNROLL
    for (int n = 0; n < N; ++n) out[n] = to_float(vector.at[n]);
  }
}

template <class T, int N>
CODMD_DEVICE void store(T* to, const float (&values)[N], Count<N>) {
  if constexpr (N == 1) {
    from_float(values[0], *to);
  } else {
    Vector<T> vector;
CODMD_UNROLL
    for (int n = 0; n < N; ++n) from_float(values[n], vector.at[n]);
#if defined(__CUDACC__)
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&vector);
#else
    if (reinterpret_cast<uintptr_t>(to) % 16) __builtin_trap();
    *reinterpret_cast<Vector<T>*>(to) = vector;
#endif
  }
}

// Pairwise, so that the error grows with the logarithm of N.
template <int N>
CODMD_DEVICE float sum_of(const float* values) {
  if constexpr (N == 1)
    return values[0];
  else
    return sum_of<N / 2>(values) + sum_of<N - N / 2>(values + N / 2);
}

}  // namespace codmd::cuda
