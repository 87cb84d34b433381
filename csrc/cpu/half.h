// SPDX-License-Identifier: Apache-2.0
//
// bfloat16 and float16 in plain integer arithmetic. Internal linkage throughout: every instruction set compiles
// its own copy, so the linker can never hand AVX-512 code to a processor without it.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float to_float(float value) { return value; }
static inline float to_float(bf16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

// Free of branches, so that loops over it vectorise. A subnormal's bits are put under the exponent of 2^-14, whose
// value is then taken off: exact, and independent of how the processor treats float32 subnormals.
static inline float to_float(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t normal = magnitude + 0x38000000u, special = magnitude | 0x7f800000u;
  const uint32_t subnormal = bits_of(float_from_bits(magnitude + 0x38800000u) - 6.103515625e-5f);
  const uint32_t finite = magnitude < 0x00800000u ? subnormal : normal;
  return float_from_bits(sign | (magnitude >= 0x0f800000u ? special : finite));
}

static inline void from_float(float value, float& out) { out = value; }

// Round to nearest, ties to even; a NaN stays one.
static inline void from_float(float value, bf16& out) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = nan ? uint16_t(0x7fc0u) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void from_float(float value, f16& out) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) {
    out.bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    out.bits = sign | 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // a normal float16
    out.bits = sign | uint16_t((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
  } else {  // the addition aligns the value to 2^-24 and rounds it
    out.bits = sign | uint16_t(bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f));
  }
}

}  // namespace
