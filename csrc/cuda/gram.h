// SPDX-License-Identifier: Apache-2.0
//
// Inner products of long rows: x.x, r.r, d.d (symmetric) and r.d, and |r + d|^2, all from one read of x, r and d.
//
// Rows are taken in panels of 24. A block owns a pair of panels and a range of pixels; it brings 32 pixels of every
// row to shared memory as float32, pixel by pixel, and its threads each own a 4 x 4 tile of products and every
// `groups`-th pixel. Products are IEEE float32: TF32 would cost a cosine three digits. Sums are blocked, 32 pixels at
// a time, then splits of the pixels are added in order by the last block of the pair.
#pragma once

#include "pixels.h"
#include "relation_rows.h"

namespace codmd::cuda {

constexpr int kPanel = 24;
constexpr int kQuads = kPanel / 4;
constexpr int kChunk = 32;
constexpr int kTileFloats = 20;  // 4 x 4 products, 4 of |r + d|^2

CODMD_HD inline int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }
CODMD_HD inline int64_t panel_pairs(int64_t n) { return panels_of(n) * (panels_of(n) + 1) / 2; }

struct PanelPair {
  int64_t a, b;  // a <= b
};
CODMD_HD inline PanelPair panel_pair(int64_t index, int64_t panels) {
  int64_t a = 0;
  while (index >= panels - a) {
    index -= panels - a;
    ++a;
  }
  return {a, a + index};
}

// Parts of a staged line, in shared memory: x, r, d of panel a, then of panel b when it is another.
enum Part : int { kX = 0, kR = 1, kD = 2 };

// A 4 x 4 tile: quads of rows of panel a or b on the left and on the right.
struct Tile {
  int left_part, right_part, left_panel, right_panel, left_quad, right_quad;
  CODMD_HD bool diagonal() const { return left_panel == right_panel && left_quad == right_quad; }
};

CODMD_HD inline int tiles_of(int quads_a, int quads_b, bool same) {
  return same ? 3 * (quads_a * (quads_a + 1) / 2) + quads_a * quads_a : 5 * quads_a * quads_b;
}

// Tiles in the order x.x, r.r, d.d, r.d and, between two panels, r.d with the panels exchanged.
CODMD_HD inline Tile tile_at(int index, int quads_a, int quads_b, bool same) {
  const int triangle = quads_a * (quads_a + 1) / 2, each = same ? triangle : quads_a * quads_b;
  const int kind = index < 3 * each ? index / each : 3 + (index - 3 * each) / (quads_a * quads_b);
  int rest = kind < 3 ? index - kind * each : (index - 3 * each) % (quads_a * quads_b);
  if (kind == 4) return {kR, kD, 1, 0, rest % quads_b, rest / quads_b};
  Tile tile{kind == 3 ? int(kR) : kind, kind == 3 ? int(kD) : kind, 0, same ? 0 : 1, 0, 0};
  if (same && kind < 3) {
    while (rest >= quads_a - tile.left_quad) rest -= quads_a - tile.left_quad++;
    tile.right_quad = tile.left_quad + rest;
  } else {
    tile.left_quad = rest / quads_b;
    tile.right_quad = rest % quads_b;
  }
  return tile;
}

// Products of n rows of one relation; rd[i, j] = r_i . d_j.
struct Grams {
  float *xx, *rr, *rd, *dd;  // [n, n]
  float* ff;                 // [n]
};

CODMD_HD inline int64_t gram_floats(int64_t n) { return 4 * n * n + n; }
CODMD_HD inline Grams grams_at(float* base, int64_t relation, int64_t n) {
  float* own = base + relation * gram_floats(n);
  return {own, own + n * n, own + 2 * n * n, own + 3 * n * n, own + 4 * n * n};
}

// `unit_norms` are the student norms [relations, n] of rows whose scores are unit vectors by now (FeatureProducts);
// null: rows as they are.
struct GramProducts {
  Grams grams;
  Validity validity;
  const float* unit_norms;
  int64_t b, n;

  CODMD_DEVICE bool valid(int64_t i) const { return validity(b, i); }
  CODMD_DEVICE Inner<float> pair(int64_t i, int64_t j) const {
    const int64_t at = i * n + j;
    const float xx = grams.xx[at], rr = grams.rr[at], rd = grams.rd[at], dr = grams.rd[j * n + i], dd = grams.dd[at];
    // Paired so that they cancel exactly when f_i or f_j is zero.
    return {xx, rr, rd, dr, dd, (rr + dr) + (rd + dd)};
  }
  CODMD_DEVICE Norms<float> norm(int64_t i) const {
    Inner<float> own = pair(i, i);
    own.ff = grams.ff[i];
    return norms(own, kLeastGram);
  }
  // Whether the scores are so small throughout that their squares left float32; zeros are not.
  CODMD_DEVICE bool too_small() const {
    float largest = 0.0f;
    for (int64_t i = 0; !unit_norms && i < n; ++i)
      if (valid(i)) largest = fmaxf(largest, fmaxf(grams.rr[i * n + i], grams.dd[i * n + i]));
    return largest > 0.0f && largest < 1e-30f;
  }
  CODMD_DEVICE Related relate(int64_t i, int64_t j) const {
    const Inner<float> own = pair(i, j);
    if (unit_norms) return {student_cosine(i, j), unit_score_difference(own)};
    const Norms<float> left = norm(i), right = norm(j);
    return {cosine(own, left, right), score_difference(own, left, right)};
  }
  // x_i.x_j / (|x_i| |x_j|), rounded as if by one operation: what the norms, their product and the quotient lose is
  // added in the end. At a low temperature it would be most of the loss's error.
  CODMD_DEVICE float student_cosine(int64_t i, int64_t j) const {
    const float left = student_norm(i), right = student_norm(j), product = fabsf(left) * fabsf(right);
    const float cosine = grams.xx[i * n + j] / product;
    const float lost = fmaf(-cosine, product, grams.xx[i * n + j]) -
                       cosine * fmaf(fabsf(left), fabsf(right), -product);
    return cosine + (lost / product - cosine * (norm_error(i, left) + norm_error(j, right)));
  }
  // Of a norm that is a rounded root: the relative distance to the root itself.
  CODMD_DEVICE float norm_error(int64_t i, float norm) const {
    const float square = grams.xx[i * n + i];
    return norm > 0.0f ? fmaf(-norm, norm, square) / (2.0f * square) : 0.0f;
  }
  CODMD_DEVICE float student_norm(int64_t i) const {
    if (unit_norms) return unit_norms[b * n + i];
    const Norms<float> own = norm(i);
    return own.clamped ? -own.student : own.student;
  }
};

// A number other than zero whose square is one: below sqrt(FLT_MIN) its place is taken by that.
CODMD_HD inline float squarable(float value) {
  return value != 0.0f && fabsf(value) < 0x1p-63f ? copysignf(0x1p-63f, value) : value;
}

template <class T>
struct GramPass {
  static constexpr const char* kName = "gram_pass";
  static constexpr int kBlocksPerMultiprocessor = 2;

  PixelRows rows;  // shape.frames rows to a relation, shape.batch relations
  Tensor student, real, other;
  bool is_difference;  // other is d itself, not fake
  Validity validity;
  int64_t splits;
  float* partial;      // [B * pairs, splits, tiles, kTileFloats]
  uint32_t* counters;  // [B * pairs]
  float* grams;        // [B, gram_floats(n)]

  static constexpr int64_t kPartialFloats = int64_t(kThreads) * kTileFloats;
  static constexpr int64_t kSharedFloats = kPartialFloats;
  static_assert(kSharedFloats >= kChunk * 6 * kPanel, "the staged pixels fit");

  struct Sums {
    float total[kTileFloats], chunk[kTileFloats];
  };

  CODMD_DEVICE void operator()(Block& block) const {
    const int64_t n = rows.shape.frames, panels = panels_of(n), pairs = panel_pairs(n);
    const int64_t work = quotient(block.index(), splits), split = block.index() - work * splits;
    const int64_t b = quotient(work, pairs);
    const PanelPair pair = panel_pair(work - b * pairs, panels);
    const bool same = pair.a == pair.b;
    const int quads_a = quads(pair.a, n), quads_b = quads(pair.b, n), tiles = tiles_of(quads_a, quads_b, same);
    const int groups = kThreads / tiles < kChunk ? kThreads / tiles : kChunk;
    const int line = (same ? 3 : 6) * kPanel;

    float* staged = block.shared() + kReserved;
    PerThread<Tile> tile;
    PerThread<Sums> sums;
    block.each([&](int t) {
      tile[t] = tile_at(t % tiles, quads_a, quads_b, same);
CODMD_UNROLL
      for (int e = 0; e < kTileFloats; ++e) sums[t].total[e] = 0.0f;
    });
    const int64_t chunks = (rows.features() + kChunk - 1) / kChunk;
    const int64_t first = quotient(split * chunks, splits), last = quotient((split + 1) * chunks, splits);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      block.each([&](int t) { stage(t, b, pair, same, n, chunk * kChunk, line, staged); });
      block.sync();
      block.each([&](int t) {
        if (t < tiles * groups) multiply(tile[t], staged, line, t / tiles, groups, sums[t]);
      });
      block.sync();
    }

    block.each([&](int t) {
      for (int e = 0; e < kTileFloats && t < tiles * groups; ++e) staged[t * kTileFloats + e] = sums[t].total[e];
    });
    block.sync();
    float* own = partial + block.index() * kPartialFloats;
    block.each([&](int t) {
      for (int at = t; at < tiles * kTileFloats; at += kThreads) {
        float sum = 0.0f;
        for (int group = 0; group < groups; ++group) sum += staged[group * tiles * kTileFloats + at];
        own[at] = sum;
      }
    });
    if (!block.is_last(counters + work, uint32_t(splits))) return;
    const Grams out = grams_at(grams, b, n);
    const float* parts = partial + work * splits * kPartialFloats;
    block.each([&](int t) {
      for (int at = t; at < tiles * kTileFloats; at += kThreads) {
        float sum = 0.0f;
        for (int64_t s = 0; s < splits; ++s) sum += parts[s * kPartialFloats + at];
        write(tile_at(at / kTileFloats, quads_a, quads_b, same), at % kTileFloats, pair, n, sum, out);
      }
    });
  }

  CODMD_DEVICE static int quads(int64_t panel, int64_t n) {
    const int64_t left = n - panel * kPanel;
    return left < kPanel ? int((left + 3) / 4) : kQuads;
  }

  // Pixels first .. first + 31 of all rows of the panels; 0 for rows that take no part.
  CODMD_DEVICE void stage(int t, int64_t b, PanelPair pair, bool same, int64_t n, int64_t first, int line,
                          float* staged) const {
    constexpr int vector = kVector<T>;
    const int count = same ? kPanel : 2 * kPanel;
    for (int item = t; item < count * (kChunk / vector); item += kThreads) {
      const int at = item % count, piece = item / count;
      const int64_t row = at < kPanel ? pair.a * kPanel + at : pair.b * kPanel + at - kPanel;
      float x[vector] = {}, r[vector] = {}, d[vector] = {};
      if (row < n && validity(b, row)) {
        const int64_t pixel = first + piece * vector;
        read_pixels<T>(rows, student, b, row, pixel, x);
        read_pixels<T>(rows, real, b, row, pixel, r);
        read_pixels<T>(rows, other, b, row, pixel, d);
CODMD_UNROLL
        for (int e = 0; e < vector; ++e) {
          d[e] = squarable(is_difference ? d[e] : difference_of(r[e], d[e]));
          r[e] = squarable(r[e]);
        }
      }
      float* to = staged + piece * vector * line + (at < kPanel ? at : 3 * kPanel + at - kPanel);
CODMD_UNROLL
      for (int e = 0; e < vector; ++e) {
        to[e * line + kX * kPanel] = x[e];
        to[e * line + kR * kPanel] = r[e];
        to[e * line + kD * kPanel] = d[e];
      }
    }
  }

  CODMD_DEVICE static void multiply(const Tile& tile, const float* staged, int line, int group, int groups,
                                    Sums& sums) {
    const float* left = staged + (3 * tile.left_panel + tile.left_part) * kPanel + 4 * tile.left_quad;
    const float* right = staged + (3 * tile.right_panel + tile.right_part) * kPanel + 4 * tile.right_quad;
    const bool squares = tile.diagonal() && tile.left_part != tile.right_part;
CODMD_UNROLL
    for (int e = 0; e < kTileFloats; ++e) sums.chunk[e] = 0.0f;
    for (int pixel = group; pixel < kChunk; pixel += groups) {
      const Vector<float> a = *reinterpret_cast<const Vector<float>*>(left + pixel * line);
      const Vector<float> c = *reinterpret_cast<const Vector<float>*>(right + pixel * line);
CODMD_UNROLL
      for (int i = 0; i < 4; ++i)
CODMD_UNROLL
        for (int j = 0; j < 4; ++j) sums.chunk[4 * i + j] += a.at[i] * c.at[j];
      if (squares) {
CODMD_UNROLL
        for (int i = 0; i < 4; ++i) sums.chunk[16 + i] += (a.at[i] + c.at[i]) * (a.at[i] + c.at[i]);
      }
    }
CODMD_UNROLL
    for (int e = 0; e < kTileFloats; ++e) sums.total[e] += sums.chunk[e];
  }

  CODMD_DEVICE static void write(const Tile& tile, int entry, PanelPair pair, int64_t n, float value,
                                 const Grams& out) {
    const int row = entry < 16 ? entry / 4 : entry - 16;
    const int64_t i = (tile.left_panel ? pair.b : pair.a) * kPanel + 4 * tile.left_quad + row;
    if (entry >= 16) {
      if (tile.diagonal() && tile.left_part != tile.right_part && i < n) out.ff[i] = value;
      return;
    }
    const int64_t j = (tile.right_panel ? pair.b : pair.a) * kPanel + 4 * tile.right_quad + entry % 4;
    if (i >= n || j >= n) return;
    if (tile.left_part != tile.right_part) {
      out.rd[i * n + j] = value;
      return;
    }
    float* matrix = tile.left_part == kX ? out.xx : tile.left_part == kR ? out.rr : out.dd;
    matrix[i * n + j] = value;
    // Both halves of a diagonal tile are there already, and hold the same sums.
    if (!tile.diagonal()) matrix[j * n + i] = value;
  }
};

}  // namespace codmd::cuda
