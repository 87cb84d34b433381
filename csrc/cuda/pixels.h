// SPDX-License-Identifier: Apache-2.0
//
// Every pixel as a feature: a vector of C*H*W numbers per row, read in runs of neighbouring pixels.
#pragma once

#include "tensors.h"

namespace codmd::cuda {

// Which rows take part: frames under a mask, or rows of a table whose count is positive.
struct Validity {
  FrameMask mask;
  const float* count;  // of row (b, i) at b * relation_pitch + i * pitch; null: the mask decides
  int64_t relation_pitch, pitch;
  CODMD_HD bool operator()(int64_t b, int64_t i) const {
    return count ? count[b * relation_pitch + i * pitch] > 0.0f : mask.valid(b, i);
  }
};

// Rows (b, frame) of `features` pixels in the order (c, y, x). With `wide`, a chunk of kVector pixels that starts at
// a multiple of kVector lies on a 16-byte boundary of every tensor and does not leave its run of neighbours, a plane
// or one row of it.
struct PixelRows {
  Shape shape;
  bool wide;

  CODMD_HD int64_t features() const { return shape.channels * shape.height * shape.width; }

  CODMD_HD int64_t offset(const Tensor& tensor, int64_t b, int64_t row, int64_t pixel) const {
    const int64_t line = quotient(pixel, shape.width), x = pixel - line * shape.width;
    const int64_t c = quotient(line, shape.height);
    return tensor.offset(b, row, c, line - c * shape.height, x);
  }
};

// Pixels first .. first + N - 1 of a row as float32, 0 beyond the last; N is kVector<T>.
template <class T, int N>
CODMD_DEVICE void read_pixels(const PixelRows& rows, const Tensor& tensor, int64_t b, int64_t row, int64_t first,
                              float (&out)[N]) {
  const T* data = static_cast<const T*>(tensor.data);
  if (rows.wide) {
    if (first < rows.features()) return load<T>(data + rows.offset(tensor, b, row, first), out, Count<N>{});
  } else {
CODMD_UNROLL
    for (int n = 0; n < N; ++n) {
      out[n] = 0.0f;
      if (first + n < rows.features()) out[n] = to_float(data[rows.offset(tensor, b, row, first + n)]);
    }
    return;
  }
CODMD_UNROLL
  for (int n = 0; n < N; ++n) out[n] = 0.0f;
}

template <class T, int N>
CODMD_DEVICE void write_pixels(const PixelRows& rows, const Tensor& tensor, int64_t b, int64_t row, int64_t first,
                               const float (&values)[N]) {
  T* data = static_cast<T*>(const_cast<void*>(tensor.data));
  if (rows.wide) {
    if (first < rows.features()) store<T>(data + rows.offset(tensor, b, row, first), values, Count<N>{});
    return;
  }
CODMD_UNROLL
  for (int n = 0; n < N; ++n)
    if (first + n < rows.features()) from_float(values[n], data[rows.offset(tensor, b, row, first + n)]);
}

// 16-byte chunks hold whole runs: planes without gaps where they can be, rows otherwise.
inline PixelRows pixel_rows(const Shape& shape, int64_t bytes, std::initializer_list<Tensor> tensors) {
  const int64_t vector = 16 / bytes, sizes[4] = {shape.batch, shape.frames, shape.channels, shape.height};
  bool flat = true;
  for (const Tensor& tensor : tensors) flat = flat && tensor.flat(shape);
  const int64_t run = flat ? shape.height * shape.width : shape.width;
  bool wide = run % vector == 0;
  for (const Tensor& tensor : tensors) {
    if (!tensor.data) continue;
    wide = wide && reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && (tensor.stride[4] == 1 || shape.width == 1);
    for (int axis = 0; axis < (flat ? 3 : 4); ++axis)
      wide = wide && (sizes[axis] == 1 || tensor.stride[axis] % vector == 0);
  }
  return {shape, wide};
}

}  // namespace codmd::cuda
