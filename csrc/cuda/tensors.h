// SPDX-License-Identifier: Apache-2.0
//
// How the planes of latents are cut into units of work, and how a block walks through one. Offsets are int64.
#pragma once

#include <cstdint>

#include "elements.h"
#include "../types.h"

namespace codmd::cuda {

// 32-bit division where it suffices: a 64-bit one costs tens of instructions on a GPU.
CODMD_HD inline int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// One region of a grid in the plane of (b, f, c), or a part of it: chunks [first, last) of `per_row` to a row.
// Region i of n covers rows i*H/n .. (i+1)*H/n - 1. k = (c, region) is the feature.
struct Unit {
  int64_t b, f, c, k, y, x, rows, columns, per_row, first, last;
  CODMD_HD int64_t area() const { return rows * columns; }
};

struct Cut {
  Shape shape;
  Grid grid;
  int64_t splits;  // units to a region
  bool flat;       // regions span whole rows, and all tensors hold those without a gap
  bool wide;       // 16-byte accesses; one element at a time otherwise

  CODMD_HD int64_t features() const { return shape.channels * grid.height * grid.width; }
  CODMD_HD int64_t units() const { return shape.batch * shape.frames * features() * splits; }

  // Unit `index` in the order (b, f, k, split); `vector` elements make a wide chunk. A row whose start is not on a
  // boundary reaches into one chunk more.
  CODMD_HD Unit at(int64_t index, int vector) const {
    Unit unit;
    int64_t rest = quotient(index, splits);
    const int64_t split = index - rest * splits, regions = grid.height * grid.width;
    const int64_t row = quotient(rest, features());
    unit.k = rest - row * features();
    unit.b = quotient(row, shape.frames);
    unit.f = row - unit.b * shape.frames;
    unit.c = quotient(unit.k, regions);
    const int64_t region = unit.k - unit.c * regions;
    const int64_t gy = quotient(region, grid.width), gx = region - gy * grid.width;
    unit.y = quotient(gy * shape.height, grid.height);
    unit.x = quotient(gx * shape.width, grid.width);
    unit.rows = quotient((gy + 1) * shape.height, grid.height) - unit.y;
    unit.columns = quotient((gx + 1) * shape.width, grid.width) - unit.x;
    if (flat) {
      unit.columns *= unit.rows;
      unit.rows = 1;
    }
    unit.per_row = wide ? quotient(unit.columns + 2 * vector - 2, vector) : unit.columns;
    const int64_t chunks = unit.rows * unit.per_row;
    unit.first = quotient(split * chunks, splits);
    unit.last = quotient((split + 1) * chunks, splits);
    return unit;
  }
};

// Columns [begin, end) of chunk `chunk` in a row that starts `past` elements behind a boundary.
struct Span {
  int64_t begin, end;
};
CODMD_HD inline Span chunk_span(int64_t chunk, int64_t past, int64_t columns, int vector) {
  const int64_t start = chunk * vector - past, stop = start + vector;
  return {start < 0 ? 0 : start, stop > columns ? columns : stop};
}

// visit(row, column, Count<N>) for everything of the unit that thread `thread` handles, in order. `anchor` decides
// where the 16-byte boundaries lie; Cut::wide promises that all tensors agree with it.
template <class T, class Visit>
CODMD_DEVICE void each_chunk(const Cut& cut, const Unit& unit, const Tensor& anchor, int thread, Visit visit) {
  constexpr int vector = kVector<T>;
  const int64_t start = int64_t(reinterpret_cast<uintptr_t>(anchor.data) / sizeof(T)) +
                        anchor.offset(unit.b, unit.f, unit.c, unit.y, unit.x);
CODMD_ROLLED
  for (int64_t i = unit.first + thread; i < unit.last; i += kThreads) {
    const int64_t row = unit.rows == 1 ? 0 : quotient(i, unit.per_row), chunk = i - row * unit.per_row;
    if (!cut.wide) {
      visit(row, chunk, Count<1>{});
      continue;
    }
    const Span span = chunk_span(chunk, (start + row * anchor.stride[3]) & (vector - 1), unit.columns, vector);
    if (span.end - span.begin == vector) {
      visit(row, span.begin, Count<vector>{});
    } else {
CODMD_ROLLED
      for (int64_t column = span.begin; column < span.end; ++column) visit(row, column, Count<1>{});
    }
  }
}

// A tensor as seen from the first element of a unit.
template <class T>
struct View {
  const T* data;
  int64_t row, column;
  CODMD_DEVICE View(const Tensor& tensor, const Unit& unit)
      : data(tensor.data ? static_cast<const T*>(tensor.data) + tensor.offset(unit.b, unit.f, unit.c, unit.y, unit.x)
                         : nullptr),
        row(tensor.stride[3]),
        column(tensor.stride[4]) {}
  template <int N>
  CODMD_DEVICE void read(int64_t y, int64_t x, float (&out)[N], Count<N> count) const {
    load<T>(data + y * row + x * column, out, count);
  }
};

}  // namespace codmd::cuda
