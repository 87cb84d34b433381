// SPDX-License-Identifier: Apache-2.0
//
// The distribution matching loss and the features of its guided predictions, from one read of the latents.
#include <optional>
#include <vector>

#include "dmd_regions.h"
#include "features.h"
#include "parallel.h"

namespace codmd {
namespace {

// Every plane's moments and features; a worker writes the planes that are its own.
void read_planes(const DmdScores& scores, const DmdRule& rule, const Numbers& numbers, const Grid& grid,
                 const Worker& worker, std::vector<Moments>& planes, Features* features) {
  Chunks chunks(scores, numbers, grid, nullptr);
  const int64_t end = worker.end(int64_t(planes.size())), regions = chunks.regions();
  const bool direct = chunks.direct() && rule.huber_c == 0;
  const auto run_moments = direct ? chunks.loops().run_moments[int(scores.dtype)] : nullptr;
  for (int64_t item = worker.begin(int64_t(planes.size())); item < end; ++item) {
    const PlaneIndex p = plane_of(scores.shape, item);
    Moments& plane = planes[size_t(item)];
    for (int64_t region = 0; region < regions; ++region) {
      double means[3] = {0, 0, 0};
      chunks.each(region, [&](int64_t y, int64_t x, int64_t n) {
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
      const size_t at = size_t(item * regions + region);
      const double area = chunks.area(region);
      features->x[at] = means[0] / area;
      features->r[at] = means[1] / area;
      features->d[at] = means[2] / area;
    }
  }
}

// Writes norms and factors, and (loss, mean|g|).
void small_algebra(const DmdScores& scores, const DmdRule& rule, const std::vector<Moments>& planes,
                   const Found& found, float* loss) {
  const Shape& s = scores.shape;
  const int64_t segments = rule.segments(s.frames);
  std::vector<Moments> sums(size_t(s.batch * segments), Moments{});
  std::vector<int64_t> elements(size_t(segments), 0);
  for (int64_t f = 0; f < s.frames; ++f) elements[size_t(rule.segment_of(f))] += s.pixels();
  for (size_t item = 0; item < planes.size(); ++item) {
    const PlaneIndex p = plane_of(s, int64_t(item));
    sums[size_t(p.b * segments + rule.segment_of(p.f))].add(planes[item]);
  }

  if (rule.scope == NormScope::batch) {
    double distance = 0;
    for (const Moments& sample : sums) distance += sample.distance;
    found.norms[0] = norm_of_sum(rule, distance, s.rows() * s.pixels());
  } else {
    for (int64_t i = 0; i < s.batch * segments; ++i) {
      const int64_t segment = i % segments;
      const bool alone = rule.first_alone && segment == 0;
      found.norms[i] = alone ? 1.0f : norm_of_sum(rule, sums[size_t(i)].distance, elements[size_t(segment)]);
    }
  }

  const auto weight_of = [&](int64_t b) { return scores.sample_weight ? double(scores.sample_weight[b]) : 1.0; };
  std::vector<SampleValue> samples(size_t(s.batch), SampleValue{});
  int64_t selected = 0;
  double value = 0, magnitude = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    SampleValue& sample = samples[size_t(b)];
    for (int64_t segment = 0; segment < segments; ++segment) {
      const int64_t i = b * segments + segment;
      sample.add_segment(rule, sums[size_t(i)], found.norms[rule.scope == NormScope::batch ? 0 : i]);
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
  std::optional<Features> features;
  if (related) features.emplace(s, mask, grid);
  const Grid regions = related ? grid : Grid{1, 1};
  threads = useful_threads(threads, 4 * s.bytes(scores.dtype));
  parallel(threads, [&](const Worker& worker) {
    read_planes(scores, rule, numbers, regions, worker, planes, related ? &*features : nullptr);
  });
  float loss[2];
  small_algebra(scores, rule, planes, found, loss);
  const Terms terms = related ? features->relate(numbers.temperature(), threads, found) : Terms{};
  write_terms(found.terms, terms.batch, terms.frame, numbers, loss);
}

}  // namespace codmd
