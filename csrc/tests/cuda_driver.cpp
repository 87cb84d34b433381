// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels' bodies on simulated threads, for the sanitizers: how work is cut, and every function over odd
// shapes and strides on heap blocks without a spare byte. Prints the number of failed checks and returns it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <set>
#include <vector>

#include "../cuda/gram.h"
#include "../cuda/launch.h"
#include "../cuda/plan.h"

namespace {

using namespace codmd;
using namespace codmd::cuda;

int failures = 0;

void check(bool holds, const char* claim) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s\n", claim);
}

void units_cover_every_element_once() {
  const Shape shapes[] = {{1, 2, 1, 1, 1}, {2, 3, 2, 7, 13}, {1, 1, 1, 41, 67}, {2, 1, 3, 5, 2}};
  for (const Shape& s : shapes)
    for (const Grid& grid : {Grid{1, 1}, Grid{std::min<int64_t>(s.height, 3), 1}, Grid{1, std::min<int64_t>(s.width, 2)}})
      for (int64_t gap : {0, 5})
        for (int64_t offset : {0, 1, 3}) {
          const int64_t row = s.width + gap, plane = s.height * row;
          std::vector<uint16_t> memory(size_t(s.batch * s.frames * s.channels * plane + offset));
          const Tensor tensor{memory.data() + offset,
                              {s.frames * s.channels * plane, s.channels * plane, plane, row, 1}};
          Cut cut = cut_planes(s, grid, 2, {tensor}, {}, 1, true);
          check(cut.wide, "one tensor always agrees with itself");
          for (int64_t splits : {int64_t(1), int64_t(3)}) {
            cut.splits = splits;
            std::vector<int> seen(memory.size());
            for (int64_t index = 0; index < cut.units(); ++index) {
              const Unit unit = cut.at(index, kVector<bf16>);
              for (int thread = 0; thread < kThreads; ++thread)
                each_chunk<bf16>(cut, unit, tensor, thread, [&](int64_t y, int64_t x, auto count) {
                  const int64_t at = tensor.offset(unit.b, unit.f, unit.c, unit.y + y, unit.x + x);
                  const auto address = reinterpret_cast<uintptr_t>(memory.data() + offset + at);
                  check(count.value == 1 || address % 16 == 0, "wide accesses are aligned");
                  for (int e = 0; e < count.value; ++e) ++seen[size_t(offset + at + e)];
                });
            }
            int64_t once = 0;
            for (int count : seen) {
              check(count <= 1, "no element is visited twice");
              once += count;
            }
            check(once == s.batch * s.frames * s.channels * s.height * s.width, "every element is visited");
          }
        }
}

void offsets_pass_two_to_the_thirty_first() {
  const Shape shape{4, 81, 48, 1080, 1920};
  const Tensor tensor{reinterpret_cast<const void*>(uintptr_t(4096)),
                      {int64_t(81) * 48 * 1080 * 1920, int64_t(48) * 1080 * 1920, 1080 * 1920, 1920, 1}};
  const Cut cut = cut_planes(shape, {1, 1}, 2, {tensor}, {}, 132, true);
  const Unit last = cut.at(cut.units() - 1, kVector<bf16>);
  check(last.b == 3 && last.f == 80 && last.c == 47, "the last unit is the last plane");
  const int64_t offset = tensor.offset(last.b, last.f, last.c, last.y, last.x) + last.area() - 1;
  check(offset == int64_t(4) * 81 * 48 * 1080 * 1920 - 1 && offset > int64_t(1) << 31, "its last element is the last");
}

void tiles_cover_every_product_once() {
  for (int64_t n : {1, 2, 4, 5, 21, 24, 25, 49, 70}) {
    std::set<std::vector<int64_t>> products;
    const int64_t panels = panels_of(n);
    for (int64_t work = 0; work < panel_pairs(n); ++work) {
      const PanelPair pair = panel_pair(work, panels);
      const bool same = pair.a == pair.b;
      const int a = GramPass<float>::quads(pair.a, n), b = GramPass<float>::quads(pair.b, n);
      const int tiles = tiles_of(a, b, same);
      check(tiles <= kThreads, "a thread holds one tile");
      for (int t = 0; t < tiles; ++t) {
        const Tile tile = tile_at(t, a, b, same);
        for (int entry = 0; entry < 16; ++entry) {
          const int64_t i = (tile.left_panel ? pair.b : pair.a) * kPanel + 4 * tile.left_quad + entry / 4;
          const int64_t j = (tile.right_panel ? pair.b : pair.a) * kPanel + 4 * tile.right_quad + entry % 4;
          if (i >= n || j >= n) continue;
          const bool fresh = products.insert({tile.left_part, tile.right_part, i, j}).second;
          check(fresh, "no product is computed twice");
          if (tile.left_part == tile.right_part && !tile.diagonal())
            products.insert({tile.left_part, tile.right_part, j, i});
        }
      }
    }
    check(int64_t(products.size()) == 4 * n * n, "every product is computed");
  }
}

// One heap block, exactly as long as its strides reach.
struct Latents {
  Latents(const Shape& s, int64_t gap, unsigned seed) {
    const int64_t row = s.width + gap, plane = s.height * row;
    memory.resize(size_t(s.batch * s.frames * s.channels * plane - gap));
    for (float& value : memory) value = float((seed = seed * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
    tensor = {memory.data(), {s.frames * s.channels * plane, s.channels * plane, plane, row, 1}};
  }
  std::vector<float> memory;
  Tensor tensor;
};

void functions_stay_inside_their_memory() {
  const Shape shapes[] = {{1, 2, 1, 1, 1}, {2, 5, 3, 7, 13}, {3, 70, 2, 2, 3}, {2, 3, 2, 9, 67}, {2, 1, 4, 5, 3}};
  for (const Shape& s : shapes)
    for (int64_t gap : {0, 3})
      for (const Grid& grid : {Grid{1, 1}, Grid{std::min<int64_t>(s.height, 2), 1}, Grid{0, 0}})
        for (bool masked : {false, true}) {
          const Latents x(s, gap, 1), r(s, 0, 2), f(s, gap, 3);
          Latents out(s, gap, 4);
          std::vector<uint8_t> valid(size_t(s.batch * s.frames), 1), selected(x.memory.size(), 1);
          valid[0] = 0;
          const FrameMask mask{masked ? valid.data() : nullptr, {s.frames, 1}};
          const bool pooled_path = grid.height > 0;
          const int64_t features = s.channels * (pooled_path ? grid.height * grid.width : s.height * s.width);
          std::vector<float> terms(5), frame_grad(size_t(s.batch * s.frames * (pooled_path ? features : s.frames)));
          std::vector<float> batch_grad(size_t(s.batch * features)), pooled(size_t(s.batch * (3 * features + 1)));
          std::vector<uint32_t> counters(size_t(counters_of(s.batch, s.frames)));
          const auto run = [&](auto function) {
            std::vector<char> workspace(size_t(function(Run{0, 4, 0, 0, nullptr})));
            function(Run{0, 4, 0, reinterpret_cast<uintptr_t>(workspace.data()), counters.data()});
            for (uint32_t counter : counters) check(counter == 0, "counters rest at zero");
          };
          const Scores scores{s, DType::f32, x.tensor, r.tensor, f.tensor, mask, grid};
          const Numbers numbers{{0.1, nullptr}, {0.5, nullptr}, {2.0, nullptr}, {1.0, nullptr}, {1.5, nullptr}, {}};
          const Found both{terms.data(), nullptr, nullptr, frame_grad.data(), batch_grad.data(), nullptr};
          run([&](const Run& r_) { return codmd::cuda::relation(r_, scores, numbers, both); });
          check(std::isfinite(terms[0]) && terms[0] >= 0.0f, "a divergence is finite and not negative");
          const std::vector<float> whole = terms;
          run([&](const Run& r_) {
            return codmd::cuda::relation(r_, scores, numbers,
                                         {terms.data(), nullptr, nullptr, frame_grad.data(), nullptr, pooled.data()});
          });
          const std::vector<float> kept = terms;
          const Gathered all{pooled.data(), s.batch, features, 0, s.batch, 1.0, kept.data(), false};
          run([&](const Run& r_) {
            return codmd::cuda::gathered(r_, all, numbers, terms.data(), batch_grad.data());
          });
          check(std::fabs(terms[0] - whole[0]) <= 1e-5f * (1e-3f + whole[0]), "two stages equal one");
          const float one = 1.0f;
          const Run bare{0, 4, 0, 0, nullptr};
          const Upstream upstream{&one, nullptr, nullptr, nullptr};
          if (!pooled_path) {
            whole_gradient(bare, s, DType::f32, x.tensor, mask, numbers, upstream, both, out.tensor);
            continue;
          }
          DmdScores shape_only{};
          shape_only.shape = s;
          gradient(bare, shape_only, {}, mask, grid, numbers, upstream, both, out.tensor);
          DmdRule rule{};
          rule.scope = NormScope::block, rule.block = 2, rule.coefficient = 0.5;
          DmdScores dmd{};
          dmd.shape = s, dmd.student = x.tensor, dmd.real = r.tensor, dmd.fake = f.tensor, dmd.real_uncond = f.tensor;
          if (masked) dmd.mask = {selected.data(), {x.tensor.stride[0], x.tensor.stride[1], x.tensor.stride[2],
                                                   x.tensor.stride[3], x.tensor.stride[4]}};
          std::vector<float> norms(size_t(rule.norms(s))), factors(size_t(s.batch));
          const Found found{terms.data(), norms.data(), factors.data(), frame_grad.data(), batch_grad.data(), nullptr};
          run([&](const Run& r_) {
            return objective(r_, dmd, rule, true, mask, grid, numbers, found);
          });
          check(std::isfinite(terms[1]) && terms[1] >= 0.0f, "the loss is finite and not negative");
          gradient(bare, dmd, rule, mask, grid, numbers, upstream, found, out.tensor);
        }
}

}  // namespace

int main() {
  units_cover_every_element_once();
  offsets_pass_two_to_the_thirty_first();
  tiles_cover_every_product_once();
  for (uint64_t seed : {0, 5}) {
    simulation_seed() = seed;
    functions_stay_inside_their_memory();
  }
  std::printf("%d failed checks\n", failures);
  return failures ? 1 : 0;
}
