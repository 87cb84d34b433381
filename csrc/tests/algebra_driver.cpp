// SPDX-License-Identifier: Apache-2.0
//
// Exercises algebra.h and the CPU passes outside Python, for the sanitizers: exact identities of the algebra in
// float and double, and forward plus backward over odd shapes, strides, masks and every instruction set, on heap
// blocks without a spare byte. Prints the number of failed checks and returns it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#include "../algebra.h"
#include "../cpu/backend.h"

namespace {

int failures = 0;

void check(bool holds, const char* claim) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s\n", claim);
}

// A small counter-based generator: uniform in (-1, 1).
double uniform(uint64_t counter) {
  uint64_t z = counter * 0x9E3779B97F4A7C15ull + 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return double(int64_t(z ^ (z >> 31))) / 9.3e18;
}

template <class T>
struct Problem {
  Problem(int n, int features, double perturbation, uint64_t seed) : n(n), features(features) {
    for (int k = 0; k < n * features; ++k) {
      x.push_back(T(uniform(seed + 3 * k)));
      r.push_back(T(uniform(seed + 3 * k + 1)));
      d.push_back(T(perturbation * uniform(seed + 3 * k + 2)));
    }
  }

  codmd::Inner<T> pair(int i, int j) const {
    codmd::Inner<T> sum{};
    for (int k = 0; k < features; ++k) {
      const int a = i * features + k, b = j * features + k;
      sum.xx += x[a] * x[b];
      sum.rr += r[a] * r[b];
      sum.rd += r[a] * d[b];
      sum.dr += d[a] * r[b];
      sum.dd += d[a] * d[b];
      sum.ff += (r[a] + d[a]) * (r[b] + d[b]);
    }
    return sum;
  }

  // The loss, and M if asked for.
  T loss(T temperature, std::vector<T>* matrix = nullptr) const {
    std::vector<codmd::Norms<T>> norms;
    for (int i = 0; i < n; ++i) {
      T squared = 0;
      for (int k = i * features; k < (i + 1) * features; ++k) squared += (r[k] + d[k]) * (r[k] + d[k]);
      codmd::Inner<T> own = pair(i, i);
      own.ff = squared;
      norms.push_back(codmd::norms(own, codmd::kLeastFloat));
    }
    std::vector<T> similarity(n * n), excess(n * n), q(n), log_q(n);
    T sum = 0;
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        similarity[i * n + j] = codmd::cosine(pair(i, j), norms[i], norms[j]);
        excess[i * n + j] = codmd::score_difference(pair(i, j), norms[i], norms[j]);
      }
      sum += codmd::centred_kl_row(&similarity[i * n], &excess[i * n], q.data(), log_q.data(), n, temperature);
    }
    if (matrix) {
      matrix->resize(n * n);
      for (int i = 0; i < n; ++i)
        codmd::gradient_row(i, similarity.data(), excess.data(), norms.data(), n, temperature, &(*matrix)[i * n]);
    }
    return sum / T(n);
  }

  int n, features;
  std::vector<T> x, r, d;
};

template <class T>
void algebra(double tolerance) {
  for (double temperature : {0.01, 0.1, 10.0}) {
    for (double perturbation : {1.0, 1e-2, 1e-4}) {
      Problem<T> problem(7, 5, perturbation, 11);
      const Problem<double> exact(problem.n, problem.features, perturbation, 11);
      std::vector<T> matrix;
      const T loss = problem.loss(T(temperature), &matrix);
      const double truth = exact.loss(temperature);
      check(std::isfinite(double(loss)) && loss >= 0, "a divergence is finite and not negative");
      check(std::fabs(double(loss) - truth) <= tolerance * (1 + 0.1 / temperature) * truth, "float agrees with double");

      double along = 0, size = 0;
      for (int i = 0; i < problem.n; ++i)
        for (int k = 0; k < problem.features; ++k) {
          double gradient = 0;
          for (int j = 0; j < problem.n; ++j)
            gradient += double(matrix[i * problem.n + j]) * double(problem.x[j * problem.features + k]);
          along += gradient * double(problem.x[i * problem.features + k]);
          size += std::fabs(gradient * double(problem.x[i * problem.features + k]));
        }
      check(std::fabs(along) <= 100 * tolerance * size, "the gradient is orthogonal to the features");

      Problem<T> louder = problem;
      for (T& value : louder.x) value *= T(8);
      check(std::fabs(double(louder.loss(T(temperature)) - loss)) <= tolerance * double(loss), "cosines ignore scale");
      Problem<T> same = problem;
      std::fill(same.d.begin(), same.d.end(), T(0));
      check(same.loss(T(temperature)) == T(0), "equal scores leave nothing to learn");
    }
  }
  Problem<T> degenerate(4, 3, 0.1, 5);
  std::fill(degenerate.x.begin(), degenerate.x.begin() + 3, T(0));
  std::fill(degenerate.r.begin(), degenerate.r.begin() + 3, T(0));
  std::vector<T> matrix;
  check(std::isfinite(double(degenerate.loss(T(0.1), &matrix))), "a zero row is finite");
  degenerate.x[4] = std::numeric_limits<T>::quiet_NaN();
  check(std::isnan(double(degenerate.loss(T(0.1)))), "NaN reaches the loss");
}

void gradient_is_the_derivative() {
  // The target is a constant, so the finite difference holds S(x) - Delta fixed: compare with d -> the same target.
  Problem<double> problem(5, 4, 0.3, 77);
  std::vector<double> matrix;
  problem.loss(0.2, &matrix);
  const int n = problem.n, features = problem.features;

  const auto similarities = [&](const std::vector<double>& x) {
    std::vector<double> s(n * n), norm(n);
    for (int i = 0; i < n; ++i) {
      for (int k = 0; k < features; ++k) norm[i] += x[i * features + k] * x[i * features + k];
      norm[i] = std::sqrt(norm[i]);
    }
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        for (int k = 0; k < features; ++k) s[i * n + j] += x[i * features + k] * x[j * features + k];
        s[i * n + j] /= norm[i] * norm[j];
      }
    return s;
  };
  const auto softmax = [&](std::vector<double> s) {
    for (int i = 0; i < n; ++i) {
      double sum = 0;
      for (int j = 0; j < n; ++j) sum += s[i * n + j] = std::exp(s[i * n + j] / 0.2);
      for (int j = 0; j < n; ++j) s[i * n + j] /= sum;
    }
    return s;
  };
  std::vector<double> fake = problem.r;
  for (size_t k = 0; k < fake.size(); ++k) fake[k] += problem.d[k];
  std::vector<double> shifted = similarities(problem.x), sf = similarities(fake), sr = similarities(problem.r);
  for (int k = 0; k < n * n; ++k) shifted[k] -= sf[k] - sr[k];
  const std::vector<double> target = softmax(shifted);
  const auto loss = [&](const std::vector<double>& x) {
    const std::vector<double> q = softmax(similarities(x));
    double sum = 0;
    for (int k = 0; k < n * n; ++k) sum += target[k] * std::log(target[k] / q[k]);
    return sum / n;
  };
  check(std::fabs(loss(problem.x) - problem.loss(0.2)) < 1e-13, "the sound form equals the plain one");
  for (int at = 0; at < n * features; ++at) {
    std::vector<double> up = problem.x, down = problem.x;
    up[at] += 1e-5, down[at] -= 1e-5;
    double gradient = 0;
    for (int j = 0; j < n; ++j) gradient += matrix[at / features * n + j] * problem.x[j * features + at % features];
    check(std::fabs((loss(up) - loss(down)) / 2e-5 - gradient) < 1e-8, "M x is the derivative");
  }
}

// One heap block per latent, exactly as long as its strides reach.
struct Block {
  Block(const codmd::Shape& s, codmd::DType dtype, bool channels_first, int64_t gap, uint64_t seed) {
    const int64_t row = s.width + gap, plane = s.height * row;
    const int64_t frame = channels_first ? plane : s.channels * plane;
    const int64_t channel = channels_first ? s.frames * plane : plane;
    latent = {nullptr, {s.frames * s.channels * plane, frame, channel, row, 1}};
    const int64_t elements = s.batch * s.frames * s.channels * plane - gap;
    bytes.resize(size_t(elements * (dtype == codmd::DType::f32 ? 4 : 2)));
    for (int64_t k = 0; k < elements; ++k) {
      const float value = float(uniform(seed + uint64_t(k)));
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == codmd::DType::f32) std::memcpy(bytes.data() + 4 * k, &value, 4);
      // For float16 the pattern is a number between 0.5 and 1, with the sign of value.
      const uint16_t half = dtype == codmd::DType::bf16 ? uint16_t(bits >> 16)
                                                        : uint16_t((bits >> 16 & 0x8000) | 0x3800 | (bits & 0x3ff));
      if (dtype != codmd::DType::f32) std::memcpy(bytes.data() + 2 * k, &half, 2);
    }
    latent.data = bytes.data();
  }
  std::vector<char> bytes;
  codmd::Tensor latent;
};

// `expected` receives the terms of the first instruction set and holds the others to them.
void passes(std::vector<float>& expected) {
  const bool first = expected.empty();
  size_t at = 0;
  const codmd::Shape shapes[] = {{1, 2, 1, 1, 1}, {2, 5, 3, 7, 13}, {3, 4, 2, 3, 41}, {2, 3, 2, 9, 67}, {2, 1, 4, 5, 3}};
  for (const codmd::Shape& s : shapes)
    for (const codmd::DType dtype : {codmd::DType::f32, codmd::DType::bf16, codmd::DType::f16})
      for (const bool channels_first : {false, true})
        for (const int64_t gap : {0, 3})
          for (const codmd::Grid& grid : {codmd::Grid{1, 1}, codmd::Grid{std::min<int64_t>(s.height, 2), 1}, codmd::Grid{0, 0}})
            for (const bool masked : {false, true}) {
              const Block x(s, dtype, channels_first, gap, 1), r(s, dtype, channels_first, 0, 2), f(s, dtype, !channels_first, gap, 3);
              Block out(s, dtype, channels_first, gap, 4);
              std::vector<uint8_t> mask(size_t(s.batch * s.frames), 1);
              if (masked) mask[0] = 0;
              const codmd::FrameMask frames{masked ? mask.data() : nullptr, {s.frames, 1}};
              const int64_t features = grid.features(s), row = grid.every_pixel() ? s.frames : features;
              std::vector<float> terms(3), frame_grad(size_t(s.batch * s.frames * row)), batch_grad(size_t(s.batch * features));
              std::vector<float> pooled(size_t(s.batch * (3 * features + 1))), staged(3);
              const codmd::Scores scores{s, dtype, x.latent, r.latent, f.latent, frames, grid};
              const codmd::Numbers numbers{{0.1, nullptr}, {0.5, nullptr}, {2.0, nullptr}, {}, {}, {}};
              codmd::Found found{terms.data(), nullptr, nullptr, frame_grad.data(), batch_grad.data(), nullptr};
              codmd::relation(scores, numbers, 3, found);
              codmd::relation(scores, numbers, 3,
                              {staged.data(), nullptr, nullptr, frame_grad.data(), nullptr, pooled.data()});
              const std::vector<float> kept = staged;
              codmd::gathered({pooled.data(), s.batch, features, 0, s.batch, 1.0, kept.data(), false}, numbers, 2,
                              staged.data(), batch_grad.data());
              if (first) expected.insert(expected.end(), terms.begin(), terms.end());
              for (const float term : terms) {
                const float other = expected[at++];
                check(std::fabs(term - other) <= 2e-5f * (1e-3f + other), "instruction sets agree");
              }
              check(std::fabs(staged[0] - terms[0]) <= 1e-5f * (1e-3f + std::fabs(terms[0])), "two stages equal one");
              const float one = 1.0f;
              const codmd::Upstream upstream{&one, nullptr, nullptr, &one};
              codmd::DmdScores shape_only{};
              shape_only.shape = s, shape_only.dtype = dtype;
              if (grid.every_pixel())
                codmd::whole_gradient(s, dtype, x.latent, frames, numbers, upstream, 3, found, out.latent);
              else
                codmd::gradient(shape_only, {}, frames, grid, numbers, upstream, 3, found, out.latent);
            }
}

}  // namespace

int main() {
  algebra<double>(1e-11);
  algebra<float>(2e-5);
  gradient_is_the_derivative();
  std::vector<float> terms;
  for (const char* isa : {"baseline", "avx2", "avx512"})
    if (codmd::select_isa(isa)) passes(terms);
  std::printf("%d failed checks\n", failures);
  return failures ? 1 : 0;
}
