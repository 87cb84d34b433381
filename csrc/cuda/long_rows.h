// SPDX-License-Identifier: Apache-2.0
//
// The steps of a relation whose rows are long or many, each a kernel of its own: the average of rows, divergences and
// gradient matrices from Grams, rows mixed by such a matrix, the terms.
#pragma once

#include "gram.h"
#include "pooled_finish.h"

namespace codmd::cuda {

// psi_x | psi_r | psi_d | valid frames [B, 3K + 1], the means over the frames that take part.
template <class T>
struct MeanPass {
  static constexpr const char* kName = "mean_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  PixelRows rows;
  Tensor student, real, other;
  bool is_difference;
  Validity validity;
  float* out;

  CODMD_HD static int64_t blocks_per_sample(int64_t features) {
    return (features + kThreads * kVector<T> - 1) / (kThreads * kVector<T>);
  }

  CODMD_DEVICE void operator()(Block& block) const {
    constexpr int vector = kVector<T>;
    const int64_t features = rows.features(), each = blocks_per_sample(features);
    const int64_t b = quotient(block.index(), each), part = block.index() - b * each;
    block.each([&](int t) {
      const int64_t pixel = (part * kThreads + t) * vector;
      float* row = out + b * row_pitch(features);
      if (pixel >= features) return;
      float sum[3][vector] = {}, count = 0.0f;
      for (int64_t f = 0; f < rows.shape.frames; ++f) {
        if (!validity(b, f)) continue;
        float x[vector], r[vector], d[vector];
        read_pixels<T>(rows, student, b, f, pixel, x);
        read_pixels<T>(rows, real, b, f, pixel, r);
        read_pixels<T>(rows, other, b, f, pixel, d);
        count += 1.0f;
CODMD_UNROLL
        for (int e = 0; e < vector; ++e) {
          sum[0][e] += x[e];
          sum[1][e] += r[e];
          sum[2][e] += is_difference ? d[e] : difference_of(r[e], d[e]);
        }
      }
      if (pixel == 0) row[3 * features] = count;
      const float divisor = count > 0.0f ? count : 1.0f;
CODMD_UNROLL
      for (int e = 0; e < vector; ++e)
        for (int which = 0; which < 3 && pixel + e < features; ++which)
          row[which * features + pixel + e] = sum[which][e] / divisor;
    });
  }
};

// A table of features [rows, 3K + 1] to the rows of FeatureProducts, a block to each. Rows that count no frame
// are not read.
struct UnitPass {
  static constexpr const char* kName = "unit_pass";
  static constexpr int kBlocksPerMultiprocessor = 4;

  int64_t features;
  const float* table;
  float *units, *unit_norms;

  CODMD_DEVICE void operator()(Block& block) const {
    const int64_t pitch = row_pitch(features);
    const float* from = table + block.index() * pitch;
    float* to = units + block.index() * pitch;
    const bool valid = from[3 * features] > 0.0f;
    PerThread<Values<float, 5>> sums;
    block.each([&](int t) {
      sums[t] = {};
      for (int64_t k = t; valid && k < features; k += kThreads) {
        const float x = from[k], r = from[features + k], d = from[2 * features + k];
        sums[t].at[0] += x * x;
        sums[t].at[1] += r * r;
        sums[t].at[2] += r * d;
        sums[t].at[3] += d * d;
        sums[t].at[4] += (r + d) * (r + d);
      }
    });
    const PerThread<float> total = block_sum(block, sums);
    float* shared = block.shared() + kReserved;
    block.each([&](int t) {
      if (t < 5) shared[t] = total[t];
    });
    block.sync();
    const Norms<float> norm = norms(Inner<float>{shared[0], shared[1], shared[2], shared[2], shared[3], shared[4]},
                                   kLeastFloat);
    block.each([&](int t) {
      for (int64_t k = t; valid && k < features; k += kThreads) {
        const float r = from[features + k];
        to[k] = from[k];
        to[features + k] = r / norm.real;
        to[2 * features + k] = unit_change(r, from[2 * features + k], norm);
      }
      if (t == 0) {
        to[3 * features] = from[3 * features];
        unit_norms[block.index()] = norm.clamped ? -norm.student : norm.student;
      }
    });
  }
};

// Similarities, excesses [B, n, n] and divergences [B, n] from Grams, kWarps rows to a block.
struct DivergencePass {
  static constexpr const char* kName = "divergence_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  int64_t n;
  float* grams;
  Validity validity;
  const float* unit_norms;  // of GramProducts
  Number<float> temperature;
  float *similarity, *excess, *divergence, *counts;

  CODMD_HD static int64_t blocks_per_relation(int64_t n) { return (n + kWarps - 1) / kWarps; }

  CODMD_DEVICE void operator()(Block& block) const {
    const int64_t each = blocks_per_relation(n), b = quotient(block.index(), each);
    const int64_t first = (block.index() - b * each) * kWarps;
    const GramProducts products{grams_at(grams, b, n), validity, unit_norms, b, n};
    const int64_t count = count_valid(products, n);
    diverge_rows(block, products, n, count, first, products.too_small() ? NAN : temperature(),
                 similarity + b * n * n, excess + b * n * n, divergence + b * n);
    block.each([&](int t) {
      if (first == 0 && t == 0) counts[b] = float(count);
    });
  }
};

// scale * M [B, n, n].
struct MatrixPass {
  static constexpr const char* kName = "matrix_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  int64_t n;
  float* grams;
  Validity validity;
  const float* unit_norms;  // of GramProducts
  Number<float> temperature;
  float scale;
  const float *similarity, *excess, *counts;
  float* matrix;

  CODMD_DEVICE void operator()(Block& block) const {
    const int64_t each = DivergencePass::blocks_per_relation(n), b = quotient(block.index(), each);
    const GramProducts products{grams_at(grams, b, n), validity, unit_norms, b, n};
    gradient_rows(block, products, n, int64_t(counts[b]), (block.index() - b * each) * kWarps, temperature(), scale,
                  similarity + b * n * n, excess + b * n * n, matrix + b * n * n);
  }
};

// A relation's part of the terms: divergences [relations, n], valid rows [relations]. Absent at null.
struct TermPart {
  const float *divergence, *counts;
  int64_t relations, n;

  // The mean over relations of the mean over valid rows, by one thread per relation and a fixed order.
  CODMD_DEVICE void add(int t, float& sum) const {
    if (!divergence) return;
    for (int64_t b = t; b < relations; b += kThreads) {
      float own = 0.0f;
      for (int64_t i = 0; i < n; ++i) own += divergence[b * n + i];
      if (counts[b] > 1.0f) sum += own / counts[b] / float(relations);
    }
  }
};

struct TermsPass {
  static constexpr const char* kName = "terms_pass";
  static constexpr int kBlocksPerMultiprocessor = 1;

  TermPart frames, batch;
  Numbers numbers;
  const float* dmd;   // (loss, mean|g|) of an objective, or null
  const float* kept;  // the terms of the stage before a gather, or null
  bool objective;     // which `kept` are of
  float* terms;

  CODMD_DEVICE void operator()(Block& block) const {
    PerThread<Values<float, 2>> sums;
    block.each([&](int t) {
      sums[t] = {};
      frames.add(t, sums[t].at[0]);
      batch.add(t, sums[t].at[1]);
    });
    const PerThread<float> total = block_sum(block, sums);
    float* shared = block.shared() + kReserved;
    block.each([&](int t) {
      if (t < 2) shared[t] = total[t];
    });
    block.sync();
    block.each([&](int t) {
      if (t != 0) return;
      if (kept)
        write_gathered_terms(terms, shared[1], numbers, kept, objective);
      else
        write_terms(terms, shared[1], shared[0], numbers, dmd);
    });
  }
};

// out[b, i] = scale * sum_j matrix[b, first_row + i, j] x[b, j] + the batch term's share, for every pixel. A warp
// makes four rows, a lane 16 bytes of pixels; x comes through shared memory, 16 rows at a time.
template <class T>
struct MixPass {
  static constexpr const char* kName = "mix_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kRows = 4, kBand = kRows * kWarps, kDepth = 16;
  static constexpr int kPixels = kWarp * kVector<T>;
  static constexpr int64_t kSharedFloats = int64_t(kDepth) * (kPixels + kBand);

  PixelRows rows;     // shape.frames = columns of the matrix
  Tensor x, out;
  int64_t first_row, count;  // rows wanted
  Validity validity;
  const float* matrix;       // [B, n, n], or null
  Scale<float> scale;
  const float* batch_grad;   // [B, K], shared by the frames of the mask; or null
  Scale<float> batch_scale;

  CODMD_DEVICE void operator()(Block& block) const {
    constexpr int vector = kVector<T>;
    const int64_t n = rows.shape.frames, features = rows.features();
    const int64_t tiles = (features + kPixels - 1) / kPixels, bands = (count + kBand - 1) / kBand;
    const int64_t work = quotient(block.index(), tiles), tile = block.index() - work * tiles;
    const int64_t b = quotient(work, bands), band = (work - b * bands) * kBand;
    float* staged = block.shared() + kReserved;  // [kDepth, kPixels]
    float* weights = staged + kDepth * kPixels;  // [kDepth, kBand]

    PerThread<Values<float, kRows * vector>> sums;
    block.each([&](int t) { sums[t] = {}; });
    for (int64_t first = 0; matrix && first < n; first += kDepth) {
      block.each([&](int t) { stage(t, b, band, first, n, tile * kPixels, staged, weights); });
      block.sync();
      block.each([&](int t) {
        const float* pixels = staged + t % kWarp * vector;
        const float* own = weights + t / kWarp * kRows;
CODMD_UNROLL
        for (int j = 0; j < kDepth; ++j) {
          const Vector<float> factor = *reinterpret_cast<const Vector<float>*>(own + j * kBand);
CODMD_UNROLL
          for (int part = 0; part < vector; part += 4) {
            const Vector<float> value = *reinterpret_cast<const Vector<float>*>(pixels + j * kPixels + part);
CODMD_UNROLL
            for (int i = 0; i < kRows; ++i)
CODMD_UNROLL
              for (int e = 0; e < 4; ++e) sums[t].at[i * vector + part + e] += factor.at[i] * value.at[e];
          }
        }
      });
      block.sync();
    }
    block.each([&](int t) { write(b, band + t / kWarp * kRows, tile * kPixels + t % kWarp * vector, n, sums[t]); });
  }

  CODMD_DEVICE void stage(int t, int64_t b, int64_t band, int64_t first, int64_t n, int64_t pixel, float* staged,
                          float* weights) const {
    constexpr int vector = kVector<T>;
    for (int row = t / kWarp; row < kDepth; row += kWarps) {
      float values[vector] = {};
      if (first + row < n && validity(b, first + row))
        read_pixels<T>(rows, x, b, first + row, pixel + t % kWarp * vector, values);
CODMD_UNROLL
      for (int e = 0; e < vector; ++e) staged[row * kPixels + t % kWarp * vector + e] = values[e];
    }
    for (int at = t; at < kDepth * kBand; at += kThreads) {
      const int64_t i = band + at % kBand, j = first + at / kBand;
      weights[at] = i < count && j < n ? matrix[(b * n + first_row + i) * n + j] : 0.0f;
    }
  }

  CODMD_DEVICE void write(int64_t b, int64_t row, int64_t pixel, int64_t n,
                          const Values<float, kRows * kVector<T>>& sums) const {
    constexpr int vector = kVector<T>;
    const float factor = matrix ? scale() : 0.0f;
    float share = 0.0f;
    if (batch_grad) {
      const int64_t valid = validity.mask.count(b, n);
      share = batch_scale() / float(valid > 0 ? valid : 1);
    }
CODMD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= count) continue;
      const bool valid = validity(b, first_row + row + i);
      float values[vector];
CODMD_UNROLL
      for (int e = 0; e < vector; ++e) {
        values[e] = valid && matrix ? factor * sums.at[i * vector + e] : 0.0f;
        if (valid && batch_grad && pixel + e < rows.features())
          values[e] += share * batch_grad[b * rows.features() + pixel + e];
      }
      write_pixels<T>(rows, out, b, row + i, pixel, values);
    }
  }
};

}  // namespace codmd::cuda
