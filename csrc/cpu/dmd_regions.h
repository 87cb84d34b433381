// SPDX-License-Identifier: Apache-2.0
//
// How the DMD passes walk the latents: planes, regions of a grid, runs of pixels in chunks of float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "backend.h"
#include "dmd_loops.h"
#include "passes.h"
#include "valid_rows.h"

namespace codmd {

struct PlaneIndex {
  int64_t b, f, c;
};

inline PlaneIndex plane_of(const Shape& shape, int64_t item) {
  const int64_t row = item / shape.channels;
  return {row / shape.frames, row % shape.frames, item % shape.channels};
}

// The float32 chunks of one worker: d = f - r and the guided r of the pixels at hand.
class Chunks {
 public:
  Chunks(const DmdScores& scores, const Numbers& numbers, const Grid& grid, const Tensor* also)
      : scores_(scores), loops_(dmd_loops()), load_(passes().load[int(scores.dtype)]), grid_(grid),
        real_scale_(float(numbers.real_scale())), fake_scale_(float(numbers.fake_scale())) {
    const Shape& s = scores.shape;
    const auto dense = [&](const Tensor& l) { return !l.data || (l.stride[4] == 1 && l.stride[3] == s.width); };
    const int64_t* m = scores.mask.stride;
    const bool mask_dense = !scores.mask.data || (m[4] == 1 && m[3] == s.width) || (m[4] == 0 && m[3] == 0);
    const auto neighbours = [](const Tensor& l) { return !l.data || l.stride[4] == 1; };
    direct_ = scores.dtype != DType::f16 && !scores.mask.data && !scores.fake_uncond.data &&
              neighbours(scores.student) && neighbours(scores.fake) && neighbours(scores.real) && neighbours(scores.real_uncond) &&
              neighbours(scores.noisy) && (!also || neighbours(*also));
    one_run_ = grid.height * grid.width == 1 && mask_dense && dense(scores.student) && dense(scores.fake) &&
               dense(scores.real) && dense(scores.real_uncond) && dense(scores.fake_uncond) && dense(scores.noisy) &&
               dense(scores.augment_real) && dense(scores.augment_uncond) && (!also || dense(*also));
  }

  // Whether run() may stand for fetch(): pixels lie side by side and nothing but one guidance is asked for.
  bool direct() const { return direct_; }

  DmdRun run(const PlaneIndex& p, int64_t y, int64_t x) const {
    const auto at = [&](const Tensor& l) -> const void* {
      return l.data ? address(l, scores_.dtype, p.b, p.f, p.c, y, x) : nullptr;
    };
    const float sigma = scores_.sigma ? sigma_of(p) : -1.0f;
    return {at(scores_.student), at(scores_.fake),     at(scores_.real), at(scores_.real_uncond),
            at(scores_.noisy),   real_scale_,        sigma};
  }

  int64_t regions() const { return grid_.height * grid_.width; }

  double area(int64_t region) const {
    const Box box = box_of(region);
    return double((box.bottom - box.top) * (box.right - box.left));
  }

  // visit(y, x, n) for every chunk of a region; with one run, x counts on over the rows.
  template <class Visit>
  void each(int64_t region, const Visit& visit) const {
    const Box box = box_of(region);
    if (one_run_) return chop(0, 0, scores_.shape.height * scores_.shape.width, visit);
    for (int64_t y = box.top; y < box.bottom; ++y) chop(y, box.left, box.right, visit);
  }

  // d and r of n pixels; `forward` also reads the student, and noisy for r in x0 space.
  void fetch(const PlaneIndex& p, int64_t y, int64_t x, int64_t n, bool forward) {
    read(scores_.fake, p, y, x, n, d);
    read(scores_.real, p, y, x, n, r);
    const float* real_uncond = optional(scores_.real_uncond, p, y, x, n, real_uncond_);
    const float* fake_uncond = optional(scores_.fake_uncond, p, y, x, n, fake_uncond_);
    loops_.guide(d, r, fake_uncond, real_uncond, fake_scale_, real_scale_, n);
    if (scores_.sigma) {
      const float* noisy = forward ? optional(scores_.noisy, p, y, x, n, noisy_) : nullptr;
      loops_.from_flow(d, r, noisy, sigma_of(p), n);
    }
    if (forward) read(scores_.student, p, y, x, n, student);
  }

  // The sums of n pixels in double, from the latents themselves: x, r, d and f are added to `features`.
  void add_exact(const DmdRule& rule, const PlaneIndex& p, int64_t y, int64_t x, int64_t n, Moments& moments,
                 double (&features)[4]) {
    read(scores_.student, p, y, x, n, student);
    read(scores_.fake, p, y, x, n, d);
    read(scores_.real, p, y, x, n, r);
    const bool guided = optional(scores_.real_uncond, p, y, x, n, real_uncond_);
    const bool critic_guided = optional(scores_.fake_uncond, p, y, x, n, fake_uncond_);
    if (scores_.sigma) read(scores_.noisy, p, y, x, n, noisy_);
    const Guidance guidance{guided,      critic_guided, scores_.sigma != nullptr,
                            real_scale_, fake_scale_,   scores_.sigma ? sigma_of(p) : 0.0f};
    const uint8_t* selected = mask(p, y, x, n);
    for (int64_t k = 0; k < n; ++k) {
      double exact_r, exact_d;
      moments.add(rule, guidance, {student[k], r[k], d[k], real_uncond_[k], fake_uncond_[k], noisy_[k]},
                  !selected || selected[k], exact_r, exact_d);
      features[0] += double(student[k]);
      features[1] += exact_r;
      features[2] += exact_d;
      double fake = d[k];
      if (critic_guided) fake += double(fake_scale_) * (fake - double(fake_uncond_[k]));
      features[3] += guidance.flow ? double(noisy_[k]) - guidance.sigma * fake : fake;
    }
  }

  // The sum of |x - c2| over n pixels of a decoupled loss.
  double second_distance(const PlaneIndex& p, int64_t y, int64_t x, int64_t n) {
    read(scores_.student, p, y, x, n, student);
    read(scores_.augment_real, p, y, x, n, augment_real_);
    const float sum = loops_.distance(student, augment_real_, n);
    if (sum <= kLargestFloat) return double(sum);
    double exact = 0;
    for (int64_t k = 0; k < n; ++k) exact += std::fabs(double(student[k]) - double(augment_real_[k]));
    return exact;
  }

  // d := g of n pixels of a decoupled loss; NaN where a half of it is not finite before the division, else 0.
  float fetch_decoupled(const PlaneIndex& p, int64_t y, int64_t x, int64_t n, const NormPair& norms, bool to_num) {
    fetch(p, y, x, n, false);
    read(scores_.augment_real, p, y, x, n, augment_real_);
    read(scores_.augment_uncond, p, y, x, n, augment_uncond_);
    return loops_.decouple(d, augment_real_, augment_uncond_, real_scale_, norms, to_num, n);
  }

  // Penalty and magnitude of g of the n pixels of the last fetch_decoupled, in double, from the latents themselves.
  void add_decoupled(const DmdRule& rule, const NormPair& norms, const PlaneIndex& p, int64_t y, int64_t x, int64_t n,
                     Moments& moments) {
    read(scores_.fake, p, y, x, n, d);
    const bool critic_guided = optional(scores_.fake_uncond, p, y, x, n, fake_uncond_);
    const uint8_t* selected = mask(p, y, x, n);
    for (int64_t k = 0; k < n; ++k) {
      if (selected && !selected[k]) continue;
      double difference = double(d[k]) - double(r[k]);
      if (critic_guided) difference += double(fake_scale_) * (double(d[k]) - double(fake_uncond_[k]));
      const double change = double(augment_uncond_[k]) - double(augment_real_[k]);
      moments.add_decoupled(rule, difference, double(real_scale_) * change, norms);
    }
  }

  // The mask's bytes of n pixels, or null where everything is selected.
  const uint8_t* mask(const PlaneIndex& p, int64_t y, int64_t x, int64_t n) {
    if (!scores_.mask.data) return nullptr;
    const uint8_t* from = static_cast<const uint8_t*>(scores_.mask.data) + scores_.mask.offset(p.b, p.f, p.c, y, x);
    const int64_t step = scores_.mask.stride[4];
    if (step == 1) return from;
    if (step == 0) {
      std::memset(mask_, *from, size_t(n));
    } else {
      for (int64_t k = 0; k < n; ++k) mask_[k] = from[k * step];
    }
    return mask_;
  }

  const DmdLoops& loops() const { return loops_; }

  alignas(64) float student[kDmdChunk];
  alignas(64) float d[kDmdChunk];
  alignas(64) float r[kDmdChunk];

 private:
  struct Box {
    int64_t top, bottom, left, right;
  };

  float sigma_of(const PlaneIndex& p) const {
    return scores_.sigma[p.b * scores_.sigma_stride[0] + p.f * scores_.sigma_stride[1]];
  }

  Box box_of(int64_t region) const {
    const int64_t gy = region / grid_.width, gx = region % grid_.width;
    const Shape& s = scores_.shape;
    return {gy * s.height / grid_.height, (gy + 1) * s.height / grid_.height, gx * s.width / grid_.width,
            (gx + 1) * s.width / grid_.width};
  }

  template <class Visit>
  static void chop(int64_t y, int64_t first, int64_t last, const Visit& visit) {
    for (int64_t x = first; x < last; x += kDmdChunk) visit(y, x, std::min(kDmdChunk, last - x));
  }

  void read(const Tensor& tensor, const PlaneIndex& p, int64_t y, int64_t x, int64_t n, float* to) const {
    load_(address(tensor, scores_.dtype, p.b, p.f, p.c, y, x), tensor.stride[4], n, to);
  }

  const float* optional(const Tensor& tensor, const PlaneIndex& p, int64_t y, int64_t x, int64_t n, float* to) const {
    if (!tensor.data) return nullptr;
    read(tensor, p, y, x, n, to);
    return to;
  }

  const DmdScores& scores_;
  const DmdLoops& loops_;
  void (*load_)(const void* from, int64_t stride, int64_t n, float* to);
  const Grid grid_;
  const float real_scale_, fake_scale_;
  bool one_run_, direct_;
  alignas(64) float real_uncond_[kDmdChunk];
  alignas(64) float fake_uncond_[kDmdChunk];
  alignas(64) float noisy_[kDmdChunk];
  alignas(64) float augment_real_[kDmdChunk];
  alignas(64) float augment_uncond_[kDmdChunk];
  alignas(64) uint8_t mask_[kDmdChunk];
};

}  // namespace codmd
