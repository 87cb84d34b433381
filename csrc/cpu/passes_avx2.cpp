// SPDX-License-Identifier: Apache-2.0
//
// AVX2, FMA and F16C (x86-64-v3). Compiled with flags of its own; dispatch.cpp asks the processor first.
#include <immintrin.h>

#include "half.h"
#include "passes.h"

namespace {

struct V {
  static constexpr int kWidth = 8;
  static constexpr int kTile = 3;  // nine sums, three right rows and one left row fit sixteen registers
  using Float = __m256;
  struct Sum {
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  };

  static Float zero() { return _mm256_setzero_ps(); }
  static Float set1(float value) { return _mm256_set1_ps(value); }
  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static Float load(const bf16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Float load(const f16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  // 2 kWidth elements in an order of its own, the same for every latent.
  template <class T>
  static void load_two(const T* from, Float& first, Float& second) {
    first = load(from);
    second = load(from + kWidth);
  }
  static void load_two(const bf16* from, Float& even, Float& odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))));
  }
  // The first n elements and zeros, in an order of its own; with `room`, kWidth - n elements lie before `from`.
  template <class T>
  static Float load_tail(const T* from, int64_t n, bool room) {
    if (room) {
      alignas(32) static const int32_t kept[2 * kWidth] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
      const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kept + n));
      return _mm256_and_ps(load(from + n - kWidth), _mm256_castsi256_ps(mask));
    }
    T padded[kWidth] = {};
    std::memcpy(padded, from, size_t(n) * sizeof(T));
    return load(padded);
  }
  static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
  static void store(bf16* to, Float value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }
  static void store(f16* to, Float value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  // a + b, bit for bit, where the processor multiplies.
  static Float multiplier_add(Float a, Float b) { return _mm256_fmadd_ps(a, set1(1.0f), b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static void add_to(Sum& sum, Float value) {
    sum.low = _mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm256_castps256_ps128(value)));
    sum.high = _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)));
  }
  // W elements, converted as they are loaded.
  static void add_to(Sum& sum, const float* from) {
    sum.low = _mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm_loadu_ps(from)));
    sum.high = _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm_loadu_ps(from + kWidth / 2)));
  }
  static double total(const Sum& sum) {
    const __m256d four = _mm256_add_pd(sum.low, sum.high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
  static float total(Float value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

}  // namespace

#include "passes.inl"

namespace codmd {
extern const Passes passes_avx2 = CODMD_PASSES("avx2");
}
