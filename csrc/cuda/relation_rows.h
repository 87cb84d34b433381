// SPDX-License-Identifier: Apache-2.0
//
// The relation of n vectors by one block: a warp takes a row, its lanes the columns. Matrices are [n, n], row-major.
// `Products` knows the vectors, as features in shared memory or by their Grams:
//   valid(i)             whether vector i takes part
//   relate(i, j)         S_ij of the student and the score difference Delta_ij
//   student_norm(i)      max(|x_i|, 1e-12), negative where the floor holds
#pragma once

#include <cmath>
#include <cstdint>

#include "../algebra.h"
#include "block.h"

namespace codmd::cuda {

struct Related {
  float similarity, shift;
};

// Vectors that take part, the same for every thread.
template <class Products>
CODMD_DEVICE int64_t count_valid(const Products& products, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += products.valid(i) ? 1 : 0;
  return count;
}

// Rows first .. first + kWarps - 1: similarities S, excess q - p, and the divergence KL(p_i || q_i); 0 in rows and
// columns that take no part, and everywhere when fewer than two do.
template <class Products>
CODMD_DEVICE void diverge_rows(Block& block, const Products& products, int64_t n, int64_t count, int64_t first,
                               float temperature, float* similarity, float* excess, float* divergence) {
  const float overflow = 20.0f;  // as in centred_kl_row of algebra.h
  PerThread<float> top, largest;
  PerThread<Values<float, 2>> weighted;
  PerThread<Values<float, 1>> sum;
  const auto row_of = [&](int t) { return first + t / kWarp; };
  const auto takes_part = [&](int64_t i) { return i < n && count > 1 && products.valid(i); };

  block.each([&](int t) {
    const int64_t i = row_of(t);
    top[t] = -INFINITY;
    if (i >= n) return;
    const bool row = takes_part(i);
    for (int64_t j = t % kWarp; j < n; j += kWarp) {
      Related related{0.0f, 0.0f};
      if (row && products.valid(j)) {
        related = products.relate(i, j);
        top[t] = fmaxf(top[t], related.similarity);
      }
      similarity[i * n + j] = related.similarity;
      excess[i * n + j] = related.shift;
    }
  });
  block.warp_max(top);

  // The softmax over columns that take part; calls use(j, q, log q) once the partition is known.
  const auto weight = [&](int t, int64_t j) { return expf((similarity[row_of(t) * n + j] - top[t]) / temperature); };
  const auto each_column = [&](int t, auto use) {
    const int64_t i = row_of(t);
    if (!takes_part(i)) return;
    for (int64_t j = t % kWarp; j < n; j += kWarp)
      if (products.valid(j)) use(i * n + j, j);
  };
  block.each([&](int t) {
    weighted[t] = {};
    each_column(t, [&](int64_t at, int64_t j) {
      const float w = weight(t, j);
      weighted[t].at[0] += w;
      weighted[t].at[1] += w * excess[at];
    });
  });
  block.warp_sum(weighted);

  block.each([&](int t) {
    sum[t] = {};
    largest[t] = -INFINITY;
    const float partition = weighted[t].at[0], mean = weighted[t].at[1] / partition, log_partition = logf(partition);
    each_column(t, [&](int64_t at, int64_t j) {
      const float q = weight(t, j) / partition, log_q = (similarity[at] - top[t]) / temperature - log_partition;
      const float x = (mean - excess[at]) / temperature;
      excess[at] = x;
      sum[t].at[0] += excess_term(q, log_q, x);
      largest[t] = fmaxf(largest[t], log_q + x);
    });
  });
  block.warp_sum(sum);
  block.warp_max(largest);

  PerThread<Values<float, 1>> direct;
  block.each([&](int t) {
    direct[t] = {};
    if (!(largest[t] > overflow)) return;
    const float log_partition = logf(weighted[t].at[0]);
    each_column(t, [&](int64_t at, int64_t) {
      const float log_q = (similarity[at] - top[t]) / temperature - log_partition;
      direct[t].at[0] += expf(log_q + excess[at] - largest[t]);
    });
  });
  block.warp_sum(direct);

  block.each([&](int t) {
    const bool beyond = largest[t] > overflow;
    const float log_z = beyond ? largest[t] + logf(direct[t].at[0]) : log1pf(sum[t].at[0]);
    const float partition = weighted[t].at[0], log_partition = logf(partition);
    sum[t] = {};
    each_column(t, [&](int64_t at, int64_t j) {
      const float q = weight(t, j) / partition, log_q = (similarity[at] - top[t]) / temperature - log_partition;
      const float x = excess[at], y = x - log_z, change = probability_excess(q, log_q, y);
      excess[at] = change;
      sum[t].at[0] += beyond ? (q - change) * y : -change * x;
    });
    direct[t].at[0] = beyond ? 0.0f : log_z;
  });
  block.warp_sum(sum);
  block.each([&](int t) {
    const int64_t i = row_of(t);
    if (i < n && t % kWarp == 0) divergence[i] = takes_part(i) ? sum[t].at[0] - direct[t].at[0] : 0.0f;
  });
}

// Rows first .. first + kWarps - 1 of scale * M (gradient_row of algebra.h): d(sum of KL / count)/d(x_i) is the sum
// over j of M_ij x_j. `matrix` may be `similarity` itself.
template <class Products>
CODMD_DEVICE void gradient_rows(Block& block, const Products& products, int64_t n, int64_t count, int64_t first,
                                float temperature, float scale, const float* similarity, const float* excess,
                                float* matrix) {
  const float unit = scale / (temperature * float(count > 0 ? count : 1));
  PerThread<Values<float, 1>> radial;
  const auto each_entry = [&](int t, auto use) {
    const int64_t i = first + t / kWarp;
    if (i >= n) return;
    for (int64_t j = t % kWarp; j < n; j += kWarp) use(i, j, unit * (excess[i * n + j] + excess[j * n + i]));
  };
  block.each([&](int t) {
    radial[t] = {};
    each_entry(t, [&](int64_t i, int64_t j, float h) { radial[t].at[0] += h * similarity[i * n + j]; });
  });
  block.warp_sum(radial);
  block.each([&](int t) {
    each_entry(t, [&](int64_t i, int64_t j, float h) {
      float entry = 0.0f;
      if (count > 1 && products.valid(i) && products.valid(j)) {
        const float norm = products.student_norm(i);
        const float tangent = i == j && norm > 0.0f ? h - radial[t].at[0] : h;
        // One norm after the other: the product of two small ones would leave float32's range.
        const float other = products.student_norm(j);
        entry = float_holds_matrix(fabsf(norm), fabsf(other)) ? tangent / fabsf(norm) / fabsf(other) : NAN;
      }
      matrix[i * n + j] = entry;
    });
  });
}

}  // namespace codmd::cuda
