// SPDX-License-Identifier: Apache-2.0
//
// The distribution matching loss and the features of its guided predictions, from one read of the latents. A decoupled
// loss needs its norms before its direction: the first sweep reads x, f, c1 and c2, the second f, c1, c2 and u2.
#include <cmath>
#include <optional>
#include <vector>

#include "dmd_regions.h"
#include "features.h"
#include "parallel.h"

namespace codmd {
namespace {

// Every plane's moments and features, and the sums of |x - c2| of a decoupled loss; a worker writes the planes that are
// its own.
void read_planes(const DmdScores& scores, const DmdRule& rule, const Numbers& numbers, const Grid& grid,
                 const Worker& worker, std::vector<Moments>& planes, std::vector<double>& second, Features* features) {
  Chunks chunks(scores, numbers, grid, nullptr);
  const int64_t end = worker.end(int64_t(planes.size())), regions = chunks.regions();
  const bool direct = chunks.direct() && rule.huber_c == 0;
  const auto run_moments = direct ? chunks.loops().run_moments[int(scores.dtype)] : nullptr;
  for (int64_t item = worker.begin(int64_t(planes.size())); item < end; ++item) {
    const PlaneIndex p = plane_of(scores.shape, item);
    Moments& plane = planes[size_t(item)];
    for (int64_t region = 0; region < regions; ++region) {
      double means[4] = {0, 0, 0, 0};  // the last is of f, where it is read in double
      chunks.each(region, [&](int64_t y, int64_t x, int64_t n) {
        if (scores.decoupled()) second[size_t(item)] += chunks.second_distance(p, y, x, n);
        DmdSums sums;
        if (direct) {
          sums = run_moments(chunks.run(p, y, x), n);
        } else {
          chunks.fetch(p, y, x, n, true);
          sums = chunks.loops().moments(chunks.student, chunks.r, chunks.d, chunks.mask(p, y, x, n), n,
                                        float(rule.huber_c));
        }
        if (!in_range(sums.distance, sums.penalty, sums.magnitude))
          return chunks.add_exact(rule, p, y, x, n, plane, means);
        plane.add({double(sums.distance), double(sums.penalty), double(sums.magnitude), sums.selected, sums.nans,
                   is_finite(sums.wild) ? 0 : 1});
        means[0] += double(sums.student);
        means[1] += double(sums.real);
        means[2] += double(sums.difference);
      });
      if (!features) continue;
      if (std::fabs(means[1] + means[2]) < kLeastFloat * std::fabs(means[1])) {
        // Of a fake far under real float32's difference keeps few digits, and a sum of differences fewer than one.
        Moments read_before;
        means[0] = means[1] = means[2] = means[3] = 0;
        chunks.each(region, [&](int64_t y, int64_t x, int64_t n) {
          chunks.add_exact(rule, p, y, x, n, read_before, means);
        });
        means[2] = means[3] - means[1];
        // By more than the average over frames rounds, and less than kLeastDouble.
        if (means[1] + means[2] == 0.0 && means[3] != 0.0) means[2] *= 1.0 - 0x1p-46;
      }
      const size_t at = size_t(item * regions + region);
      const double area = chunks.area(region);
      features->x[at] = means[0] / area;
      features->r[at] = means[1] / area;
      features->d[at] = means[2] / area;
    }
  }
}

// The norms of one level, from every plane's sum of distances.
template <class Distance>
void write_norms(const Shape& s, const DmdRule& rule, const Distance& distance, float* norms) {
  const size_t count = size_t(rule.norms(s));
  std::vector<double> sums(count, 0.0);
  std::vector<int64_t> elements(count, 0);
  for (int64_t item = 0; item < s.rows() * s.channels; ++item) {
    const PlaneIndex p = plane_of(s, item);
    const size_t at = size_t(rule.norm_of(p.b, p.f, s.frames));
    sums[at] += distance(size_t(item));
    elements[at] += s.height * s.width;
  }
  for (size_t at = 0; at < count; ++at) norms[at] = norm_of_sum(rule, sums[at], elements[at]);
  if (!rule.first_alone) return;
  for (int64_t b = 0; b < s.batch; ++b) norms[rule.norm_of(b, 0, s.frames)] = 1.0f;
}

// The second sweep of a decoupled loss: penalty, magnitude and NaNs of g in place of those of d.
void read_directions(const DmdScores& scores, const DmdRule& rule, const Numbers& numbers, const Worker& worker,
                     const float* norms, std::vector<Moments>& planes) {
  const Shape& s = scores.shape;
  Chunks chunks(scores, numbers, {1, 1}, nullptr);
  const float* second = norms + rule.norms(s);
  const int64_t end = worker.end(int64_t(planes.size()));
  for (int64_t item = worker.begin(int64_t(planes.size())); item < end; ++item) {
    const PlaneIndex p = plane_of(s, item);
    const int64_t at = rule.norm_of(p.b, p.f, s.frames);
    const NormPair pair{norms[at], second[at]};
    Moments& plane = planes[size_t(item)];
    plane.penalty = plane.magnitude = 0.0;
    plane.nans = 0;
    chunks.each(0, [&](int64_t y, int64_t x, int64_t n) {
      const float odd = chunks.fetch_decoupled(p, y, x, n, pair, rule.nan == NanPolicy::to_num);
      const DmdSums sums = chunks.loops().moments(chunks.d, chunks.d, chunks.d, chunks.mask(p, y, x, n), n, 0.0f);
      if (odd != 0.0f || sums.nans || !in_range(0.0f, sums.penalty, sums.magnitude))
        return chunks.add_decoupled(rule, pair, p, y, x, n, plane);
      plane.penalty += double(sums.penalty);
      plane.magnitude += double(sums.magnitude);
    });
  }
}

// Writes factors, and (loss, mean|g|).
void small_algebra(const DmdScores& scores, const DmdRule& rule, const std::vector<Moments>& planes,
                   const Found& found, float* loss) {
  const Shape& s = scores.shape;
  const int64_t segments = rule.segments(s.frames);
  std::vector<Moments> sums(size_t(s.batch * segments), Moments{});
  for (size_t item = 0; item < planes.size(); ++item) {
    const PlaneIndex p = plane_of(s, int64_t(item));
    sums[size_t(p.b * segments + rule.segment_of(p.f))].add(planes[item]);
  }

  const auto weight_of = [&](int64_t b) { return scores.sample_weight ? double(scores.sample_weight[b]) : 1.0; };
  std::vector<SampleValue> samples(size_t(s.batch), SampleValue{});
  int64_t selected = 0;
  double value = 0, magnitude = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    SampleValue& sample = samples[size_t(b)];
    for (int64_t segment = 0; segment < segments; ++segment) {
      const int64_t i = b * segments + segment;
      const float* norm = found.norms + (rule.scope == NormScope::batch ? 0 : i);
      if (scores.decoupled())
        sample.add_segment(rule, sums[size_t(i)], NormPair{norm[0], norm[rule.norms(s)]});
      else
        sample.add_segment(rule, sums[size_t(i)], *norm);
      selected += sums[size_t(i)].selected;
    }
    sample.finish(rule);
    value += sample.weighted(rule, weight_of(b));
    magnitude += sample.weighted_magnitude(rule, weight_of(b));
  }
  for (int64_t b = 0; b < s.batch; ++b) found.factors[b] = samples[size_t(b)].factor(rule, weight_of(b), selected);
  write_loss(rule, value, magnitude, selected, loss);
}

}  // namespace

const DmdLoops& dmd_loops() {
#if defined(CODMD_X86)
  if (&passes() == &passes_avx512) return dmd_loops_avx512;
  if (&passes() == &passes_avx2) return dmd_loops_avx2;
#endif
  return dmd_loops_baseline;
}

void objective(const DmdScores& scores, const DmdRule& rule, bool related, const FrameMask& mask, const Grid& grid,
               const Numbers& numbers, int threads, const Found& found) {
  const Shape& s = scores.shape;
  std::vector<Moments> planes(size_t(s.rows() * s.channels), Moments{});
  std::vector<double> second(scores.decoupled() ? planes.size() : 0, 0.0);
  std::optional<Features> features;
  if (related) features.emplace(s, mask, grid);
  const Grid regions = related ? grid : Grid{1, 1};
  threads = useful_threads(threads, 4 * s.bytes(scores.dtype));
  parallel(threads, [&](const Worker& worker) {
    read_planes(scores, rule, numbers, regions, worker, planes, second, related ? &*features : nullptr);
  });
  write_norms(s, rule, [&](size_t item) { return planes[item].distance; }, found.norms);
  if (scores.decoupled()) {
    write_norms(s, rule, [&](size_t item) { return second[item]; }, found.norms + rule.norms(s));
    parallel(threads, [&](const Worker& worker) {
      read_directions(scores, rule, numbers, worker, found.norms, planes);
    });
  }
  float loss[2];
  small_algebra(scores, rule, planes, found, loss);
  const Terms terms = related ? features->relate(numbers.temperature(), threads, found) : Terms{};
  write_terms(found.terms, terms.batch, terms.frame, numbers, loss);
}

}  // namespace codmd
