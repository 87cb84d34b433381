// SPDX-License-Identifier: Apache-2.0
#include "grams.h"

#include <algorithm>
#include <cstring>

#include "passes.h"
#include "valid_rows.h"

namespace codmd {
namespace {

// Visits the maximal pieces of constant stride: visit(address, stride, offset in the chunk, length).
template <class Visit>
void each_run(const Tensor& latent, const Shape& shape, DType dtype, int64_t b, int64_t f, int64_t first, int64_t n,
              const Visit& visit) {
  const int64_t* s = latent.stride;
  const int64_t plane = shape.height * shape.width;
  int64_t run = shape.width;
  if (shape.height == 1 || s[3] == shape.width * s[4]) run = plane;
  if (run == plane && (shape.channels == 1 || s[2] == plane * s[4])) run = plane * shape.channels;

  for (int64_t done = 0; done < n;) {
    const int64_t pixel = first + done, within = pixel % run, length = std::min(n - done, run - within);
    const int64_t start = pixel - within, c = start / plane, y = start % plane / shape.width;
    visit(address(latent, dtype, b, f, c, y, 0) + within * s[4] * element_size(dtype), s[4], done, length);
    done += length;
  }
}

void exact_gram(const float* rows, int64_t pitch, int64_t n, int64_t length, double* gram) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j)
      for (int64_t k = 0; k < length; ++k) gram[i * n + j] += double(rows[i * pitch + k]) * double(rows[j * pitch + k]);
}

}  // namespace

double square_of(const float* row, int64_t length) {
  double sum = 0;
  for (int64_t k = 0; k < length; ++k) sum += double(row[k]) * double(row[k]);
  return sum;
}

int64_t padded(int64_t n) { return (n + kLane - 1) / kLane * kLane; }

void load_pixels(const Tensor& latent, const Shape& shape, DType dtype, int64_t b, int64_t f, int64_t first,
                 int64_t n, float* to) {
  const auto load = passes().load[int(dtype)];
  each_run(latent, shape, dtype, b, f, first, n, [&](const char* from, int64_t stride, int64_t at, int64_t length) {
    load(from, stride, length, to + at);
  });
  std::fill(to + n, to + padded(n), 0.0f);
}

void store_pixels(const float* from, const Tensor& latent, const Shape& shape, DType dtype, int64_t b, int64_t f,
                  int64_t first, int64_t n) {
  const auto store = passes().store[int(dtype)];
  each_run(latent, shape, dtype, b, f, first, n, [&](const char* to, int64_t stride, int64_t at, int64_t length) {
    store(from + at, length, const_cast<char*>(to), stride);
  });
}

void GramSums::add(const float* students, const float* scores, int64_t length, bool exact) {
  const auto gram = exact ? exact_gram : passes().gram;
  gram(students, kChunk, rows_, length, students_.data());
  gram(scores, kChunk, 2 * rows_, length, scores_.data());
  if (exact) gram(scores + 2 * rows_ * kChunk, kChunk, rows_, length, fakes_.data());
}

void GramSums::clear() {
  for (auto* sums : {&students_, &scores_, &fakes_, &fake_squared_}) std::fill(sums->begin(), sums->end(), 0.0);
}

bool GramSums::in_range() const {
  const auto holds = [](double square) { return square > 1e-24 && square < 1e34; };
  for (int64_t i = 0; i < rows_; ++i) {
    const double real = scores_[size_t(i * 2 * rows_ + i)], fake = fake_squared_[size_t(i)];
    if (!holds(students_[size_t(i * rows_ + i)]) || !holds(real) || !holds(fake) ||
        fake < kLeastGram * kLeastGram * real)
      return false;
  }
  return true;
}

void GramSums::merge(const GramSums& other) {
  const auto sum = [](std::vector<double>& to, const std::vector<double>& from) {
    for (size_t k = 0; k < to.size(); ++k) to[k] += from[k];
  };
  sum(students_, other.students_);
  sum(scores_, other.scores_);
  sum(fakes_, other.fakes_);
  sum(fake_squared_, other.fake_squared_);
}

double subtract(const float* real, float* fake, int64_t length, bool exact, float* kept) {
  if (!exact) return passes().subtract(real, fake, length);
  std::memcpy(kept, fake, size_t(length) * sizeof(float));
  passes().subtract(real, fake, length);
  return square_of(kept, length);
}

double fake_squared(const float* real, const float* difference, int64_t length, bool exact, float* kept) {
  std::memcpy(kept, real, size_t(length) * sizeof(float));
  passes().accumulate(1.0f, difference, kept, length);
  return exact ? square_of(kept, length) : passes().subtract(real, kept, length);
}

void add_gathered(const float* gathered, int64_t pitch, int64_t features, const std::vector<int32_t>& rows,
                  const Worker& worker, bool exact, float* buffer, GramSums& sums) {
  sums.clear();
  const int64_t n = int64_t(rows.size()), chunks = chunks_of(features), end = worker.end(chunks);
  for (int64_t chunk = worker.begin(chunks); chunk < end; ++chunk) {
    const int64_t start = chunk * kChunk, length = std::min(kChunk, features - start);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t part = 0; part < 3; ++part) {
        float* to = buffer + (part * n + i) * kChunk;
        std::memcpy(to, gathered + rows[size_t(i)] * pitch + part * features + start, size_t(length) * sizeof(float));
        std::fill(to + length, to + padded(length), 0.0f);
      }
      sums.add_fake_squared(i, fake_squared(buffer + (n + i) * kChunk, buffer + (2 * n + i) * kChunk, padded(length),
                                            exact, buffer + (3 * n + i) * kChunk));
    }
    sums.add(buffer, buffer + n * kChunk, padded(length), exact);
  }
}

void mix_rows(const float* from, int64_t from_pitch, const int32_t* row, int64_t n, const float* matrix, double scale,
              float* to, int64_t to_pitch, int64_t first, int64_t count, int64_t features, const Worker& worker,
              float* buffer) {
  std::vector<const float*> outputs;
  std::vector<float*> targets;
  std::vector<int32_t> columns;
  for (int64_t i = 0; i < n; ++i) {
    columns.push_back(int32_t(i));
    if (row[i] < first || row[i] >= first + count) continue;
    outputs.push_back(matrix + i * n);
    targets.push_back(to + (row[i] - first) * to_pitch);
  }
  if (n < 2) {
    if (worker.index == 0)
      for (float* target : targets) std::fill_n(target, features, 0.0f);
    return;
  }
  float* mixed = buffer + n * kChunk;
  const int64_t chunks = chunks_of(features), end = worker.end(chunks);
  for (int64_t chunk = worker.begin(chunks); chunk < end; ++chunk) {
    const int64_t start = chunk * kChunk, length = std::min(kChunk, features - start);
    for (int64_t j = 0; j < n; ++j) {
      float* values = buffer + j * kChunk;
      std::memcpy(values, from + row[j] * from_pitch + start, size_t(length) * sizeof(float));
      std::fill(values + length, values + padded(length), 0.0f);
    }
    passes().combine(buffer, kChunk, n, columns.data(), outputs.data(), int64_t(outputs.size()), float(scale),
                     nullptr, 0.0f, padded(length), mixed);
    for (size_t i = 0; i < targets.size(); ++i)
      std::memcpy(targets[i] + start, mixed + i * kChunk, size_t(length) * sizeof(float));
  }
}

}  // namespace codmd
