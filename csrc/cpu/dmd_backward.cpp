// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "dmd_regions.h"
#include "parallel.h"

namespace codmd {
namespace {

float norm_of(const DmdRule& rule, const float* norms, int64_t b, int64_t f) {
  if (rule.scope == NormScope::batch) return norms[0];
  const int64_t segment = std::upper_bound(rule.edges, rule.edges + rule.segments, f) - rule.edges - 1;
  return norms[b * rule.segments + segment];
}

}  // namespace

void dmd_backward(const DmdScores& scores, const DmdRule& rule, const float* norms, const float* factors,
                  double upstream, bool dmd, const RelationPart& relation, const float* frame_grad,
                  const float* batch_grad, double frame_scale, double batch_scale, const Latent& grad, int threads) {
  const Shape& s = scores.shape;
  const ValidRows valid(relation.mask, s.batch, s.frames);
  const auto store = passes().store[int(scores.dtype)];
  const int64_t planes = s.batch * s.frames * s.channels, features = relation.grid.features(s);
  parallel(useful_threads(threads, 4 * latent_bytes(scores)), [&](const Worker& worker) {
    Chunks chunks(scores, relation.grid, &grad);
    alignas(64) float out[kDmdChunk];
    const int64_t end = worker.end(planes), regions = chunks.regions();
    for (int64_t item = worker.begin(planes); item < end; ++item) {
      const PlaneIndex p = plane_of(s, item);
      const bool counts = relation.mask.valid(p.b, p.f);
      const float factor = dmd && factors[p.b] != 0.0f ? float(upstream * double(factors[p.b])) : 0.0f;
      const float norm = norm_of(rule, norms, p.b, p.f);
      const bool direct = chunks.direct() && rule.huber_c == 0 && factor != 0.0f && has_normal_inverse(norm);
      for (int64_t region = 0; region < regions; ++region) {
        const int64_t k = p.c * regions + region;
        double share = 0;
        if (counts && frame_grad) share += frame_scale * double(frame_grad[(p.b * s.frames + p.f) * features + k]);
        if (counts && batch_grad)
          share += batch_scale / double(valid.count(p.b)) * double(batch_grad[p.b * features + k]);
        const float base = float(share / chunks.area(region));
        chunks.each(region, [&](int64_t y, int64_t x, int64_t n) {
          char* target = const_cast<char*>(address(grad, scores.dtype, p.b, p.f, p.c, y, x));
          if (direct) {
            chunks.loops().run_gradient[int(scores.dtype)](chunks.run(p, y, x), n, 1.0f / norm, factor, base,
                                                           rule.nan == NanPolicy::to_num, target);
            return;
          }
          if (factor == 0.0f) {
            std::fill_n(out, n, base);
          } else {
            chunks.fetch(p, y, x, n, false);
            chunks.loops().gradient(chunks.d, chunks.mask(p, y, x, n), n, norm, factor, base, float(rule.huber_c),
                                    rule.nan == NanPolicy::to_num, out);
          }
          store(out, n, target, grad.stride[4]);
        });
      }
    }
  });
}

}  // namespace codmd
