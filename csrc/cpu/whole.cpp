// SPDX-License-Identifier: Apache-2.0
//
// The relation of features that keep every pixel: latents are streamed once per direction, in chunks.
#include "relation.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "grams.h"
#include "passes.h"

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
      own.scores.resize(size_t(3 * rows * kChunk));
      own.psi_rows = batch ? samples : 1;
      if (psi.wanted()) {
        own.psi_student.resize(size_t(own.psi_rows * kChunk));
        own.psi_scores.resize(size_t(3 * own.psi_rows * kChunk));
      }
    }
  }

  void read(const Worker& worker, bool exact) {
    const int64_t pixels = scores_.shape.pixels();
    const int64_t chunks = chunks_of(pixels), last = worker.end(chunks);
    PerWorker& own = workers_[size_t(worker.index)];
    own.exact = exact;
    for (auto* grams : {&own.frames, &own.batch})
      for (GramSums& sums : *grams) sums.clear();
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
      if (batch_) own.batch[0].add(own.psi_student.data(), own.psi_scores.data(), padded(n), exact);
    }
  }

  // Every Gram ends up in the first worker's sums, added in the order of the workers.
  void merge(const Worker& worker) {
    const int64_t items = int64_t(workers_[0].frames.size() + workers_[0].batch.size()), last = worker.end(items);
    for (int64_t item = worker.begin(items); item < last; ++item)
      for (size_t other = 1; other < workers_.size(); ++other) sums(0, item).merge(sums(other, item));
  }

  bool in_range() const {
    for (const auto* grams : {&workers_[0].frames, &workers_[0].batch})
      for (const GramSums& sums : *grams)
        if (!sums.in_range()) return false;
    return true;
  }

  RowProducts frame_products(int64_t b) const { return workers_[0].frames[size_t(b - begin_)].products(0); }
  RowProducts batch_products() const { return workers_[0].batch[0].products(0); }

 private:
  struct PerWorker {
    std::vector<GramSums> frames, batch;
    std::vector<float> student, scores, psi_student, psi_scores;
    int64_t psi_rows = 0;
    bool exact = false;
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
      const double squared = subtract(real, fake, padded(n), own.exact, fake + rows * kChunk);
      if (frames_) own.frames[size_t(b - begin_)].add_fake_squared(i, squared);
    }
    if (frames_) own.frames[size_t(b - begin_)].add(own.student.data(), own.scores.data(), padded(n), own.exact);
  }

  // psi of sample b into row `slot`.
  void average(PerWorker& own, int64_t b, int64_t slot, int64_t n) {
    const int64_t rows = valid_.count(b), length = padded(n);
    float* student = own.psi_student.data() + slot * kChunk;
    float* real = own.psi_scores.data() + slot * kChunk;
    float* difference = own.psi_scores.data() + (own.psi_rows + slot) * kChunk;
    float* fake = own.psi_scores.data() + (2 * own.psi_rows + slot) * kChunk;
    if (batch_ && rows == 0) return;
    for (float* row : {student, real, difference}) std::fill(row, row + length, 0.0f);
    if (own.exact) std::fill(fake, fake + length, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const float share = 1.0f / float(rows);
      passes().accumulate(share, own.student.data() + i * kChunk, student, length);
      passes().accumulate(share, own.scores.data() + i * kChunk, real, length);
      passes().accumulate(share, own.scores.data() + (rows + i) * kChunk, difference, length);
      if (own.exact) passes().accumulate(share, own.scores.data() + (2 * rows + i) * kChunk, fake, length);
    }
    if (!batch_) {
      for (int64_t k = 0; k < length; ++k)
        difference[k] = kept_apart(real[k], difference[k], own.exact && fake[k] == 0.0f);
      return;
    }
    own.batch[0].add_fake_squared(
        slot, own.exact ? square_of(fake, length) : fake_squared(real, difference, length, false, fake));
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
  const int64_t latent = s.bytes(dtype);
  const int64_t grams = 5 * s.frames * s.frames * int64_t(sizeof(double)) * samples_a_pass;
  const int64_t budget = std::max<int64_t>(int64_t(64) << 20, latent / 4);
  return int(std::max<int64_t>(1, std::min<int64_t>(useful_threads(threads, latent), budget / std::max<int64_t>(grams, 1))));
}

// Frame gradients M / B into frame_grad and the batch relation's gradient into psi.student (in place of the psi).
// Returns the batch term and the sum of the samples' frame terms.
Terms stream(const Scores& scores, const ValidRows& valid, double temperature, int threads, int64_t begin, int64_t end,
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
    for (const bool exact : {false, true}) {
      stream.read(worker, exact);
      worker.barrier();
      stream.merge(worker);
      worker.barrier();
      if (stream.in_range()) break;
      worker.barrier();
    }
    team.run(worker, [&](int which, int row, const double* matrix_row) {
      const Relation& own = relations[size_t(which)];
      if (which == batch_relation)
        return own.narrow(row, matrix_row, 1.0, batch_matrix.data() + row * samples, nullptr);
      const int32_t* frames = valid.frames_of(begin + which);
      own.narrow(row, matrix_row, double(B), frame_grad + ((begin + which) * F + frames[row]) * F, frames);
    });
    if (!batch) return;
    worker.barrier();
    mix_rows(psi.student, psi.pitch, valid.sample.data(), samples, batch_matrix.data(), 1.0, psi.student, psi.pitch, 0, B,
             scores.grid.features(scores.shape), worker, mixing.data() + size_t(worker.index) * size_t(2 * samples * kChunk));
  });

  Terms result;
  for (int which = 0; which < batch_relation; ++which) result.frame += relations[size_t(which)].divergence();
  if (batch) result.batch = relations.back().divergence();
  return result;
}

}  // namespace

Terms whole_relation(const Scores& scores, double temperature, int threads, const Found& found) {
  const Shape& shape = scores.shape;
  const ValidRows valid(scores.mask, shape.batch, shape.frames);
  const int64_t size = scores.grid.features(shape);
  const bool batch = found.batch_grad != nullptr;
  if (found.frame_grad) std::fill_n(found.frame_grad, shape.rows() * shape.frames, 0.0f);
  PsiRows psi;
  if (batch) {
    psi.student = found.batch_grad;
    psi.pitch = size;
  } else if (found.rows) {
    psi.student = found.rows, psi.real = found.rows + size, psi.difference = found.rows + 2 * size;
    psi.pitch = row_pitch(size);
    for (int64_t b = 0; b < shape.batch; ++b) found.rows[b * psi.pitch + 3 * size] = float(valid.count(b));
  }
  // The batch term relates all samples at once; frames alone take one sample after the other.
  const int64_t together = batch ? shape.batch : 1;
  threads = affordable_workers(threads, shape, scores.dtype, together);
  Terms terms;
  for (int64_t b = 0; b < shape.batch; b += together) {
    const Terms some = stream(scores, valid, temperature, threads, b, b + together, found.frame_grad, batch, psi);
    terms.frame += some.frame;
    terms.batch += some.batch;
  }
  terms.frame /= double(shape.batch);
  return terms;
}

void whole_gradient(const Shape& shape, DType dtype, const Tensor& student, const FrameMask& mask,
                    const Numbers& numbers, const Upstream& upstream, int threads, const Found& found,
                    const Tensor& grad) {
  const Scales<double> scales(upstream, numbers, false);
  // A term that no gradient reaches must not spread its NaN as 0 * NaN.
  const float* frame_grad = scales.frame.reached() ? found.frame_grad : nullptr;
  const float* batch_grad = scales.batch.reached() ? found.batch_grad : nullptr;
  const double frame_scale = scales.frame(), batch_scale = scales.batch();
  const ValidRows valid(mask, shape.batch, shape.frames);
  const int64_t F = shape.frames, pixels = shape.pixels(), chunks = chunks_of(pixels);
  threads = useful_threads(threads, shape.bytes(dtype));
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
