// SPDX-License-Identifier: Apache-2.0
//
// From pooled features to losses and gradients, a block to each sample: the mean over frames and the frame relation;
// the block that finishes last takes the batch relation and the terms. For relations whose features and matrices fit
// shared memory; others take the way of long_relation.h.
#pragma once

#include <cstdint>

#include "feature_row.h"
#include "relation_rows.h"

namespace codmd::cuda {

// What every device gives a block without asking, less what reductions use.
constexpr int64_t kFusedFloats = 48 * 256 - kReserved;

CODMD_HD inline int64_t fused_floats(int64_t n, int64_t features) {
  return n * (row_pitch(features) + 2) + 2 * n * n;
}

// N sums over k < count: add(k, sums) adds term k. Four partial sums each, so that neither roundings nor the wait for
// the last addition grow with count itself.
template <int N, class Add>
CODMD_DEVICE Values<float, N> sums_over(int64_t count, Add add) {
  constexpr int parts = 4;
  Values<float, N> part[parts] = {};
CODMD_ROLLED
  for (int64_t first = 0; first < count; first += parts)
CODMD_UNROLL
    for (int p = 0; p < parts; ++p)
      if (first + p < count) add(first + p, part[p]);
CODMD_UNROLL
  for (int n = 0; n < N; ++n)
    part[0].at[n] = (part[0].at[n] + part[1].at[n]) + (part[2].at[n] + part[3].at[n]);
  return part[0];
}

// Rows of x, r/|r| and e (algebra.h), then the count.
struct FeatureProducts {
  const float* table;
  const float* norms;
  int features;

  CODMD_DEVICE const float* row(int64_t i) const { return table + i * row_pitch(features); }
  CODMD_DEVICE bool valid(int64_t i) const { return row(i)[3 * features] > 0.0f; }
  CODMD_DEVICE float student_norm(int64_t i) const { return norms[i]; }
  CODMD_DEVICE Related relate(int64_t i, int64_t j) const {
    const float *a = row(i), *b = row(j);
    const Values<float, 2> sum = sums_over<2>(features, [&](int64_t k, Values<float, 2>& sums) {
      const float r = b[features + k], e = b[2 * features + k];
      sums.at[0] += a[k] * b[k];
      sums.at[1] += a[2 * features + k] * (r + e) + a[features + k] * e;  // Delta_ij of algebra.h
    });
    return {sum.at[0] / (fabsf(norms[i]) * fabsf(norms[j])), sum.at[1]};
  }
};

// Turns r and d of a row into r/|r| and the change e of that unit vector; returns the student's norm, negative where
// it is clamped.
CODMD_DEVICE float make_unit(float* row, int features) {
  const Values<float, 5> sum = sums_over<5>(features, [&](int64_t k, Values<float, 5>& sums) {
    const float x = row[k], r = row[features + k], d = row[2 * features + k];
    sums.at[0] += x * x;
    sums.at[1] += r * r;
    sums.at[2] += r * d;
    sums.at[3] += d * d;
    sums.at[4] += (r + d) * (r + d);
  });
  const Norms<float> norm = norms(Inner<float>{sum.at[0], sum.at[1], sum.at[2], sum.at[2], sum.at[3], sum.at[4]},
                                 kLeastFloat);
  for (int k = 0; k < features; ++k) {
    const float r = row[features + k];
    row[features + k] = r / norm.real;
    row[2 * features + k] = unit_change(r, row[2 * features + k], norm);
  }
  return norm.clamped ? -norm.student : norm.student;
}

// The mean divergence of a table [n, 3K + 1] in shared memory, whose r and d become those of FeatureProducts; `grad`
// receives scale times the gradient of rows
// first_row .. first_row + rows - 1. `scratch` has fused_floats less the table. All threads return the loss.
CODMD_DEVICE float fused_relation(Block& block, float* table, int features, int64_t n, int64_t first_row,
                                  int64_t rows, float temperature, float scale, float* grad, float* scratch) {
  float* norms = scratch;
  float* divergence = scratch + n;
  float* similarity = divergence + n;
  float* excess = similarity + n * n;
  const FeatureProducts products{table, norms, features};

  block.each([&](int t) {
    for (int64_t i = t; i < n; i += kThreads) norms[i] = make_unit(table + i * row_pitch(features), features);
  });
  block.sync();
  const int64_t count = count_valid(products, n);
  for (int64_t first = 0; first < n; first += kWarps)
    diverge_rows(block, products, n, count, first, temperature, similarity, excess, divergence);
  block.sync();
  for (int64_t first = 0; first < n; first += kWarps)
    gradient_rows(block, products, n, count, first, temperature, scale, similarity, excess, similarity);
  block.sync();
  block.each([&](int t) {
    for (int64_t at = t; at < rows * features; at += kThreads) {
      const int64_t i = quotient(at, features), k = at - i * features;
      const float* weights = similarity + (first_row + i) * n;
      float sum = 0.0f;
      for (int64_t j = 0; j < n; ++j)
        if (products.valid(j)) sum += weights[j] * products.row(j)[k];
      grad[at] = sum;
    }
  });
  float loss = 0.0f;
  for (int64_t i = 0; i < n; ++i) loss += divergence[i];
  return count > 1 ? loss / float(count) : 0.0f;
}

struct FinishPass {
  static constexpr const char* kName = "finish_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  int64_t samples, frames, splits;
  int features;
  Numbers numbers;
  const float* partial;  // [splits, B, F, 3K + 1]: adding the splits gives the table of the frames
  float* rows;           // [B, 3K + 1], or null
  float* losses;         // [B]: the samples' frame terms
  float* frame_grad;     // [B, F, K], or null: the frame term is 0
  float* batch_grad;     // [B, K], or null: the batch term is 0
  float* terms;
  const float* dmd;      // (loss, mean|g|) of an objective, or null
  uint32_t* counter;

  CODMD_DEVICE void operator()(Block& block) const {
    sample(block, block.index());
    if (block.is_last(counter, uint32_t(samples))) all(block);
  }

  CODMD_DEVICE float temperature() const { return float(numbers.temperature()); }

  CODMD_DEVICE void sample(Block& block, int64_t b) const {
    const int64_t pitch = row_pitch(features), size = frames * pitch;
    float* table = block.shared() + kReserved;
    block.each([&](int t) {
      for (int64_t at = t; at < size; at += kThreads) {
        const float* part = partial + b * size + at;
        float sum = part[0];
        for (int64_t split = 1; split < splits; ++split) sum += part[split * samples * size];
        table[at] = sum;
      }
    });
    block.sync();
    block.each([&](int t) {
      for (int64_t k = t; rows && k < pitch; k += kThreads) {
        const Values<float, 2> sum = sums_over<2>(frames, [&](int64_t f, Values<float, 2>& sums) {
          const float* row = table + f * pitch;
          if (!(row[pitch - 1] > 0.0f)) return;
          sums.at[0] += row[k];
          sums.at[1] += 1.0f;
        });
        rows[b * pitch + k] = k < pitch - 1 && sum.at[1] > 0.0f ? sum.at[0] / sum.at[1] : sum.at[0];
      }
    });
    block.sync();
    float loss = 0.0f;
    if (frame_grad)
      loss = fused_relation(block, table, features, frames, 0, frames, temperature(), 1.0f / float(samples),
                            frame_grad + b * frames * features, table + size);
    block.each([&](int t) {
      if (t == 0) losses[b] = loss;
    });
  }

  CODMD_DEVICE void all(Block& block) const {
    const int64_t pitch = row_pitch(features);
    float* table = block.shared() + kReserved;
    float batch = 0.0f;
    if (batch_grad) {
      block.each([&](int t) {
        for (int64_t at = t; at < samples * pitch; at += kThreads) table[at] = rows[at];
      });
      block.sync();
      batch = fused_relation(block, table, features, samples, 0, samples, temperature(), 1.0f, batch_grad,
                             table + samples * pitch);
    }
    block.each([&](int t) {
      if (t != 0) return;
      float frame = 0.0f;
      for (int64_t b = 0; b < samples; ++b) frame += losses[b];
      frame /= float(samples);
      write_terms(terms, batch, frame, numbers, dmd);
    });
  }
};

}  // namespace codmd::cuda
