// SPDX-License-Identifier: Apache-2.0
//
// The gradient of the distribution matching loss and of pooled features, spread over the pixels that they average.
#include "dmd_regions.h"
#include "parallel.h"

namespace codmd {

void gradient(const DmdScores& scores, const DmdRule& rule, const FrameMask& mask, const Grid& grid,
              const Numbers& numbers, const Upstream& upstream, int threads, const Found& found, const Tensor& out) {
  const Shape& s = scores.shape;
  const Scales<double> scales(upstream, numbers, found.norms != nullptr);
  // A term that no gradient reaches must not spread its NaN as 0 * NaN.
  const bool dmd = found.norms && scales.dmd.reached();
  const float* frame_grad = scales.frame.reached() ? found.frame_grad : nullptr;
  const float* batch_grad = scales.batch.reached() ? found.batch_grad : nullptr;
  const double dmd_scale = scales.dmd(), frame_scale = scales.frame(), batch_scale = scales.batch();

  const ValidRows valid(mask, s.batch, s.frames);
  const auto store = passes().store[int(scores.dtype)];
  const bool to_num = rule.nan == NanPolicy::to_num;
  const auto fill = passes().fill[int(scores.dtype)];
  const int64_t planes = s.rows() * s.channels, features = grid.features(s);
  parallel(useful_threads(threads, (dmd ? 4 : 1) * s.bytes(scores.dtype)), [&](const Worker& worker) {
    Chunks chunks(scores, numbers, grid, &out);
    alignas(64) float values[kDmdChunk];
    const int64_t end = worker.end(planes), regions = chunks.regions();
    for (int64_t item = worker.begin(planes); item < end; ++item) {
      const PlaneIndex p = plane_of(s, item);
      const bool counts = mask.valid(p.b, p.f);
      const float factor = dmd && found.factors[p.b] != 0.0f ? float(dmd_scale * double(found.factors[p.b])) : 0.0f;
      const float* norms = factor != 0.0f ? found.norms + rule.norm_of(p.b, p.f, s.frames) : nullptr;
      const float norm = norms ? norms[0] : 1.0f;
      const NormPair pair{norm, norms && scores.decoupled() ? norms[rule.norms(s)] : 1.0f};
      const bool direct = chunks.direct() && !scores.decoupled() && rule.huber_c == 0 && has_normal_inverse(norm);
      for (int64_t region = 0; region < regions; ++region) {
        const int64_t k = p.c * regions + region;
        double share = 0;
        if (counts && frame_grad) share += frame_scale * double(frame_grad[(p.b * s.frames + p.f) * features + k]);
        if (counts && batch_grad)
          share += batch_scale / double(valid.count(p.b)) * double(batch_grad[p.b * features + k]);
        const float base = float(share / chunks.area(region));
        chunks.each(region, [&](int64_t y, int64_t x, int64_t n) {
          char* target = const_cast<char*>(address(out, scores.dtype, p.b, p.f, p.c, y, x));
          if (factor == 0.0f) {
            fill({target, 0, out.stride[4]}, 1, n, base);
          } else if (direct) {
            chunks.loops().run_gradient[int(scores.dtype)](chunks.run(p, y, x), n, 1.0f / norm, factor, base,
                                                           to_num, target);
          } else if (scores.decoupled()) {
            chunks.fetch_decoupled(p, y, x, n, pair, to_num);
            chunks.loops().gradient(chunks.d, chunks.mask(p, y, x, n), n, 1.0f, factor, base, 0.0f, false, values);
            store(values, n, target, out.stride[4]);
          } else {
            chunks.fetch(p, y, x, n, false);
            chunks.loops().gradient(chunks.d, chunks.mask(p, y, x, n), n, norm, factor, base, float(rule.huber_c),
                                    to_num, values);
            store(values, n, target, out.stride[4]);
          }
        });
      }
    }
  });
}

}  // namespace codmd
