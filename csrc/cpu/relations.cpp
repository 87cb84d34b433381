// SPDX-License-Identifier: Apache-2.0
#include "relations.h"

#include <algorithm>

#include "passes.h"

namespace codmd {

Inner<double> RowProducts::pair(int n, int i, int j) const {
  if (x) {
    const int64_t at_i = row[i] * features, at_j = row[j] * features;
    const double* const left[3] = {x + at_i, r + at_i, d + at_i};
    const double* const right[3] = {x + at_j, r + at_j, d + at_j};
    double sums[5];
    passes().inner(left, right, features, sums);
    return {sums[0], sums[1], sums[2], sums[3], sums[4], 0.0};
  }
  const int low = std::min(i, j), high = std::max(i, j);
  const auto score = [&](int a, int b) { return scores[int64_t(a) * 2 * n + b]; };
  return {students[int64_t(low) * n + high], score(low, high), score(i, n + j), score(j, n + i),
          score(n + low, n + high), 0.0};
}

double RowProducts::fakes(int n, int i, int j) const {
  if (!x) return i == j ? fake_squared[i] : fake_pairs[int64_t(std::min(i, j)) * n + std::max(i, j)];
  const int64_t at_i = row[i] * features, at_j = row[j] * features;
  double sum = 0;
  for (int64_t k = 0; k < features; ++k) sum += (r[at_i + k] + d[at_i + k]) * (r[at_j + k] + d[at_j + k]);
  return sum;
}

Norms<double> RowProducts::norms(int n, int i) const {
  Inner<double> own = pair(n, i, i);
  own.ff = fakes(n, i, i);
  return codmd::norms(own, least);
}

double Relation::divergence() const {
  if (n_ < 2) return 0.0;
  double sum = 0;
  for (double row : kl_) sum += row;
  return sum / n_;
}

void Relation::normalise(int row) { norms_[size_t(row)] = products_.norms(n_, row); }

void Relation::compare(int row) {
  for (int j = row; j < n_; ++j) {
    const Norms<double>&left = norms_[size_t(row)], &right = norms_[size_t(j)];
    Inner<double> pair = products_.pair(n_, row, j);
    if (left.scores_apart || right.scores_apart) pair.ff = products_.fakes(n_, row, j);
    const size_t at = size_t(row) * size_t(n_) + size_t(j), mirrored = size_t(j) * size_t(n_) + size_t(row);
    similarity_[at] = similarity_[mirrored] = cosine(pair, left, right);
    excess_[at] = excess_[mirrored] = score_difference(pair, left, right);
  }
}

void Relation::diverge(int row, double temperature, double* scratch) {
  double* similarity = similarity_.data() + size_t(row) * n_;
  double* shift = excess_.data() + size_t(row) * n_;
  kl_[size_t(row)] = centred_kl_row(similarity, shift, scratch, scratch + n_, n_, temperature);
}

void Relation::gradient(int row, double temperature, double* matrix_row) const {
  gradient_row(row, similarity_.data(), excess_.data(), norms_.data(), n_, temperature, matrix_row);
}

void Relation::narrow(int row, const double* matrix_row, double divisor, float* out, const int32_t* columns) const {
  for (int j = 0; j < n_; ++j) {
    const bool holds = float_holds_matrix(norms_[size_t(row)].student, norms_[size_t(j)].student);
    out[columns ? columns[j] : j] = holds ? float(matrix_row[j] / divisor) : NAN;
  }
}

RelationTeam::RelationTeam(std::vector<Relation>& relations, double temperature, int threads)
    : relations_(relations), temperature_(temperature), threads_(threads), first_(1, 0) {
  for (const Relation& relation : relations) {
    const int rows = relation.rows() < 2 ? 0 : relation.rows();
    first_.push_back(first_.back() + rows);
    pairs_ += int64_t(rows) * rows;
    largest_ = std::max(largest_, size_t(rows));
  }
  scratch_.resize(2 * largest_ * size_t(threads));
}

void feature_gradient(const RowProducts& products, int n, const double* matrix_row, double scale, float* out) {
  constexpr int64_t block = 64;
  for (int64_t start = 0; start < products.features; start += block) {
    const int64_t length = std::min(block, products.features - start);
    double sum[block] = {};
    for (int j = 0; j < n; ++j) {
      const double* x = products.x + products.row[j] * products.features + start;
      for (int64_t k = 0; k < length; ++k) sum[k] += matrix_row[j] * x[k];
    }
    for (int64_t k = 0; k < length; ++k) out[start + k] = float(scale * sum[k]);
  }
}

}  // namespace codmd
