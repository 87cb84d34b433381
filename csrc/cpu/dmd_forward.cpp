// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <vector>

#include "dmd_regions.h"
#include "parallel.h"
#include "relations.h"

namespace codmd {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Sums of a segment of frames, then of a sample.
struct Moments {
  double distance = 0, penalty = 0, magnitude = 0, wild = 0;
  int64_t selected = 0, nans = 0;

  template <class Other>
  void add(const Other& other) {
    distance += other.distance;
    penalty += other.penalty;
    magnitude += other.magnitude;
    wild += other.wild;
    selected += other.selected;
    nans += other.nans;
  }
};

// Features of student, guided real and fake - real, phi [B, F, K] and psi [B, K], in double.
struct Features {
  int64_t size = 0;
  std::vector<double> x, r, d, psi[3];
};

// Every plane's moments and features; a worker writes the planes that are its own.
void read_planes(const DmdScores& scores, const DmdRule& rule, const Grid& grid, const Worker& worker,
                 std::vector<Moments>& planes, Features* features) {
  Chunks chunks(scores, grid, nullptr);
  const int64_t end = worker.end(int64_t(planes.size())), regions = chunks.regions();
  const bool direct = chunks.direct() && rule.huber_c == 0;
  for (int64_t item = worker.begin(int64_t(planes.size())); item < end; ++item) {
    const PlaneIndex p = plane_of(scores.shape, item);
    for (int64_t region = 0; region < regions; ++region) {
      DmdSums sums;
      chunks.each(region, [&](int64_t y, int64_t x, int64_t n) {
        if (direct) return chunks.loops().run_moments[int(scores.dtype)](chunks.run(p, y, x), n, sums);
        chunks.fetch(p, y, x, n, true);
        chunks.loops().moments(chunks.student, chunks.r, chunks.d, chunks.mask(p, y, x, n), n, float(rule.huber_c),
                               sums);
      });
      planes[size_t(item)].add(sums);
      if (!features) continue;
      const size_t at = size_t(item * regions + region);
      const double area = chunks.area(region);
      features->x[at] = sums.student / area;
      features->r[at] = sums.real / area;
      features->d[at] = sums.difference / area;
    }
  }
}

float guarded(const DmdRule& rule, double norm) {
  if (rule.guard == Guard::clamp) norm = norm < rule.eps ? rule.eps : norm;
  if (rule.guard == Guard::add) norm += rule.eps;
  return float(norm);
}

// What one segment adds to its sample: the penalty over norm^2 (or norm) and |d| over norm, repaired.
void divide(const DmdRule& rule, const Moments& sums, double norm, double& value, double& magnitude) {
  value = magnitude = 0;
  if (!sums.selected) return;
  value = rule.norm_divides_loss ? sums.penalty / norm : sums.penalty / norm / norm;
  magnitude = rule.norm_divides_loss ? sums.magnitude : sums.magnitude / norm;
  if (rule.nan == NanPolicy::to_num) {
    if (std::isnan(value)) value = 0;
    if (std::isnan(magnitude)) magnitude = 0;
  } else if (sums.nans) {
    value = kNan;
  }
}

void small_algebra(const DmdScores& scores, const DmdRule& rule, const std::vector<Moments>& planes, float* values,
                   float* norms, float* factors) {
  const Shape& s = scores.shape;
  const int64_t segments = rule.segments, frame_size = s.channels * s.height * s.width;
  std::vector<Moments> sums(size_t(s.batch * segments));
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t segment = 0; segment < segments; ++segment)
      for (int64_t f = rule.edges[segment]; f < rule.edges[segment + 1]; ++f)
        for (int64_t c = 0; c < s.channels; ++c)
          sums[size_t(b * segments + segment)].add(planes[size_t((b * s.frames + f) * s.channels + c)]);

  if (rule.scope == NormScope::batch) {
    double distance = 0;
    for (const Moments& sample : sums) distance += sample.distance;
    norms[0] = guarded(rule, distance / double(s.batch * s.frames * frame_size));
  } else {
    for (int64_t i = 0; i < s.batch * segments; ++i) {
      const int64_t segment = i % segments;
      const int64_t count = (rule.edges[segment + 1] - rule.edges[segment]) * frame_size;
      const bool alone = rule.first_alone && segment == 0;
      norms[i] = alone ? 1.0f : guarded(rule, sums[size_t(i)].distance / double(count));
    }
  }

  int64_t selected = 0;
  for (const Moments& segment : sums) selected += segment.selected;
  const double count = double(selected ? selected : 1), reduced = rule.sum ? 1.0 : count;
  double loss = 0, magnitude = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    const double weight = scores.sample_weight ? double(scores.sample_weight[b]) : 1.0;
    double sample = 0, wild = 0;
    for (int64_t segment = 0; segment < segments; ++segment) {
      const size_t i = size_t(b * segments + segment);
      double value, size;
      divide(rule, sums[i], double(norms[rule.scope == NormScope::batch ? 0 : i]), value, size);
      sample += value;
      magnitude += size;
      wild += sums[i].wild;
    }
    double factor = rule.coefficient * (rule.huber_c > 0 ? 1.0 : 2.0) * weight / reduced;
    if (std::isnan(wild)) sample = factor = kNan;
    if (rule.nan == NanPolicy::zero_sample && std::isnan(sample)) sample = factor = 0;
    loss += sample * (rule.weight_on_direction ? weight * weight : weight);
    factors[b] = selected ? float(factor) : 0.0f;
  }
  values[0] = float(rule.coefficient * (loss / reduced));
  values[1] = float(magnitude / count);
}

void average(const ValidRows& valid, const Shape& shape, Features& features) {
  const std::vector<double>* phi[3] = {&features.x, &features.r, &features.d};
  for (int part = 0; part < 3; ++part) {
    features.psi[part].assign(size_t(shape.batch * features.size), 0.0);
    for (int64_t b = 0; b < shape.batch; ++b) {
      double* psi = features.psi[part].data() + b * features.size;
      const int64_t n = valid.count(b);
      for (int64_t i = 0; i < n; ++i) {
        const double* row = phi[part]->data() + valid.rows_of(b)[i] * features.size;
        for (int64_t k = 0; k < features.size; ++k) psi[k] += row[k];
      }
      for (int64_t k = 0; k < features.size && n; ++k) psi[k] /= double(n);
    }
  }
}

void write_rows(const ValidRows& valid, const Shape& shape, Features& features, float* pooled) {
  average(valid, shape, features);
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (const auto& psi : features.psi)
      for (int64_t k = 0; k < features.size; ++k) *pooled++ = float(psi[size_t(b * features.size + k)]);
    *pooled++ = float(valid.count(b));
  }
}

int team_size(const DmdScores& scores, int threads) { return useful_threads(threads, 4 * latent_bytes(scores)); }

}  // namespace

const DmdLoops& dmd_loops() {
#if defined(CODMD_X86)
  if (&passes() == &passes_avx512) return dmd_loops_avx512;
  if (&passes() == &passes_avx2) return dmd_loops_avx2;
#endif
  return dmd_loops_baseline;
}

void dmd_forward(const DmdScores& scores, const DmdRule& rule, int threads, float* values, float* norms,
                 float* factors) {
  const Shape& s = scores.shape;
  std::vector<Moments> planes(size_t(s.batch * s.frames * s.channels));
  parallel(team_size(scores, threads),
           [&](const Worker& worker) { read_planes(scores, rule, {1, 1}, worker, planes, nullptr); });
  small_algebra(scores, rule, planes, values, norms, factors);
}

void codmd_forward(const DmdScores& scores, const DmdRule& rule, const RelationPart& relation, int threads,
                   float* values, float* norms, float* factors, float* frame_term, float* frame_grad, float* pooled) {
  const Shape& s = scores.shape;
  std::vector<Moments> planes(size_t(s.batch * s.frames * s.channels));
  Features features;
  features.size = relation.grid.features(s);
  for (auto* phi : {&features.x, &features.r, &features.d}) phi->resize(size_t(s.batch * s.frames * features.size));

  const ValidRows valid(relation.mask, s.batch, s.frames);
  std::vector<Relation> relations;
  for (int64_t b = 0; b < s.batch && frame_grad; ++b) {
    RowProducts products;
    products.x = features.x.data(), products.r = features.r.data(), products.d = features.d.data();
    products.row = valid.rows_of(b), products.features = features.size;
    relations.emplace_back(int(valid.count(b)), products);
  }
  if (frame_grad) std::fill_n(frame_grad, s.batch * s.frames * features.size, 0.0f);

  threads = team_size(scores, threads);
  RelationTeam team(relations, relation.temperature, threads);
  parallel(threads, [&](const Worker& worker) {
    read_planes(scores, rule, relation.grid, worker, planes, &features);
    worker.barrier();
    team.run(worker, [&](int which, int row, const double* matrix_row) {
      const RowProducts& products = relations[size_t(which)].products();
      feature_gradient(products, relations[size_t(which)].rows(), matrix_row, 1.0 / double(s.batch),
                       frame_grad + products.row[row] * features.size);
    });
  });

  small_algebra(scores, rule, planes, values, norms, factors);
  double frame = 0;
  for (const Relation& sample : relations) frame += sample.divergence();
  *frame_term = float(frame / double(s.batch));
  if (pooled) write_rows(valid, s, features, pooled);
}

}  // namespace codmd
