// SPDX-License-Identifier: Apache-2.0
#include "every_pixel.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "grams.h"
#include "parallel.h"
#include "passes.h"
#include "relations.h"
#include "valid_rows.h"

namespace codmd {
namespace {

// Where the frame averages psi [B, C*H*W] of student, real and fake - real go; null parts are not kept.
struct PsiRows {
  float *student = nullptr, *real = nullptr, *difference = nullptr;
  int64_t pitch = 0;
  bool wanted() const { return student != nullptr; }
};

// One pass over samples [begin, end): their frame Grams, their psi, and the Gram of the psi if asked for.
class Stream {
 public:
  Stream(const Scores& scores, const ValidRows& valid, int64_t begin, int64_t end, bool frames, bool batch,
         const PsiRows& psi, int workers)
      : scores_(scores), valid_(valid), begin_(begin), end_(end), frames_(frames), batch_(batch), psi_(psi) {
    const int64_t samples = int64_t(valid.sample.size());
    int64_t rows = 0;
    for (int64_t b = begin; b < end; ++b) rows = std::max(rows, valid.count(b));
    workers_.resize(size_t(workers));
    for (PerWorker& own : workers_) {
      if (frames)
        for (int64_t b = begin; b < end; ++b) own.frames.emplace_back(valid.count(b));
      if (batch) own.batch.emplace_back(samples);
      own.student.resize(size_t(rows * kChunk));
      own.scores.resize(size_t(2 * rows * kChunk));
      own.psi_rows = batch ? samples : 1;
      if (psi.wanted()) {
        own.psi_student.resize(size_t(own.psi_rows * kChunk));
        own.psi_scores.resize(size_t((2 * own.psi_rows + 1) * kChunk));
      }
    }
  }

  void read(const Worker& worker) {
    const int64_t pixels = scores_.shape.channels * scores_.shape.height * scores_.shape.width;
    const int64_t chunks = chunks_of(pixels), last = worker.end(chunks);
    PerWorker& own = workers_[size_t(worker.index)];
    for (int64_t chunk = worker.begin(chunks); chunk < last; ++chunk) {
      const int64_t first = chunk * kChunk, n = std::min(kChunk, pixels - first);
      int64_t slot = 0;
      for (int64_t b = begin_; b < end_; ++b) {
        read_sample(own, b, first, n);
        if (!psi_.wanted()) continue;
        average(own, b, slot, n);
        keep(own, b, slot, first, n);
        if (batch_ && valid_.count(b) > 0) ++slot;
      }
      if (batch_) own.batch[0].add(own.psi_student.data(), own.psi_scores.data(), padded(n));
    }
  }

  // Every Gram ends up in the first worker's sums, added in the order of the workers.
  void merge(const Worker& worker) {
    const int64_t items = int64_t(workers_[0].frames.size() + workers_[0].batch.size()), last = worker.end(items);
    for (int64_t item = worker.begin(items); item < last; ++item)
      for (size_t other = 1; other < workers_.size(); ++other) sums(0, item).merge(sums(other, item));
  }

  RowProducts frame_products(int64_t b) const { return workers_[0].frames[size_t(b - begin_)].products(); }
  RowProducts batch_products() const { return workers_[0].batch[0].products(); }

 private:
  struct PerWorker {
    std::vector<GramSums> frames, batch;
    std::vector<float> student, scores, psi_student, psi_scores;
    int64_t psi_rows = 0;
  };

  GramSums& sums(size_t worker, int64_t item) {
    PerWorker& own = workers_[worker];
    const size_t frames = own.frames.size();
    return size_t(item) < frames ? own.frames[size_t(item)] : own.batch[size_t(item) - frames];
  }

  void read_sample(PerWorker& own, int64_t b, int64_t first, int64_t n) {
    const int64_t rows = valid_.count(b);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t f = valid_.frames_of(b)[i];
      float *real = own.scores.data() + i * kChunk, *fake = own.scores.data() + (rows + i) * kChunk;
      load_pixels(scores_.student, scores_.shape, scores_.dtype, b, f, first, n, own.student.data() + i * kChunk);
      load_pixels(scores_.real, scores_.shape, scores_.dtype, b, f, first, n, real);
      load_pixels(scores_.fake, scores_.shape, scores_.dtype, b, f, first, n, fake);
      const double squared = passes().subtract(real, fake, padded(n));
      if (frames_) own.frames[size_t(b - begin_)].add_fake_squared(i, squared);
    }
    if (frames_) own.frames[size_t(b - begin_)].add(own.student.data(), own.scores.data(), padded(n));
  }

  // psi of sample b into row `slot`; the last row of psi_scores serves |psi_f|^2.
  void average(PerWorker& own, int64_t b, int64_t slot, int64_t n) {
    const int64_t rows = valid_.count(b), length = padded(n);
    float* student = own.psi_student.data() + slot * kChunk;
    float* real = own.psi_scores.data() + slot * kChunk;
    float* difference = own.psi_scores.data() + (own.psi_rows + slot) * kChunk;
    float* fake = own.psi_scores.data() + 2 * own.psi_rows * kChunk;
    if (batch_ && rows == 0) return;
    for (float* row : {student, real, difference}) std::fill(row, row + length, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const float share = 1.0f / float(rows);
      passes().accumulate(share, own.student.data() + i * kChunk, student, length);
      passes().accumulate(share, own.scores.data() + i * kChunk, real, length);
      passes().accumulate(share, own.scores.data() + (rows + i) * kChunk, difference, length);
    }
    if (!batch_) return;
    own.batch[0].add_fake_squared(slot, fake_squared(real, difference, length, fake));
  }

  void keep(const PerWorker& own, int64_t b, int64_t slot, int64_t first, int64_t n) const {
    const bool any = valid_.count(b) > 0;
    const auto copy = [&](const float* from, float* to) {
      if (!to) return;
      if (any) std::memcpy(to + b * psi_.pitch + first, from, size_t(n) * sizeof(float));
      else std::fill_n(to + b * psi_.pitch + first, n, 0.0f);
    };
    copy(own.psi_student.data() + slot * kChunk, psi_.student);
    copy(own.psi_scores.data() + slot * kChunk, psi_.real);
    copy(own.psi_scores.data() + (own.psi_rows + slot) * kChunk, psi_.difference);
  }

  const Scores& scores_;
  const ValidRows& valid_;
  int64_t begin_, end_;
  bool frames_, batch_;
  PsiRows psi_;
  std::vector<PerWorker> workers_;
};

// Every worker holds its own Grams: long videos must not multiply them without bound.
int affordable_workers(int threads, const Shape& s, DType dtype, int64_t samples_a_pass) {
  const int64_t latent = s.batch * s.frames * s.channels * s.height * s.width * element_size(dtype);
  const int64_t grams = 5 * s.frames * s.frames * int64_t(sizeof(double)) * samples_a_pass;
  const int64_t budget = std::max<int64_t>(int64_t(64) << 20, latent / 4);
  return int(std::max<int64_t>(1, std::min<int64_t>(useful_threads(threads, latent), budget / std::max<int64_t>(grams, 1))));
}

struct Passed {
  double frame_sum = 0, batch = 0;
};

// Frame gradients M / B into frame_grad and the batch relation's gradient into psi.student (in place of the psi).
Passed stream(const Scores& scores, const ValidRows& valid, double temperature, int threads, int64_t begin, int64_t end,
              float* frame_grad, bool batch, const PsiRows& psi) {
  const int64_t B = scores.shape.batch, F = scores.shape.frames;
  const int64_t samples = int64_t(valid.sample.size());
  Stream stream(scores, valid, begin, end, frame_grad != nullptr, batch, psi, threads);
  std::vector<Relation> relations;
  if (frame_grad)
    for (int64_t b = begin; b < end; ++b) relations.emplace_back(int(valid.count(b)), stream.frame_products(b));
  const int batch_relation = int(relations.size());
  std::vector<float> batch_matrix;
  if (batch) {
    relations.emplace_back(int(samples), stream.batch_products());
    batch_matrix.resize(size_t(samples * samples));
  }
  RelationTeam team(relations, temperature, threads);
  std::vector<float> mixing(batch ? size_t(threads) * size_t(2 * samples * kChunk) : 0);

  parallel(threads, [&](const Worker& worker) {
    stream.read(worker);
    worker.barrier();
    stream.merge(worker);
    worker.barrier();
    team.run(worker, [&](int which, int row, const double* matrix_row) {
      const int n = relations[size_t(which)].rows();
      if (which == batch_relation) {
        for (int j = 0; j < n; ++j) batch_matrix[size_t(row) * n + j] = float(matrix_row[j]);
        return;
      }
      const int32_t* frames = valid.frames_of(begin + which);
      float* out = frame_grad + ((begin + which) * F + frames[row]) * F;
      for (int j = 0; j < n; ++j) out[frames[j]] = float(matrix_row[j] / double(B));
    });
    if (!batch) return;
    worker.barrier();
    mix_rows(psi.student, psi.pitch, valid.sample.data(), samples, batch_matrix.data(), 1.0, psi.student, psi.pitch, 0, B,
             scores.grid.features(scores.shape), worker, mixing.data() + size_t(worker.index) * size_t(2 * samples * kChunk));
  });

  Passed result;
  for (int which = 0; which < batch_relation; ++which) result.frame_sum += relations[size_t(which)].divergence();
  if (batch) result.batch = relations.back().divergence();
  return result;
}

double frames_only(const Scores& scores, const ValidRows& valid, const Weights& weights, int threads,
                   float* frame_grad, const PsiRows& psi) {
  threads = affordable_workers(threads, scores.shape, scores.dtype, 1);
  double sum = 0;
  for (int64_t b = 0; b < scores.shape.batch; ++b)
    sum += stream(scores, valid, weights.temperature, threads, b, b + 1, frame_grad, false, psi).frame_sum;
  return sum / double(scores.shape.batch);
}

}  // namespace

void every_pixel_forward(const Scores& scores, const Weights& weights, int threads, float* terms, float* frame_grad,
                         float* batch_grad) {
  const Shape& shape = scores.shape;
  const ValidRows valid(scores.mask, shape.batch, shape.frames);
  if (frame_grad) std::fill_n(frame_grad, shape.batch * shape.frames * shape.frames, 0.0f);
  if (!batch_grad) {
    const double frame = frame_grad ? frames_only(scores, valid, weights, threads, frame_grad, PsiRows{}) : 0.0;
    return write_terms(weights, 0.0, frame, terms);
  }
  PsiRows psi;
  psi.student = batch_grad;
  psi.pitch = scores.grid.features(shape);
  threads = affordable_workers(threads, shape, scores.dtype, shape.batch);
  const Passed result =
      stream(scores, valid, weights.temperature, threads, 0, shape.batch, frame_grad, true, psi);
  write_terms(weights, result.batch, result.frame_sum / double(shape.batch), terms);
}

void every_pixel_frames(const Scores& scores, const Weights& weights, int threads, float* frame_term,
                        float* frame_grad, float* pooled) {
  const Shape& shape = scores.shape;
  const ValidRows valid(scores.mask, shape.batch, shape.frames);
  const int64_t size = scores.grid.features(shape);
  if (frame_grad) std::fill_n(frame_grad, shape.batch * shape.frames * shape.frames, 0.0f);
  PsiRows psi;
  psi.student = pooled, psi.real = pooled + size, psi.difference = pooled + 2 * size;
  psi.pitch = 3 * size + 1;
  for (int64_t b = 0; b < shape.batch; ++b) pooled[b * psi.pitch + 3 * size] = float(valid.count(b));
  *frame_term = float(frames_only(scores, valid, weights, threads, frame_grad, psi));
}

void every_pixel_backward(const Shape& shape, DType dtype, const Latent& student, const Latent& grad,
                          const FrameMask& mask, const float* frame_grad, const float* batch_grad,
                          double frame_scale, double batch_scale, int threads) {
  const ValidRows valid(mask, shape.batch, shape.frames);
  const int64_t F = shape.frames, pixels = shape.channels * shape.height * shape.width, chunks = chunks_of(pixels);
  threads = useful_threads(threads, shape.batch * F * pixels * element_size(dtype));
  const size_t per_worker = size_t((2 * F + 1) * kChunk);
  std::vector<float> buffers(per_worker * size_t(threads));
  std::vector<const float*> matrix_rows(size_t(F) * size_t(threads));

  parallel(threads, [&](const Worker& worker) {
    float* rows = buffers.data() + per_worker * size_t(worker.index);
    float *out = rows + F * kChunk, *shared = out + F * kChunk;
    const float** matrix = matrix_rows.data() + size_t(worker.index) * size_t(F);
    const int64_t items = shape.batch * chunks, last = worker.end(items);
    for (int64_t item = worker.begin(items); item < last; ++item) {
      const int64_t b = item / chunks, first = item % chunks * kChunk, n = std::min(kChunk, pixels - first);
      const int64_t valid_frames = valid.count(b), inputs = frame_grad ? valid_frames : 0;
      const int32_t* frames = valid.frames_of(b);
      for (int64_t i = 0; i < inputs; ++i) {
        load_pixels(student, shape, dtype, b, frames[i], first, n, rows + i * kChunk);
        matrix[i] = frame_grad + (b * F + frames[i]) * F;
      }
      if (batch_grad) {
        std::memcpy(shared, batch_grad + b * pixels + first, size_t(n) * sizeof(float));
        std::fill(shared + n, shared + padded(n), 0.0f);
      }
      passes().combine(rows, kChunk, inputs, frames, matrix, valid_frames, float(frame_scale),
                       batch_grad ? shared : nullptr, float(batch_scale / double(std::max<int64_t>(valid_frames, 1))),
                       padded(n), out);
      for (int64_t i = 0; i < valid_frames; ++i)
        store_pixels(out + i * kChunk, grad, shape, dtype, b, frames[i], first, n);
      if (valid_frames == F) continue;
      std::fill_n(out, n, 0.0f);
      for (int64_t f = 0; f < F; ++f)
        if (!mask.valid(b, f)) store_pixels(out, grad, shape, dtype, b, f, first, n);
    }
  });
}

}  // namespace codmd
