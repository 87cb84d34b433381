// SPDX-License-Identifier: Apache-2.0
//
// One read of student and predictions: the moments of the distribution matching loss and, for the relation term, the
// features of x, guided r and d = f - r. Differences come first, d = (f - c) + k_f (f - f_u) - k (c - u), so that a
// critic that tracks the teacher keeps its digits. With sigma, predictions are velocities and x0 = noisy - sigma v.
#pragma once

#include "broadcast.h"
#include "dmd_algebra.h"
#include "feature_row.h"

namespace codmd::cuda {

struct Predictions {
  Tensor fake, real, real_uncond, fake_uncond, noisy;  // null data: absent
  const float* sigma;                                  // [B, F] by strides, or null
  int64_t sigma_stride[2];
  float real_scale, fake_scale;  // k in c + k (c - u)

  CODMD_DEVICE float sigma_of(const Unit& unit) const {
    return sigma ? sigma[unit.b * sigma_stride[0] + unit.f * sigma_stride[1]] : 0.0f;
  }
};

// The predictions of one unit.
template <class T>
struct PredictionViews {
  View<T> fake, real, real_uncond, fake_uncond, noisy;
  float real_scale, fake_scale, sigma;
  bool flow;

  CODMD_DEVICE PredictionViews(const Predictions& p, const Unit& unit)
      : fake(p.fake, unit),
        real(p.real, unit),
        real_uncond(p.real_uncond, unit),
        fake_uncond(p.fake_uncond, unit),
        noisy(p.noisy, unit),
        real_scale(p.real_scale),
        fake_scale(p.fake_scale),
        sigma(p.sigma_of(unit)),
        flow(p.sigma != nullptr) {}

  template <int N>
  CODMD_DEVICE void read(int64_t row, int64_t column, float (&d)[N], float (&r)[N], bool want_real,
                         Count<N> count) const {
    float other[N];
    real.read(row, column, r, count);
    fake.read(row, column, d, count);
    if (fake_uncond.data) {
      fake_uncond.read(row, column, other, count);
CODMD_UNROLL
      for (int i = 0; i < N; ++i) d[i] = (d[i] - r[i]) + fake_scale * (d[i] - other[i]);
    } else {
CODMD_UNROLL
      for (int i = 0; i < N; ++i) d[i] -= r[i];
    }
    if (real_uncond.data) {
      real_uncond.read(row, column, other, count);
CODMD_UNROLL
      for (int i = 0; i < N; ++i) {
        const float step = real_scale * (r[i] - other[i]);
        d[i] -= step;
        r[i] += step;
      }
    }
    if (!flow) return;
    if (want_real) noisy.read(row, column, other, count);
CODMD_UNROLL
    for (int i = 0; i < N; ++i) {
      d[i] *= -sigma;
      if (want_real) r[i] = other[i] - sigma * r[i];
    }
  }
};

// One byte an element, by strides; null selects everything.
struct Selection {
  Tensor mask;
  CODMD_DEVICE const uint8_t* start(const Unit& unit) const {
    if (!mask.data) return nullptr;
    return static_cast<const uint8_t*>(mask.data) + mask.offset(unit.b, unit.f, unit.c, unit.y, unit.x);
  }
  CODMD_DEVICE bool at(const uint8_t* start, int64_t row, int64_t column) const {
    return !start || start[row * mask.stride[3] + column * mask.stride[4]] != 0;
  }
};

// A unit's sums: |x - r|, penalty, |d|, then elements selected, with d NaN, with x not finite.
struct UnitMoments {
  float sums[3];
  uint32_t counts[3];
};

template <class T>
struct DmdPass {
  static constexpr const char* kName = "dmd_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  Cut cut;
  Tensor student;
  Predictions predictions;
  Selection selection;
  DmdRule rule;
  FrameMask mask;         // of the relation
  UnitMoments* moments;   // [units]
  float* partial;         // feature tables [splits, B, F, 3K + 1], or null without a relation

  struct Sums {
    Values<float, 6> at;  // |x - r|, penalty, |d|, x, r, d
    Values<uint32_t, 3> counts;
  };

  CODMD_DEVICE void operator()(Block& block) const {
    const Unit unit = cut.at(block.index(), kVector<T>);
    const bool valid = mask.valid(unit.b, unit.f);
    PerThread<Values<float, 6>> sums;
    PerThread<Values<uint32_t, 3>> counts;
    block.each([&](int t) {
      Sums own{};
      add(unit, t, partial && valid, own);
      sums[t] = own.at;
      counts[t] = own.counts;
    });
    const PerThread<float> total = block_sum(block, sums);
    const PerThread<uint32_t> elements = block_sum(block, counts);
    UnitMoments& out = moments[block.index()];
    block.each([&](int t) {
      if (t < 3) {
        out.sums[t] = total[t];
        out.counts[t] = elements[t];
      }
      if (!partial) return;
      const FeatureRow row(cut, unit, block.index(), partial);
      if (t >= 3 && t < 6) row.write(t - 3, total[t]);
      if (t == 6) row.write_count(valid);
    });
  }

  CODMD_DEVICE void add(const Unit& unit, int thread, bool pool, Sums& sums) const {
    const View<T> student_view(student, unit);
    const PredictionViews<T> views(predictions, unit);
    const uint8_t* selected = selection.start(unit);
    each_chunk<T>(cut, unit, student, thread, [&](int64_t row, int64_t column, auto count) {
      constexpr int n = decltype(count)::value;
      float x[n], r[n], d[n];
      student_view.read(row, column, x, count);
      views.read(row, column, d, r, true, count);
      if (pool) {
        sums.at.at[3] += sum_of<n>(x);
        sums.at.at[4] += sum_of<n>(r);
        sums.at.at[5] += sum_of<n>(d);
      }
CODMD_UNROLL
      for (int i = 0; i < n; ++i) {
        r[i] = fabsf(x[i] - r[i]);
        if (!selection.at(selected, row, column + i)) {
          d[i] = 0.0f;
          continue;
        }
        sums.counts.at[0] += 1;
        sums.counts.at[2] += fabsf(x[i]) <= 3.402823466e38f ? 0 : 1;
        if (d[i] != d[i]) {
          sums.counts.at[1] += 1;
          d[i] = 0.0f;
        }
      }
      sums.at.at[0] += sum_of<n>(r);
CODMD_UNROLL
      for (int i = 0; i < n; ++i) {
        x[i] = rule.penalty(d[i]);
        d[i] = fabsf(d[i]);
      }
      sums.at.at[1] += sum_of<n>(x);
      sums.at.at[2] += sum_of<n>(d);
    });
  }
};

// From the units' moments to norms, factors and the loss: a block to each sample adds its units frame by frame, the
// block that finishes last does the algebra.
struct DmdFinishPass {
  static constexpr const char* kName = "dmd_finish_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  int64_t samples, frames, units, frame_size;  // units to a frame, elements to a frame
  DmdRule rule;
  const float* sample_weight;  // [B], or null
  bool magnitude;
  const UnitMoments* moments;  // [B, F, units]
  Moments* by_frame;           // [B, F]
  SampleValue* by_sample;      // [B]
  float *values, *norms, *factors;
  uint32_t* counter;

  CODMD_DEVICE void operator()(Block& block) const {
    const int64_t b = block.index();
    for (int64_t first = 0; first < frames; first += kWarps) add_frames(block, b, first);
    if (block.is_last(counter, uint32_t(samples))) finish(block);
  }

  // A warp adds the units of a frame.
  CODMD_DEVICE void add_frames(Block& block, int64_t b, int64_t first) const {
    PerThread<Values<double, 3>> sums;
    PerThread<Values<uint64_t, 3>> counts;
    block.each([&](int t) {
      sums[t] = {};
      counts[t] = {};
      const int64_t f = first + t / kWarp;
      if (f >= frames) return;
      const UnitMoments* own = moments + (b * frames + f) * units;
      for (int64_t u = t % kWarp; u < units; u += kWarp)
CODMD_UNROLL
        for (int i = 0; i < 3; ++i) {
          sums[t].at[i] += double(own[u].sums[i]);
          counts[t].at[i] += uint64_t(own[u].counts[i]);
        }
    });
    block.warp_sum(sums);
    block.warp_sum(counts);
    block.each([&](int t) {
      const int64_t f = first + t / kWarp;
      if (f >= frames || t % kWarp) return;
      by_frame[b * frames + f] = {sums[t].at[0],           sums[t].at[1],           sums[t].at[2],
                                  int64_t(counts[t].at[0]), int64_t(counts[t].at[1]), int64_t(counts[t].at[2])};
    });
  }

  CODMD_DEVICE Moments segment(int64_t b, int64_t& f) const {
    Moments sums{};
    const int64_t own = rule.segment_of(f);
    for (; f < frames && rule.segment_of(f) == own; ++f) sums.add(by_frame[b * frames + f]);
    return sums;
  }

  CODMD_DEVICE void finish(Block& block) const {
    if (rule.scope == NormScope::batch) batch_norm(block);
    PerThread<Values<double, 2>> sums;
    PerThread<Values<uint64_t, 1>> counts;
    block.each([&](int t) {
      sums[t] = {};
      counts[t] = {};
      for (int64_t b = t; b < samples; b += kThreads) {
        SampleValue value{};
        for (int64_t f = 0; f < frames;) {
          const int64_t start = f, at = rule.norm_of(b, f, frames);
          const Moments own = segment(b, f);
          if (rule.scope != NormScope::batch)
            norms[at] = rule.first_alone && start == 0 ? 1.0f
                                                       : rule.guarded(own.distance / double((f - start) * frame_size));
          value.add_segment(rule, own, norms[at]);
          counts[t].at[0] += uint64_t(own.selected);
        }
        value.finish(rule);
        by_sample[b] = value;
        sums[t].at[0] += value.weighted(rule, weight(b));
        sums[t].at[1] += value.magnitude;
      }
    });
    const PerThread<double> total = block_sum(block, sums);
    const PerThread<uint64_t> selected = block_sum(block, counts);
    double* shared = reinterpret_cast<double*>(block.shared() + kReserved);
    uint64_t* shared_count = reinterpret_cast<uint64_t*>(shared + 2);
    block.each([&](int t) {
      if (t < 2) shared[t] = total[t];
      if (t == 0) *shared_count = selected[t];
    });
    block.sync();
    const int64_t count = int64_t(*shared_count);
    block.each([&](int t) {
      if (t == 0) {
        const double reduced = rule.sum ? 1.0 : double(count);
        values[0] = count ? float(rule.coefficient * (shared[0] / reduced)) : 0.0f;
        values[1] = count && magnitude ? float(shared[1] / double(count)) : 0.0f;
      }
      for (int64_t b = t; b < samples; b += kThreads) factors[b] = by_sample[b].factor(rule, weight(b), count);
    });
  }

  CODMD_DEVICE void batch_norm(Block& block) const {
    PerThread<Values<double, 1>> sum;
    block.each([&](int t) {
      sum[t] = {};
      for (int64_t at = t; at < samples * frames; at += kThreads) sum[t].at[0] += by_frame[at].distance;
    });
    const PerThread<double> total = block_sum(block, sum);
    block.each([&](int t) {
      if (t == 0) norms[0] = rule.guarded(total[t] / double(samples * frames * frame_size));
    });
    block.sync();
  }

  CODMD_DEVICE double weight(int64_t b) const { return sample_weight ? double(sample_weight[b]) : 1.0; }
};

// upstream * factor * G(d, norm) plus the relation's share, rounded once. Reads neither student nor noisy.
template <class T>
struct DmdBackwardPass {
  static constexpr const char* kName = "dmd_backward_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  Cut cut;
  Predictions predictions;
  Selection selection;
  DmdRule rule;
  const float *norms, *factors;
  Scale upstream;
  bool dmd;  // false: no gradient reaches the distribution matching term
  FeatureGradient relation;
  Tensor out;

  CODMD_DEVICE void operator()(Block& block) const {
    const Unit unit = cut.at(block.index(), kVector<T>);
    const float share = relation.at(cut, unit);
    const float own = dmd ? factors[unit.b] : 0.0f;
    const float factor = own == 0.0f ? 0.0f : upstream() * own;
    const bool active = dmd && own != 0.0f;
    const Direction direction(rule, norms[rule.norm_of(unit.b, unit.f, cut.shape.frames)]);
    const PredictionViews<T> views(predictions, unit);
    const uint8_t* selected = selection.start(unit);
    T* to = static_cast<T*>(const_cast<void*>(out.data)) + out.offset(unit.b, unit.f, unit.c, unit.y, unit.x);
    block.each([&](int t) {
      each_chunk<T>(cut, unit, out, t, [&](int64_t row, int64_t column, auto count) {
        constexpr int n = decltype(count)::value;
        float d[n], r[n];
        if (active) views.read(row, column, d, r, false, count);
CODMD_UNROLL
        for (int i = 0; i < n; ++i) {
          const bool moved = active && selection.at(selected, row, column + i);
          d[i] = moved ? factor * direction(d[i]) + share : share;
        }
        store<T>(to + row * out.stride[3] + column * out.stride[4], d, count);
      });
    });
  }
};

}  // namespace codmd::cuda
