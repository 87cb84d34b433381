// SPDX-License-Identifier: Apache-2.0
//
// What a call holds, for every backend: tensors by address, sizes and element strides, and the numbers that a schedule
// may change. No torch, no Python.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define CODMD_HD __host__ __device__
#else
#define CODMD_HD
#endif

namespace codmd {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

CODMD_HD inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct Shape {
  int64_t batch, frames, channels, height, width;
  CODMD_HD int64_t rows() const { return batch * frames; }
  CODMD_HD int64_t pixels() const { return channels * height * width; }  // of a frame
  CODMD_HD int64_t bytes(DType dtype) const { return rows() * pixels() * element_size(dtype); }
};

// Strides of (batch, frame, channel, y, x) in elements, whatever the order in memory; null data stands for none.
struct Tensor {
  const void* data;
  int64_t stride[5];

  CODMD_HD int64_t offset(int64_t b, int64_t f, int64_t c, int64_t y, int64_t x) const {
    return b * stride[0] + f * stride[1] + c * stride[2] + y * stride[3] + x * stride[4];
  }
  // Rows follow each other without a gap: a plane is one long row.
  CODMD_HD bool flat(const Shape& shape) const {
    return !data || shape.height == 1 || stride[3] == shape.width * stride[4];
  }
};

// Bytes [B, F], non-zero where the frame counts; null means that every frame does.
struct FrameMask {
  const uint8_t* data;
  int64_t stride[2];
  CODMD_HD bool valid(int64_t b, int64_t f) const { return !data || data[b * stride[0] + f * stride[1]] != 0; }
  CODMD_HD int64_t count(int64_t b, int64_t frames) const {
    if (!data) return frames;
    int64_t sum = 0;
    for (int64_t f = 0; f < frames; ++f) sum += valid(b, f) ? 1 : 0;
    return sum;
  }
};

// Region i of n covers rows i*H/n .. (i+1)*H/n - 1; {0, 0} keeps every pixel.
struct Grid {
  int64_t height, width;
  CODMD_HD bool every_pixel() const { return height == 0; }
  CODMD_HD int64_t features(const Shape& s) const {
    return every_pixel() ? s.pixels() : s.channels * height * width;
  }
};

// A row of pooled features: psi_x (K floats), psi_r, psi_d of fake - real, then how many frames it stands for.
CODMD_HD inline int64_t row_pitch(int64_t features) { return 3 * features + 1; }

// The relation's latents.
struct Scores {
  Shape shape;
  DType dtype;
  Tensor student, real, fake;
  FrameMask mask;
  Grid grid;
};

// The latents of the distribution matching loss. With sigma, predictions are velocities and x0 = noisy - sigma v.
// With augment_real and augment_uncond the loss is decoupled; neither real_uncond nor sigma is there then.
struct DmdScores {
  Shape shape;
  DType dtype;
  Tensor student, real, fake, real_uncond, fake_uncond, noisy, augment_real, augment_uncond;
  const float* sigma;  // [B, F] by strides, or null
  int64_t sigma_stride[2];
  Tensor mask;                 // bytes, or null
  const float* sample_weight;  // [B], or null
  CODMD_HD bool decoupled() const { return augment_real.data != nullptr; }
};

// A number of the call, or of a device tensor that kernels load instead.
template <class T>
struct Number {
  T value;
  const float* at;
  CODMD_HD T operator()() const { return at ? T(*at) : value; }
  template <class U>
  operator Number<U>() const {
    return {U(value), at};
  }
};

// Guidance scales are k in c + k (c - u).
struct Numbers {
  Number<double> temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale;
};

// The results of a forward pass. Null: not wanted. A term without its gradient is 0.
//   terms       [3] of a relation: total, batch, frame; [5] of an objective: total, dmd, batch, frame, mean|g|
//   norms       [B], [1] or [B, segments], and the same once more for the second level of a decoupled loss
//   factors     [B], dL/dx = factor G(f - r, norm)
//   frame_grad  [B, F, K] for a grid; the matrices M / B, [B, F, F], for every pixel
//   batch_grad  [B, K]
//   rows        [B, 3K + 1], the stage before a gather
struct Found {
  float *terms, *norms, *factors, *frame_grad, *batch_grad, *rows;
};

// Rows of all processes, and which of them are this one's. `kept` are the terms of the stage before.
struct Gathered {
  const float* rows;
  int64_t samples, features, first, count;
  double scale;  // of the gradient
  const float* kept;
  bool objective;
};

// Gradients of the terms; null where none arrives.
struct Upstream {
  const float *total, *dmd, *batch, *frame;
};

// What reaches a term: weight * factor * total + its own; the weight alone where neither is given.
template <class T>
struct Scale {
  const float *total, *term;
  Number<T> weight, factor;
  CODMD_HD bool reached() const { return total || term; }
  CODMD_HD T operator()() const {
    if (!reached()) return weight();
    return (total ? weight() * factor() * T(*total) : T(0)) + (term ? T(*term) : T(0));
  }
};

// The scales of an objective, or of a relation alone.
template <class T>
struct Scales {
  Scale<T> dmd, batch, frame;
  Scales(const Upstream& up, const Numbers& numbers, bool objective)
      : dmd{up.total, up.dmd, {1, nullptr}, {1, nullptr}},
        batch{up.total, up.batch, numbers.batch_weight, relation(numbers, objective)},
        frame{up.total, up.frame, numbers.frame_weight, relation(numbers, objective)} {}

 private:
  static Number<double> relation(const Numbers& numbers, bool objective) {
    return objective ? numbers.relation_weight : Number<double>{1, nullptr};
  }
};

// terms of a relation; with `dmd` = (loss, mean|g|), those of an objective.
CODMD_HD inline void write_terms(float* terms, double batch, double frame, const Numbers& numbers, const float* dmd) {
  const double relation = numbers.batch_weight() * batch + numbers.frame_weight() * frame;
  if (dmd) {
    const float loss = dmd[0], magnitude = dmd[1];
    *terms++ = float(double(loss) + numbers.relation_weight() * relation);
    *terms++ = loss;
    terms[2] = magnitude;
  } else {
    *terms++ = float(relation);
  }
  terms[0] = float(batch);
  terms[1] = float(frame);
}

// The terms of the stage before a gather, with the batch term of gathered rows.
CODMD_HD inline void write_gathered_terms(float* terms, double batch, const Numbers& numbers, const float* kept,
                                          bool objective) {
  const float dmd[2] = {kept[1], kept[objective ? 4 : 2]};
  write_terms(terms, batch, double(kept[objective ? 3 : 2]), numbers, objective ? dmd : nullptr);
}

}  // namespace codmd
