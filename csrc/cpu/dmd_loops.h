// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic of the DMD passes on chunks of float32 that lie in the first-level cache, one table of loops per
// instruction set. Every table is compiled from dmd_loops.inl.
#pragma once

#include <cstdint>

#include "../dmd.h"

namespace codmd {

constexpr int64_t kDmdChunk = 512;

// Sums over one chunk. All but distance and the features' over the selected elements; penalty and magnitude of d where
// it is a number; wild is NaN once a student is not finite.
struct DmdSums {
  float distance, penalty, magnitude, student, real, difference, wild;
  int64_t selected, nans;
};

// Runs of neighbouring pixels, read where they lie: float32 or bfloat16, one guidance, everything selected.
struct DmdRun {
  const void *student, *fake, *real, *real_uncond, *noisy;  // real_uncond, noisy: null when absent
  float real_scale, sigma;                                  // sigma < 0 without noisy
};

struct DmdLoops {
  // f := (f - c) + fake_scale (f - f_uncond) - real_scale (c - c_uncond); c := c + real_scale (c - c_uncond).
  void (*guide)(float* f, float* c, const float* f_uncond, const float* c_uncond, float fake_scale, float real_scale,
                int64_t n);
  // d := -sigma d; r := noisy - sigma r, unless noisy is null.
  void (*from_flow)(float* d, float* r, const float* noisy, float sigma, int64_t n);
  // n <= kDmdChunk. A null mask selects everything.
  DmdSums (*moments)(const float* x, const float* r, const float* d, const uint8_t* mask, int64_t n, float huber_c);
  // out = base + factor * G(d, norm) where selected, base elsewhere.
  void (*gradient)(const float* d, const uint8_t* mask, int64_t n, float norm, float factor, float base,
                   float huber_c, bool to_num, float* out);

  // The sum of |x - r|.
  float (*distance)(const float* x, const float* r, int64_t n);
  // d := g of a decoupled loss, with a = scale (u - c) of the second level. NaN where a d or an a is not finite, else 0.
  float (*decouple)(float* d, const float* c, const float* u, float scale, codmd::NormPair norms, bool to_num,
                    int64_t n);

  // moments and gradient in one loop over the latents themselves. Index: DType (no float16).
  DmdSums (*run_moments[2])(const DmdRun& run, int64_t n);
  void (*run_gradient[2])(const DmdRun& run, int64_t n, float inverse_norm, float factor, float base, bool to_num,
                          void* out);
};

extern const DmdLoops dmd_loops_baseline;
#if defined(CODMD_X86)
extern const DmdLoops dmd_loops_avx2;
extern const DmdLoops dmd_loops_avx512;
#endif

// The table for the instruction set of passes().
const DmdLoops& dmd_loops();

}  // namespace codmd
