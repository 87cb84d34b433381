// SPDX-License-Identifier: Apache-2.0
//
// One read of student and predictions: the moments of the distribution matching loss and, for the relation term, the
// features of x, guided r and d = f - r. Differences come first, d = (f - c) + k_f (f - f_u) - k (c - u), so that a
// critic that tracks the teacher keeps its digits. With sigma, predictions are velocities and x0 = noisy - sigma v.
#pragma once

#include "../algebra.h"
#include "../dmd.h"
#include "feature_row.h"

namespace codmd::cuda {

struct Predictions {
  Tensor real, fake, real_uncond, fake_uncond, noisy;  // null data: absent
  const float* sigma;                                  // [B, F] by strides, or null
  int64_t sigma_stride[2];
  Number<float> real_scale, fake_scale;  // k in c + k (c - u)

  CODMD_DEVICE float sigma_of(const Unit& unit) const {
    return sigma ? sigma[unit.b * sigma_stride[0] + unit.f * sigma_stride[1]] : 0.0f;
  }
};

// The predictions of one unit.
template <class T>
struct PredictionViews {
  View<T> real, fake, real_uncond, fake_uncond, noisy;
  float real_scale, fake_scale, sigma;
  bool flow;

  CODMD_DEVICE PredictionViews(const Predictions& p, const Unit& unit)
      : real(p.real, unit),
        fake(p.fake, unit),
        real_uncond(p.real_uncond, unit),
        fake_uncond(p.fake_uncond, unit),
        noisy(p.noisy, unit),
        real_scale(p.real_scale()),
        fake_scale(p.fake_scale()),
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

  CODMD_DEVICE Guidance guidance() const {
    return {real_uncond.data != nullptr, fake_uncond.data != nullptr, flow, real_scale, fake_scale, sigma};
  }
  // One element as the models said it.
  CODMD_DEVICE Element at(const View<T>& student, int64_t row, int64_t column) const {
    const auto value = [&](const View<T>& view) {
      float out[1] = {0.0f};
      if (view.data) view.read(row, column, out, Count<1>{});
      return double(out[0]);
    };
    return {value(student), value(real), value(fake), value(real_uncond), value(fake_uncond), value(noisy)};
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

// A unit's sums: |x - r|, penalty, |d|, then elements selected, with d NaN, wild.
struct UnitMoments {
  double sums[3];
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
    Values<double, 3> moments;  // |x - r|, penalty, |d|
    Values<float, 3> features;  // x, r, d
    Values<uint32_t, 3> counts;
  };

  CODMD_DEVICE void operator()(Block& block) const {
    const Unit unit = cut.at(block.index(), kVector<T>);
    const bool valid = mask.valid(unit.b, unit.f);
    PerThread<Values<double, 3>> sums;
    PerThread<Values<float, 3>> features;
    PerThread<Values<uint32_t, 3>> counts;
    block.each([&](int t) {
      Sums own{};
      add(unit, t, partial && valid, own);
      sums[t] = own.moments;
      features[t] = own.features;
      counts[t] = own.counts;
    });
    const PerThread<double> total = block_sum(block, sums);
    const PerThread<uint32_t> elements = block_sum(block, counts);
    UnitMoments& out = moments[block.index()];
    block.each([&](int t) {
      if (t >= 3) return;
      out.sums[t] = total[t];
      out.counts[t] = elements[t];
    });
    if (!partial) return;
    const PerThread<float> means = block_sum(block, features);
    block.each([&](int t) {
      const FeatureRow row(cut, unit, block.index(), partial);
      if (t < 3) row.write(t, means[t]);
      if (t == 3) row.write_count(valid);
    });
  }

  // Float32 within a chunk, double from chunk to chunk.
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
CODMD_UNROLL
        for (int i = 0; i < n; ++i) d[i] = kept_apart(r[i], d[i], false);
        sums.features.at[0] += sum_of<n>(x);
        sums.features.at[1] += sum_of<n>(r);
        sums.features.at[2] += sum_of<n>(d);
      }
      uint32_t counts[3] = {0, 0, 0};
CODMD_UNROLL
      for (int i = 0; i < n; ++i) {
        r[i] = fabsf(x[i] - r[i]);
        if (!selection.at(selected, row, column + i)) {
          d[i] = 0.0f;
          continue;
        }
        counts[0] += 1;
        counts[2] += fabsf(x[i]) <= kLargestFloat ? 0 : 1;
        if (d[i] != d[i]) {
          counts[1] += 1;
          d[i] = 0.0f;
        }
      }
      const float distance = sum_of<n>(r);
CODMD_UNROLL
      for (int i = 0; i < n; ++i) {
        x[i] = rule.penalty(d[i]);
        d[i] = fabsf(d[i]);
      }
      const float penalty = sum_of<n>(x), magnitude = sum_of<n>(d);
      if (!in_range(distance, penalty, magnitude))
        return add_exact(views, student_view, selected, row, column, n, sums);
      sums.moments.at[0] += double(distance);
      sums.moments.at[1] += double(penalty);
      sums.moments.at[2] += double(magnitude);
CODMD_UNROLL
      for (int i = 0; i < 3; ++i) sums.counts.at[i] += counts[i];
    });
  }

  CODMD_DEVICE void add_exact(const PredictionViews<T>& views, const View<T>& student_view, const uint8_t* selected,
                              int64_t row, int64_t column, int n, Sums& sums) const {
    Moments own{};
CODMD_ROLLED
    for (int i = 0; i < n; ++i) {
      double r, d;
      own.add(rule, views.guidance(), views.at(student_view, row, column + i),
              selection.at(selected, row, column + i), r, d);
    }
    const double moments[3] = {own.distance, own.penalty, own.magnitude};
    const int64_t counts[3] = {own.selected, own.nans, own.wild};
CODMD_UNROLL
    for (int i = 0; i < 3; ++i) {
      sums.moments.at[i] += moments[i];
      sums.counts.at[i] += uint32_t(counts[i]);
    }
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
  Numbers numbers;
  const UnitMoments* moments;  // [B, F, units]
  const float* second;         // norms of a decoupled loss's second level where the moments are those of g, or null
  Moments* by_frame;           // [B, F]
  SampleValue* by_sample;      // [B]
  float *loss, *terms;  // [2] = loss, mean|g|; [5], or null where a later pass writes the terms
  float *norms, *factors;
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
          sums[t].at[i] += own[u].sums[i];
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
                                                       : norm_of_sum(rule, own.distance, (f - start) * frame_size);
          if (second)
            value.add_segment(rule, own, NormPair{norms[at], second[at]});
          else
            value.add_segment(rule, own, norms[at]);
          counts[t].at[0] += uint64_t(own.selected);
        }
        value.finish(rule);
        by_sample[b] = value;
        sums[t].at[0] += value.weighted(rule, weight(b));
        sums[t].at[1] += value.weighted_magnitude(rule, weight(b));
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
        write_loss(rule, shared[0], shared[1], count, loss);
        if (terms) write_terms(terms, 0.0, 0.0, numbers, loss);
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
      if (t == 0) norms[0] = norm_of_sum(rule, total[t], samples * frames * frame_size);
    });
    block.sync();
  }

  CODMD_DEVICE double weight(int64_t b) const { return sample_weight ? double(sample_weight[b]) : 1.0; }
};

}  // namespace codmd::cuda
