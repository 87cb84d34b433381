// SPDX-License-Identifier: Apache-2.0
//
// The small algebra of the distribution matching loss, on host and device: from moments of x, r and d = f - r to norms,
// loss and the factor of the gradient, dL/dx = factor G(d, norm). Conventions are those of codmd/conventions.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "types.h"

namespace codmd {

constexpr float kLargestFloat = 3.402823466e38f;
constexpr float kSmallestNormal = 1.175494351e-38f;

enum class NormScope : int { sample = 0, batch = 1, block = 2 };
enum class Guard : int { none = 0, clamp = 1, add = 2 };
enum class NanPolicy : int { to_num = 0, zero_sample = 1, keep = 2 };

template <class T>
CODMD_HD inline bool is_finite(T value) {
  return value - value == T(0);
}

// Of values in double: what float32 would have to call infinite.
CODMD_HD inline bool leaves_float(double value) { return is_finite(value) && std::fabs(value) > double(kLargestFloat); }

// L = coefficient * reduce(penalty(g)), g = repaired((f - r) / norm); Convention.rule in the same order.
struct DmdRule {
  NormScope scope;
  int64_t block;     // frames of a segment, in scope block
  bool first_alone;  // frame 0 is a segment whose norm is 1
  Guard guard;
  double eps;
  NanPolicy nan;
  double huber_c;  // 0: the squared penalty
  double coefficient;
  bool sum;  // over the selected elements, instead of their mean
  bool norm_divides_loss;
  bool weight_on_direction;

  CODMD_HD int64_t segments(int64_t frames) const {
    if (scope != NormScope::block) return 1;
    const int64_t alone = first_alone ? 1 : 0;
    return alone + (frames - alone + block - 1) / block;
  }
  CODMD_HD int64_t segment_of(int64_t frame) const {
    if (scope != NormScope::block) return 0;
    if (!first_alone) return frame / block;
    return frame == 0 ? 0 : 1 + (frame - 1) / block;
  }
  // The norms of a call: [1], [B] or [B, segments].
  CODMD_HD int64_t norms(const Shape& s) const { return scope == NormScope::batch ? 1 : s.batch * segments(s.frames); }
  CODMD_HD int64_t norm_of(int64_t b, int64_t frame, int64_t frames) const {
    return scope == NormScope::batch ? 0 : b * segments(frames) + segment_of(frame);
  }

  template <class T>
  CODMD_HD T penalty(T d) const {
    const T square = d * d, c = T(huber_c);
    return c > T(0) ? square / (std::sqrt(square + c * c) + c) : square;
  }
  // A NaN norm fails the comparison and stays NaN.
  CODMD_HD double guarded(double norm) const {
    if (guard == Guard::clamp) return norm < eps ? eps : norm;
    return guard == Guard::add ? norm + eps : norm;
  }
};

// x0 predictions from what the models said: r = c + k (c - u), d = (f - c) + k_f (f - f_u) - k (c - u), and with sigma
// r = noisy - sigma r, d = -sigma d. Differences come first, so that a critic that tracks the teacher keeps its digits.
struct Guidance {
  bool real, fake, flow;
  double real_scale, fake_scale, sigma;
};

// What one element's models said; absent values are not read.
struct Element {
  double student, real, fake, real_uncond, fake_uncond, noisy;
};

// NaN to 0, infinities to the largest numbers of float32. Internal linkage: files for one instruction set include it.
template <class T>
CODMD_HD static inline T to_number(T g) {
  g = g != g ? T(0) : g;
  g = g > T(kLargestFloat) ? T(kLargestFloat) : g;
  return g < -T(kLargestFloat) ? -T(kLargestFloat) : g;
}

// The two norms of an element under a decoupled loss, g = repaired(d / matching) + repaired(a / augmentation) with
// d = (f - c) + k_f (f - f_u) and a = k (u2 - c2) (arXiv 2511.22677).
struct NormPair {
  float matching, augmentation;
};

// Sums over the elements of a frame, a segment or a sample; all but `distance` over the selected ones.
struct Moments {
  double distance;            // |x - r|
  double penalty, magnitude;  // of d where it is a number
  int64_t selected, nans, wild;  // elements; those with d NaN; those that poison the loss: x not finite, out of range

  CODMD_HD void add(const Moments& other) {
    distance += other.distance;
    penalty += other.penalty;
    magnitude += other.magnitude;
    selected += other.selected;
    nans += other.nans;
    wild += other.wild;
  }

  // One element in double: what float32 sums leave their range over.
  CODMD_HD void add(const DmdRule& rule, const Guidance& guidance, const Element& at, bool counts, double& r,
                    double& d) {
    const double step = guidance.real ? guidance.real_scale * (at.real - at.real_uncond) : 0.0;
    r = at.real + step;
    d = at.fake - at.real;
    if (guidance.fake) d += guidance.fake_scale * (at.fake - at.fake_uncond);
    d -= step;
    if (guidance.flow) {
      d *= -guidance.sigma;
      r = at.noisy - guidance.sigma * r;
    }
    distance += std::fabs(at.student - r);
    if (!counts) return;
    ++selected;
    if (!is_finite(at.student) || leaves_float(r) || leaves_float(d)) ++wild;
    if (d != d) {
      ++nans;
      return;
    }
    penalty += rule.penalty(d);
    magnitude += std::fabs(d);
  }

  // One selected element of a decoupled loss in double: g^2 as the penalty, |g| as the magnitude. The distances are
  // not of this sum.
  CODMD_HD void add_decoupled(const DmdRule& rule, double d, double augmentation, const NormPair& norms) {
    if (leaves_float(d) || leaves_float(augmentation)) ++wild;
    double first = d / double(norms.matching), second = augmentation / double(norms.augmentation);
    if (rule.nan == NanPolicy::to_num) {
      first = to_number(first);
      second = to_number(second);
    }
    const double g = first + second;
    if (g != g) {
      ++nans;
      return;
    }
    penalty += g * g;
    magnitude += std::fabs(g);
  }
};

// Whether float32 sums over a few hundred elements kept their digits: squares of small numbers vanish, those of large
// ones overflow, and so do sums of large distances.
CODMD_HD inline bool in_range(float distance, float penalty, float magnitude) {
  return distance <= kLargestFloat && ((penalty > 1e-28f && penalty < 1e36f) || magnitude == 0.0f);
}

// A norm as float32. One that float32 cannot hold is negative and poisons its samples: d / norm would be a finite wrong
// number.
CODMD_HD inline float norm_of_sum(const DmdRule& rule, double distance, int64_t elements) {
  const double norm = rule.guarded(distance / double(elements));
  const bool lost = leaves_float(norm) || (norm > 0.0 && norm < double(kSmallestNormal));
  return lost ? -INFINITY : float(norm);
}

// What one sample adds to the loss: its value before weights, its part of mean|g|, and whether it is dropped or
// poisoned.
struct SampleValue {
  double value, magnitude;
  bool dropped, wild;

  // A segment's penalty over norm^2 (or norm) and |d| over norm, repaired.
  CODMD_HD void add_segment(const DmdRule& rule, const Moments& sums, float norm) {
    if (sums.wild > 0 || norm < 0.0f) wild = true;
    if (!sums.selected) return;
    double part = sums.penalty / double(norm), size = sums.magnitude;
    if (!rule.norm_divides_loss) {
      part /= double(norm);
      size /= double(norm);
    }
    if (rule.nan == NanPolicy::to_num) {
      if (part != part) part = 0.0;
      if (size != size) size = 0.0;
    } else if (sums.nans > 0) {
      part = NAN;
    }
    value += part;
    magnitude += size;
  }

  // The same of a decoupled loss, whose sums are those of g itself.
  CODMD_HD void add_segment(const DmdRule& rule, const Moments& sums, const NormPair& norms) {
    if (norms.matching < 0.0f || norms.augmentation < 0.0f) wild = true;
    add_segment(rule, sums, 1.0f);
  }

  CODMD_HD void finish(const DmdRule& rule) {
    if (wild) value = NAN;
    dropped = rule.nan == NanPolicy::zero_sample && value != value;
    if (dropped) value = 0.0;
  }

  CODMD_HD double weighted(const DmdRule& rule, double weight) const {
    return value * (rule.weight_on_direction ? weight * weight : weight);
  }
  // A weight on the direction is a factor of g.
  CODMD_HD double weighted_magnitude(const DmdRule& rule, double weight) const {
    return rule.weight_on_direction ? magnitude * std::fabs(weight) : magnitude;
  }
  // `count` is all selected elements.
  CODMD_HD float factor(const DmdRule& rule, double weight, int64_t count) const {
    if (count == 0 || dropped) return 0.0f;
    if (wild) return NAN;
    const double reduced = rule.sum ? 1.0 : double(count);
    return float(rule.coefficient * (rule.huber_c > 0.0 ? 1.0 : 2.0) * weight / reduced);
  }
};

// (loss, mean|g|) from the sums of weighted values and magnitudes over all samples.
CODMD_HD inline void write_loss(const DmdRule& rule, double value, double magnitude, int64_t count, float* out) {
  out[0] = count ? float(rule.coefficient * (value / (rule.sum ? 1.0 : double(count)))) : 0.0f;
  out[1] = count ? float(magnitude / double(count)) : 0.0f;
}

// The two below have internal linkage: files for one instruction set include them.
//
// Where the reciprocal of a norm is exact enough: neither comes near the ends of float32's range. Multiplying by it
// costs one rounding and saves the division.
CODMD_HD static inline bool has_normal_inverse(float norm) { return norm > 7.9e-31f && norm < 1.26e30f; }

// d / sqrt(d^2 + c^2) from s = d / c; beyond 1e15 it is 1 to the last digit, and an infinite d is NaN.
CODMD_HD static inline float huber_slope(float d, float c) {
  constexpr float limit = 1e15f;
  float s = d / c;
  s = s > limit ? limit : s < -limit ? -limit : s;
  return s / std::sqrt(s * s + 1.0f) + (d - d);
}

// g without its factor: repaired d / norm, or d / sqrt(d^2 + c^2) / norm.
struct Direction {
  float norm, inverse, huber_c;
  bool multiply, repair;

  CODMD_HD Direction(const DmdRule& rule, float norm)
      : norm(norm),
        inverse(1.0f / norm),
        huber_c(float(rule.huber_c)),
        multiply(has_normal_inverse(norm)),
        repair(rule.nan == NanPolicy::to_num) {}

  CODMD_HD float operator()(float d) const {
    if (huber_c > 0.0f) d = huber_slope(d, huber_c);
    const float g = multiply ? d * inverse : d / norm;
    return repair ? to_number(g) : g;
  }
};

}  // namespace codmd
