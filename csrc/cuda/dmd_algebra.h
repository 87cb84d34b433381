// SPDX-License-Identifier: Apache-2.0
//
// The small algebra of the distribution matching loss: from moments of x, r and d = f - r to norms, loss and the factor
// of the gradient, dL/dx = factor * G(d, norm). Conventions are those of codmd/conventions.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "../algebra.h"

namespace codmd::cuda {

enum class NormScope : int { sample = 0, batch = 1, block = 2 };
enum class Guard : int { none = 0, clamp = 1, add = 2 };
enum class NanPolicy : int { to_num = 0, zero_sample = 1, keep = 2 };

struct DmdRule {
  NormScope scope;
  int64_t block;     // frames of a segment, in scope block
  bool first_alone;  // frame 0 is a segment whose norm is 1
  Guard guard;
  float eps;
  NanPolicy nan;
  float huber_c;  // 0: the squared penalty
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
  CODMD_HD int64_t norm_of(int64_t b, int64_t frame, int64_t frames) const {
    return scope == NormScope::batch ? 0 : b * segments(frames) + segment_of(frame);
  }

  CODMD_HD float penalty(float d) const {
    const float square = d * d;
    return huber_c > 0.0f ? square / (sqrtf(square + huber_c * huber_c) + huber_c) : square;
  }
  // A NaN norm fails the comparison and stays NaN.
  CODMD_HD float guarded(double norm) const {
    if (guard == Guard::clamp) norm = norm < double(eps) ? double(eps) : norm;
    if (guard == Guard::add) norm += double(eps);
    return float(norm);
  }
};

// Sums over the elements of a frame, a segment or a sample; all but `distance` over the selected ones.
struct Moments {
  double distance;            // |x - r|
  double penalty, magnitude;  // of d where it is a number
  int64_t selected, nans, wild;  // elements; those with d NaN; those with x not finite

  CODMD_HD void add(const Moments& other) {
    distance += other.distance;
    penalty += other.penalty;
    magnitude += other.magnitude;
    selected += other.selected;
    nans += other.nans;
    wild += other.wild;
  }
};

// What one sample adds to the loss: its value before weights, mean |g|'s part, and whether it is dropped or poisoned.
struct SampleValue {
  double value, magnitude;
  bool dropped, wild;

  // A segment's penalty over norm^2 (or norm) and |d| over norm, repaired.
  CODMD_HD void add_segment(const DmdRule& rule, const Moments& sums, float norm) {
    if (sums.wild > 0) wild = true;
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

  CODMD_HD void finish(const DmdRule& rule) {
    if (wild) value = NAN;
    dropped = rule.nan == NanPolicy::zero_sample && value != value;
    if (dropped) value = 0.0;
  }

  CODMD_HD double weighted(const DmdRule& rule, double weight) const {
    return value * (rule.weight_on_direction ? weight * weight : weight);
  }
  // `count` is all selected elements.
  CODMD_HD float factor(const DmdRule& rule, double weight, int64_t count) const {
    if (count == 0 || dropped) return 0.0f;
    if (wild) return NAN;
    const double reduced = rule.sum ? 1.0 : double(count);
    return float(rule.coefficient * (rule.huber_c > 0.0f ? 1.0 : 2.0) * weight / reduced);
  }
};

// g without its factor: repaired d / norm, or d / sqrt(d^2 + c^2) / norm.
struct Direction {
  float norm, inverse, huber_c;
  bool multiply, repair;

  CODMD_HD Direction(const DmdRule& rule, float norm)
      : norm(norm),
        inverse(1.0f / norm),
        huber_c(rule.huber_c),
        // Where the reciprocal is exact enough: neither it nor the norm comes near the ends of float32's range.
        multiply(norm > 7.9e-31f && norm < 1.26e30f),
        repair(rule.nan == NanPolicy::to_num) {}

  CODMD_HD float operator()(float d) const {
    if (huber_c > 0.0f) d /= sqrtf(d * d + huber_c * huber_c);
    float g = multiply ? d * inverse : d / norm;
    if (repair) {
      const float largest = 3.402823466e38f;
      g = g != g ? 0.0f : g > largest ? largest : g < -largest ? -largest : g;
    }
    return g;
  }
};

}  // namespace codmd::cuda
