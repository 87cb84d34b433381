// SPDX-License-Identifier: Apache-2.0
#include "long_relation.h"

namespace codmd::cuda {

LongRows table_rows(const float* table, int64_t relations, int64_t n, int64_t features) {
  const int64_t pitch = row_pitch(features);
  const auto part = [&](int64_t which) {
    return Tensor{table ? table + which * features : nullptr, {n * pitch, pitch, 0, 0, 1}};
  };
  const Validity validity{{}, table ? table + 3 * features : nullptr, n * pitch, pitch};
  return {{relations, n, 1, 1, features}, DType::f32, part(0), part(1), part(2), true, validity,
          nullptr};
}

LongRows unit_rows(const Run& run, Arena& arena, const float* table, int64_t relations, int64_t n, int64_t features) {
  float* units = arena.take<float>(relations * n * row_pitch(features));
  float* norms = arena.take<float>(relations * n);
  LongRows rows = table_rows(units, relations, n, features);
  rows.unit_norms = norms;
  if (!arena.counting()) launch(UnitPass{features, table, units, norms}, relations * n, 5, run.stream);
  return rows;
}

namespace {

PixelRows pixels_of(const LongRows& rows) {
  return pixel_rows(rows.shape, element_size(rows.dtype), {rows.student, rows.real, rows.other});
}

// Enough blocks to fill the device, none with fewer than eight chunks of pixels.
int64_t gram_splits(const Run& run, const Shape& shape) {
  const int64_t features = shape.pixels(), chunks = (features + kChunk - 1) / kChunk;
  const int64_t blocks = shape.batch * panel_pairs(shape.frames);
  const int64_t wanted = (kWaves * run.processors + blocks - 1) / blocks;
  const int64_t splits = wanted < chunks / 8 ? wanted : chunks / 8;
  return splits < 1 ? 1 : splits;
}

}  // namespace

int64_t long_counters(int64_t relations, int64_t n) { return relations * panel_pairs(n); }

TermPart long_relation(const Run& run, Arena& arena, const LongRows& rows, Number<float> temperature, float scale,
                       float*& matrix) {
  const int64_t relations = rows.shape.batch, n = rows.shape.frames, splits = gram_splits(run, rows.shape);
  const int64_t pairs = relations * panel_pairs(n);
  float* partial = arena.take<float>(pairs * splits * GramPass<float>::kPartialFloats);
  float* grams = arena.take<float>(relations * gram_floats(n));
  float* similarity = arena.take<float>(relations * n * n);
  float* excess = arena.take<float>(relations * n * n);
  float* divergence = arena.take<float>(relations * n);
  float* counts = arena.take<float>(relations);
  if (!matrix) matrix = arena.take<float>(relations * n * n);
  if (arena.counting()) return {};

  with_type(rows.dtype, [&](auto element) {
    using T = decltype(element);
    const GramPass<T> pass{pixels_of(rows), rows.student, rows.real,    rows.other, rows.is_difference,
                           rows.validity,   splits,       partial,      run.counters, grams};
    launch(pass, pairs * splits, GramPass<T>::kSharedFloats, run.stream);
  });
  const int64_t blocks = relations * DivergencePass::blocks_per_relation(n);
  const DivergencePass diverge{n,          grams,  rows.validity, rows.unit_norms, temperature,
                               similarity, excess, divergence,    counts};
  launch(diverge, blocks, 0, run.stream);
  const MatrixPass gradient{n,     grams,      rows.validity, rows.unit_norms, temperature,
                            scale, similarity, excess,        counts,          matrix};
  launch(gradient, blocks, 0, run.stream);
  return {divergence, counts, relations, n};
}

void long_means(const Run& run, const Arena& arena, const LongRows& rows, float* out) {
  if (arena.counting()) return;
  with_type(rows.dtype, [&](auto element) {
    using T = decltype(element);
    const MeanPass<T> pass{pixels_of(rows), rows.student, rows.real, rows.other, rows.is_difference, rows.validity,
                           out};
    launch(pass, rows.shape.batch * MeanPass<T>::blocks_per_sample(pass.rows.features()), 0, run.stream);
  });
}

void long_mix(const Run& run, const Arena& arena, const LongRows& rows, const float* matrix, Scale<float> scale,
              const float* batch_grad, Scale<float> batch_scale, const Tensor& out, int64_t first_row, int64_t count) {
  if (arena.counting()) return;
  const PixelRows pixels = pixel_rows(rows.shape, element_size(rows.dtype), {rows.student, out});
  with_type(rows.dtype, [&](auto element) {
    using T = decltype(element);
    const MixPass<T> pass{pixels, rows.student, out,   first_row,  count,      rows.validity,
                          matrix, scale,        batch_grad, batch_scale};
    const int64_t tiles = (pixels.features() + pass.kPixels - 1) / pass.kPixels;
    launch(pass, rows.shape.batch * tiles * ((count + pass.kBand - 1) / pass.kBand), pass.kSharedFloats, run.stream);
  });
}

void long_terms(const Run& run, const Arena& arena, const TermsPass& pass) {
  if (!arena.counting()) launch(pass, 1, 2, run.stream);
}

void long_forward(const Run& run, Arena& arena, const LongRows& rows, const Numbers& numbers, bool pooled_features,
                  const float* dmd, const Found& found) {
  const Shape& shape = rows.shape;
  const int64_t features = shape.pixels(), samples = shape.batch;
  const Scale<float> one{nullptr, nullptr, {1.0f, nullptr}, {1.0f, nullptr}};
  TermPart frames{}, batch{};
  if (found.frame_grad) {
    float* matrix = pooled_features ? nullptr : found.frame_grad;
    LongRows units = rows;
    if (pooled_features) {
      const float* table = static_cast<const float*>(rows.student.data);
      units = unit_rows(run, arena, table, samples, shape.frames, features);
    }
    frames = long_relation(run, arena, units, numbers.temperature, 1.0f / float(samples), matrix);
    const Tensor out{found.frame_grad, {shape.frames * features, features, 0, 0, 1}};
    if (pooled_features) long_mix(run, arena, units, matrix, one, nullptr, one, out, 0, shape.frames);
  }
  float* pooled = found.rows;
  if (found.batch_grad && !pooled) pooled = arena.take<float>(samples * row_pitch(features));
  if (found.batch_grad || pooled) long_means(run, arena, rows, pooled);
  if (found.batch_grad) {
    float* matrix = nullptr;
    const LongRows table = unit_rows(run, arena, pooled, 1, samples, features);
    batch = long_relation(run, arena, table, numbers.temperature, 1.0f, matrix);
    const Tensor out{found.batch_grad, {0, features, 0, 0, 1}};
    long_mix(run, arena, table, matrix, one, nullptr, one, out, 0, samples);
  }
  long_terms(run, arena, {frames, batch, numbers, dmd, nullptr, false, found.terms});
}

std::string device_problem(int device) {
#if defined(__CUDACC__)
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, run<TermsPass>);
  cudaSetDevice(before);
  cudaGetLastError();
  return error == cudaSuccess ? "" : std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
#else
  return device == 0 ? "" : "simulated: there is one device, 0";
#endif
}

}  // namespace codmd::cuda
