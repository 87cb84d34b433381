// SPDX-License-Identifier: Apache-2.0
//
// Loops that a compiler vectorises by itself; included by one file per instruction set. Internal linkage throughout.
#include <cmath>

#include "half.h"

namespace {

using codmd::DmdRun;
using codmd::DmdSums;

void guide(float* f, float* c, const float* f_uncond, const float* c_uncond, float fake_scale, float real_scale,
           int64_t n) {
  if (f_uncond && c_uncond) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const float change = real_scale * (c[k] - c_uncond[k]);
      f[k] = (f[k] - c[k]) + fake_scale * (f[k] - f_uncond[k]) - change;
      c[k] += change;
    }
  } else if (c_uncond) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const float change = real_scale * (c[k] - c_uncond[k]);
      f[k] = (f[k] - c[k]) - change;
      c[k] += change;
    }
  } else if (f_uncond) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) f[k] = (f[k] - c[k]) + fake_scale * (f[k] - f_uncond[k]);
  } else {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) f[k] -= c[k];
  }
}

void from_flow(float* d, float* r, const float* noisy, float sigma, int64_t n) {
  if (noisy) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      d[k] *= -sigma;
      r[k] = noisy[k] - sigma * r[k];
    }
  } else {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) d[k] *= -sigma;
  }
}

template <bool kMasked, bool kHuber>
DmdSums moments_of(const float* x, const float* r, const float* d, const uint8_t* mask, int64_t n, float huber_c) {
  float distance = 0, penalty = 0, magnitude = 0, student = 0, real = 0, difference = 0, wild = 0;
  int32_t selected = 0, nans = 0;
  const float square_c = huber_c * huber_c;
#pragma omp simd reduction(+ : distance, penalty, magnitude, student, real, difference, wild, selected, nans)
  for (int64_t k = 0; k < n; ++k) {
    const float xv = x[k], rv = r[k], dv = d[k];
    distance += std::fabs(xv - rv);
    student += xv;
    real += rv;
    difference += dv;
    const int32_t in = kMasked ? int32_t(mask[k] != 0) : 1;
    const int32_t bad = dv != dv ? in : 0;
    const float counted = in > bad ? dv : 0.0f;
    float square = counted * counted;
    if (kHuber) square /= std::sqrt(square + square_c) + huber_c;
    penalty += square;
    magnitude += std::fabs(counted);
    wild += in ? xv - xv : 0.0f;
    nans += bad;
    if (kMasked) selected += in;
  }
  return {distance, penalty, magnitude, student, real, difference, wild, kMasked ? int64_t(selected) : n, nans};
}

DmdSums moments(const float* x, const float* r, const float* d, const uint8_t* mask, int64_t n, float huber_c) {
  if (huber_c > 0) return (mask ? moments_of<true, true> : moments_of<false, true>)(x, r, d, mask, n, huber_c);
  return (mask ? moments_of<true, false> : moments_of<false, false>)(x, r, d, mask, n, huber_c);
}

template <bool kMasked, bool kHuber, bool kToNum, bool kDivide>
void gradient_of(const float* d, const uint8_t* mask, int64_t n, float norm, float factor, float base, float huber_c,
                 float* out) {
  const float inverse = 1.0f / norm;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    float g = d[k];
    if (kHuber) g = codmd::huber_slope(g, huber_c);
    g = kDivide ? g / norm : g * inverse;
    if (kToNum) g = codmd::to_number(g);
    const float step = factor * g;
    out[k] = base + (kMasked && mask[k] == 0 ? 0.0f : step);
  }
}

template <bool kMasked, bool kHuber, bool kToNum>
void divided_gradient(const float* d, const uint8_t* mask, int64_t n, float norm, float factor, float base,
                      float huber_c, float* out) {
  (codmd::has_normal_inverse(norm) ? gradient_of<kMasked, kHuber, kToNum, false> : gradient_of<kMasked, kHuber, kToNum, true>)(
      d, mask, n, norm, factor, base, huber_c, out);
}

void gradient(const float* d, const uint8_t* mask, int64_t n, float norm, float factor, float base, float huber_c,
              bool to_num, float* out) {
  if (huber_c > 0) {
    (mask ? divided_gradient<true, true, false> : divided_gradient<false, true, false>)(d, mask, n, norm, factor,
                                                                                        base, huber_c, out);
  } else if (to_num) {
    (mask ? divided_gradient<true, false, true> : divided_gradient<false, false, true>)(d, mask, n, norm, factor,
                                                                                        base, huber_c, out);
  } else {
    (mask ? divided_gradient<true, false, false> : divided_gradient<false, false, false>)(d, mask, n, norm, factor,
                                                                                          base, huber_c, out);
  }
}

float distance(const float* x, const float* r, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += std::fabs(x[k] - r[k]);
  return sum;
}

template <bool kToNum, bool kDivide>
float decouple_of(float* d, const float* c, const float* u, float scale, codmd::NormPair norms, int64_t n) {
  const float first = 1.0f / norms.matching, second = 1.0f / norms.augmentation;
  float odd = 0;
#pragma omp simd reduction(+ : odd)
  for (int64_t k = 0; k < n; ++k) {
    const float dv = d[k], av = scale * (u[k] - c[k]);
    odd += (dv - dv) + (av - av);
    float g = kDivide ? dv / norms.matching : dv * first;
    float a = kDivide ? av / norms.augmentation : av * second;
    if (kToNum) {
      g = codmd::to_number(g);
      a = codmd::to_number(a);
    }
    d[k] = g + a;
  }
  return odd;
}

float decouple(float* d, const float* c, const float* u, float scale, codmd::NormPair norms, bool to_num, int64_t n) {
  if (codmd::has_normal_inverse(norms.matching) && codmd::has_normal_inverse(norms.augmentation))
    return (to_num ? decouple_of<true, false> : decouple_of<false, false>)(d, c, u, scale, norms, n);
  return (to_num ? decouple_of<true, true> : decouple_of<false, true>)(d, c, u, scale, norms, n);
}

template <class T, bool kGuided, bool kFlow>
DmdSums run_moments_of(const DmdRun& run, int64_t n) {
  const T *x = static_cast<const T*>(run.student), *f = static_cast<const T*>(run.fake);
  const T *c = static_cast<const T*>(run.real), *u = static_cast<const T*>(run.real_uncond);
  const T* noisy = static_cast<const T*>(run.noisy);
  const float scale = run.real_scale, sigma = run.sigma;
  float distance = 0, penalty = 0, magnitude = 0, student = 0, real = 0, difference = 0, wild = 0;
  int32_t nans = 0;
#pragma omp simd reduction(+ : distance, penalty, magnitude, student, real, difference, wild, nans)
  for (int64_t k = 0; k < n; ++k) {
    const float xv = to_float(x[k]);
    float rv = to_float(c[k]), dv = to_float(f[k]) - rv;
    if (kGuided) {
      const float change = scale * (rv - to_float(u[k]));
      dv -= change;
      rv += change;
    }
    if (kFlow) {
      dv *= -sigma;
      rv = to_float(noisy[k]) - sigma * rv;
    }
    distance += std::fabs(xv - rv);
    student += xv;
    real += rv;
    difference += dv;
    wild += xv - xv;
    const int32_t bad = dv != dv;
    const float counted = bad ? 0.0f : dv;
    penalty += counted * counted;
    magnitude += std::fabs(counted);
    nans += bad;
  }
  return {distance, penalty, magnitude, student, real, difference, wild, n, nans};
}

template <class T>
DmdSums run_moments(const DmdRun& run, int64_t n) {
  if (run.noisy) return (run.real_uncond ? run_moments_of<T, true, true> : run_moments_of<T, false, true>)(run, n);
  return (run.real_uncond ? run_moments_of<T, true, false> : run_moments_of<T, false, false>)(run, n);
}

template <class T, bool kGuided, bool kToNum>
void run_gradient_of(const DmdRun& run, int64_t n, float inverse_norm, float factor, float base, void* out) {
  const T *f = static_cast<const T*>(run.fake), *c = static_cast<const T*>(run.real);
  const T* u = static_cast<const T*>(run.real_uncond);
  T* target = static_cast<T*>(out);
  const float scale = run.real_scale, sign = run.sigma < 0 ? 1.0f : -run.sigma;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const float cv = to_float(c[k]);
    float g = to_float(f[k]) - cv;
    if (kGuided) g -= scale * (cv - to_float(u[k]));
    g = g * sign * inverse_norm;
    if (kToNum) g = codmd::to_number(g);
    from_float(base + factor * g, target[k]);
  }
}

template <class T>
void run_gradient(const DmdRun& run, int64_t n, float inverse_norm, float factor, float base, bool to_num, void* out) {
  if (to_num)
    (run.real_uncond ? run_gradient_of<T, true, true> : run_gradient_of<T, false, true>)(run, n, inverse_norm, factor,
                                                                                         base, out);
  else
    (run.real_uncond ? run_gradient_of<T, true, false> : run_gradient_of<T, false, false>)(run, n, inverse_norm,
                                                                                           factor, base, out);
}

}  // namespace

#define CODMD_DMD_LOOPS                                                                       \
  {                                                                                           \
    guide, from_flow, moments, gradient, distance, decouple,                                  \
        {run_moments<float>, run_moments<bf16>}, {run_gradient<float>, run_gradient<bf16>}    \
  }
