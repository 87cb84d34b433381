// SPDX-License-Identifier: Apache-2.0
//
// AVX-512 F, BW, DQ, VL (x86-64-v4). Compiled with flags of its own; dispatch.cpp asks the processor first.
#include <immintrin.h>

#include "half.h"
#include "passes.h"

namespace {

struct V {
  static constexpr int kWidth = 16;
  static constexpr int kTile = 4;
  using Float = __m512;
  struct Sum {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  };

  static Float widen(bf16, __m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Float widen(f16, __m256i bits) { return _mm512_cvtph_ps(bits); }

  static Float zero() { return _mm512_setzero_ps(); }
  static Float set1(float value) { return _mm512_set1_ps(value); }
  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  template <class Half>
  static Float load(const Half* from) {
    return widen(Half{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  // 2 kWidth elements in an order of its own, the same for every latent.
  template <class T>
  static void load_two(const T* from, Float& first, Float& second) {
    first = load(from);
    second = load(from + kWidth);
  }
  static void load_two(const bf16* from, Float& even, Float& odd) {
    const __m512i pairs = _mm512_loadu_si512(from);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
  }
  static Float load_tail(const float* from, int64_t n, bool) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), from);
  }
  template <class Half>
  static Float load_tail(const Half* from, int64_t n, bool) {
    return widen(Half{}, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), from));
  }
  static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static void store(bf16* to, Float value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
  }
  static void store(f16* to, Float value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  // a + b, bit for bit, where the processor multiplies.
  static Float multiplier_add(Float a, Float b) { return _mm512_fmadd_ps(a, set1(1.0f), b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static void add_to(Sum& sum, Float value) {
    sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(value)));
    sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1)));
  }
  // W elements, converted as they are loaded.
  static void add_to(Sum& sum, const float* from) {
    sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm256_loadu_ps(from)));
    sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm256_loadu_ps(from + kWidth / 2)));
  }
  static double total(const Sum& sum) { return _mm512_reduce_add_pd(_mm512_add_pd(sum.low, sum.high)); }
  static float total(Float value) { return _mm512_reduce_add_ps(value); }
};

}  // namespace

#include "passes.inl"

namespace codmd {
extern const Passes passes_avx512 = CODMD_PASSES("avx512");
}
