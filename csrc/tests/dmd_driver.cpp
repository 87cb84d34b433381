// SPDX-License-Identifier: Apache-2.0
//
// Exercises the DMD passes outside Python, for the sanitizers: forward and backward over odd shapes, strides, masks,
// guidance, flows, norms and every instruction set, on heap blocks without a spare byte, against a loop in double.
// Prints the number of failed checks and returns it.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <vector>

#include "../cpu/backend.h"

namespace {

using namespace codmd;

int failures = 0;

void check(bool holds, const char* claim) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s\n", claim);
}

double uniform(uint64_t counter) {
  uint64_t z = counter * 0x9E3779B97F4A7C15ull + 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return double(int64_t(z ^ (z >> 31))) / 9.3e18;
}

// A latent of exactly the bytes it needs: contiguous, or with the pixels of a row `gap` elements apart.
class Block {
 public:
  Block(const Shape& s, DType dtype, int64_t gap, uint64_t seed) : dtype_(dtype) {
    const int64_t sizes[5] = {s.batch, s.frames, s.channels, s.height, s.width};
    int64_t stride = gap;
    for (int axis = 4; axis >= 0; --axis) {
      latent_.stride[axis] = stride;
      stride *= sizes[axis];
    }
    const int64_t count = 1 + (stride / gap - 1) * gap, bytes = dtype == DType::f32 ? 4 : 2;
    data_.reset(new uint8_t[size_t(count * bytes)]());
    for (int64_t i = 0; i < count; i += gap) {
      const float value = float(uniform(seed + uint64_t(i)));
      if (dtype == DType::f32) reinterpret_cast<float*>(data_.get())[i] = value;
      else reinterpret_cast<uint16_t*>(data_.get())[i] = bits(value);
    }
    latent_.data = data_.get();
  }

  const Tensor& latent() const { return latent_; }

  double at(int64_t b, int64_t f, int64_t c, int64_t y, int64_t x) const {
    const int64_t* s = latent_.stride;
    const int64_t i = b * s[0] + f * s[1] + c * s[2] + y * s[3] + x * s[4];
    if (dtype_ == DType::f32) return double(reinterpret_cast<float*>(data_.get())[i]);
    const uint16_t half = reinterpret_cast<uint16_t*>(data_.get())[i];
    if (dtype_ == DType::f16) {
      const int exponent = (half >> 10) & 31, digits = (half & 0x3ff) | (exponent ? 0x400 : 0);
      return std::ldexp(double(half & 0x8000 ? -digits : digits), (exponent ? exponent : 1) - 25);
    }
    return std::ldexp(double((half & 0x7f) | 0x80), ((half >> 7) & 255) - 134) * (half & 0x8000 ? -1 : 1) *
           ((half & 0x7fff) ? 1 : 0);
  }

 private:
  // Truncated: a value of the type, whichever one. Keeps clear of subnormals.
  uint16_t bits(float value) const {
    uint32_t word;
    static_assert(sizeof word == sizeof value, "");
    __builtin_memcpy(&word, &value, 4);
    if (dtype_ == DType::bf16) return uint16_t(word >> 16);
    const uint32_t exponent = (word >> 23) & 255;
    if (exponent < 113) return 0;
    return uint16_t(((word >> 16) & 0x8000) | ((exponent - 112) << 10) | ((word >> 13) & 0x3ff));
  }

  DType dtype_;
  Tensor latent_{};
  std::unique_ptr<uint8_t[]> data_;
};

struct Case {
  Shape shape;
  DType dtype;
  int64_t gap;
  bool guided, critic_guided, flow, masked, decoupled;
  NormScope scope;
  Grid grid;
  int threads;
};

void run(const Case& one) {
  const Shape& s = one.shape;
  Block x(s, one.dtype, one.gap, 1), f(s, one.dtype, one.gap, 1000003), c(s, one.dtype, one.gap, 2000003),
      u(s, one.dtype, one.gap, 3000017), fu(s, one.dtype, one.gap, 4000037), noisy(s, one.dtype, one.gap, 5000011),
      c2(s, one.dtype, one.gap, 7000003), u2(s, one.dtype, one.gap, 8000009), out(s, one.dtype, one.gap, 6000011);
  std::vector<float> sigma(size_t(s.batch * s.frames));
  for (size_t i = 0; i < sigma.size(); ++i) sigma[i] = 0.5f + 0.4f * float(uniform(77 + i));
  std::vector<uint8_t> mask(size_t(s.batch * s.frames * s.channels * s.height * s.width));
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = uniform(99 + i) > -0.3;

  DmdScores scores{};
  scores.shape = s, scores.dtype = one.dtype;
  scores.student = x.latent(), scores.fake = f.latent(), scores.real = c.latent();
  if (one.guided) scores.real_uncond = u.latent();
  if (one.critic_guided) scores.fake_uncond = fu.latent();
  if (one.flow) scores.noisy = noisy.latent(), scores.sigma = sigma.data();
  if (one.decoupled) scores.augment_real = c2.latent(), scores.augment_uncond = u2.latent();
  scores.sigma_stride[0] = s.frames, scores.sigma_stride[1] = 1;
  if (one.masked) scores.mask.data = mask.data();
  const int64_t sizes[5] = {s.batch, s.frames, s.channels, s.height, s.width};
  for (int64_t axis = 4, stride = 1; axis >= 0; stride *= sizes[axis--]) scores.mask.stride[axis] = stride;
  const Numbers numbers{{0.1, nullptr}, {0.1, nullptr}, {0.1, nullptr}, {1.0, nullptr}, {2.5, nullptr}, {0.5, nullptr}};

  DmdRule rule{};
  rule.scope = one.scope, rule.block = 1, rule.coefficient = 0.5;

  const int64_t features = one.grid.features(s);
  std::vector<float> terms(5), norms(size_t((one.decoupled ? 2 : 1) * rule.norms(s))), factors(size_t(s.batch)),
      frame_grad(size_t(s.batch * s.frames * features)), pooled(size_t(s.batch * (3 * features + 1))),
      batch_grad(size_t(s.batch * features), 0.25f);
  float* frames = s.frames > 1 ? frame_grad.data() : nullptr;
  objective(scores, rule, true, {}, one.grid, numbers, one.threads,
            {terms.data(), norms.data(), factors.data(), frames, batch_grad.data(), pooled.data()});
  std::vector<float> alone(5);
  objective(scores, rule, false, {}, {1, 1}, numbers, one.threads,
            {alone.data(), norms.data(), factors.data(), nullptr, nullptr, nullptr});
  check(std::fabs(alone[1] - terms[1]) <= 1e-6f * std::fabs(terms[1]), "one pass or two, the same loss");

  double loss = 0, selected = 0;
  const auto difference = [&](int64_t b, int64_t fr, int64_t ch, int64_t y, int64_t xx) {
    double d = f.at(b, fr, ch, y, xx) - c.at(b, fr, ch, y, xx);
    if (one.critic_guided) d += 0.5 * (f.at(b, fr, ch, y, xx) - fu.at(b, fr, ch, y, xx));
    if (one.guided) d -= 2.5 * (c.at(b, fr, ch, y, xx) - u.at(b, fr, ch, y, xx));
    return one.flow ? -double(sigma[size_t(b * s.frames + fr)]) * d : d;
  };
  const auto each = [&](const auto& body) {
    size_t at = 0;
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t fr = 0; fr < s.frames; ++fr)
        for (int64_t ch = 0; ch < s.channels; ++ch)
          for (int64_t y = 0; y < s.height; ++y)
            for (int64_t xx = 0; xx < s.width; ++xx, ++at) {
              const size_t level = one.scope == NormScope::batch   ? 0
                                   : one.scope == NormScope::block ? size_t(b * s.frames + fr)
                                                                   : size_t(b);
              double g = difference(b, fr, ch, y, xx) / double(norms[level]);
              if (one.decoupled)
                g += 2.5 * (u2.at(b, fr, ch, y, xx) - c2.at(b, fr, ch, y, xx)) /
                     double(norms[size_t(rule.norms(s)) + level]);
              body(g, !one.masked || mask[at], out.at(b, fr, ch, y, xx));
            }
  };
  each([&](double g, bool in, double) { loss += in ? g * g : 0, selected += in; });
  check(std::fabs(0.5 * loss / selected - terms[1]) <= 1e-5 * terms[1], "the loss is half the mean of g^2");

  const float whole = float(selected);
  gradient(scores, rule, {}, {1, 1}, numbers, {&whole, nullptr, nullptr, nullptr}, one.threads,
           {nullptr, norms.data(), factors.data(), nullptr, nullptr, nullptr}, out.latent());
  const double rounding = one.dtype == DType::f32 ? 1e-5 : one.dtype == DType::f16 ? 1e-3 : 8e-3;
  bool exact = true;
  each([&](double g, bool in, double written) {
    exact &= std::fabs((in ? g : 0) - written) <= rounding * std::fabs(g) + 1e-5;
  });
  check(exact, "the gradient is g over the number of selected elements");
  gradient(scores, rule, {}, one.grid, numbers, {&whole, nullptr, nullptr, nullptr}, one.threads,
           {nullptr, norms.data(), factors.data(), frames, batch_grad.data(), nullptr}, out.latent());
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 1, 1, 1}, {2, 3, 2, 5, 7}, {1, 4, 3, 1, 53}, {3, 2, 1, 40, 33}};
  int cases = 0;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!select_isa(isa)) continue;
    for (const Shape& shape : shapes)
      for (DType dtype : {DType::f32, DType::bf16, DType::f16})
        for (int bits = 0; bits < 16; ++bits, ++cases) {
          const bool decoupled = (bits & 5) == 5;
          const bool guided = bits & 1 && !decoupled, critic = bits & 2, flow = bits & 4 && !decoupled, masked = bits & 8;
          const NormScope scope = NormScope(cases % 3);
          const Grid grid = shape.height > 2 && bits % 3 == 1 ? Grid{2, 3} : Grid{1, 1};
          run({shape, dtype, 1 + cases % 2, guided, critic, flow, masked, decoupled, scope, grid, 1 + cases % 3});
        }
  }
  std::printf("%d cases, %d failed checks\n", cases, failures);
  return failures != 0;
}
