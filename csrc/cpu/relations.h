// SPDX-License-Identifier: Apache-2.0
//
// Relations in double: from inner products to divergences and gradient rows, several relations in one team.
#pragma once

#include <cstdint>
#include <vector>

#include "../algebra.h"
#include "parallel.h"

namespace codmd {

// Inner products of n rows, either from short features or from Grams that were streamed.
struct RowProducts {
  // Features of row i: x + row[i] * features, likewise r and d.
  const double *x = nullptr, *r = nullptr, *d = nullptr;
  const int32_t* row = nullptr;
  int64_t features = 0;
  double least = 0;  // of norms() in algebra.h
  // Upper triangles: students [n, n], scores [2n, 2n] of the rows r then d, fakes [n, n]; |f_i|^2 [n].
  const double *students = nullptr, *scores = nullptr, *fake_pairs = nullptr, *fake_squared = nullptr;

  Inner<double> pair(int n, int i, int j) const;  // but for ff
  double fakes(int n, int i, int j) const;        // f_i . f_j
  Norms<double> norms(int n, int i) const;
};

class Relation {
 public:
  Relation() = default;
  Relation(int n, const RowProducts& products)
      : n_(n),
        products_(products),
        norms_(size_t(n)),
        similarity_(size_t(n) * size_t(n)),
        excess_(size_t(n) * size_t(n)),
        kl_(size_t(n)) {}

  int rows() const { return n_; }
  const RowProducts& products() const { return products_; }
  // (1/n) sum of the rows' divergences; exactly 0 below two rows.
  double divergence() const;

  void normalise(int row);
  void compare(int row);  // with the rows from its own on, for both of each pair
  void diverge(int row, double temperature, double* scratch);              // scratch [2n]
  void gradient(int row, double temperature, double* matrix_row) const;    // row of M, [n]
  // out[columns[j]] = matrix_row[j] / divisor as float32; null columns stand for 0 .. n - 1.
  void narrow(int row, const double* matrix_row, double divisor, float* out, const int32_t* columns) const;

 private:
  int n_ = 0;
  RowProducts products_;
  std::vector<Norms<double>> norms_;
  std::vector<double> similarity_, excess_, kl_;
};

// Runs the relations' rows over the team, then write(relation, row, matrix_row, worker) for each. Relations below
// two rows have no rows here: their loss is 0 and their gradient is the caller's zeros.
class RelationTeam {
 public:
  RelationTeam(std::vector<Relation>& relations, double temperature, int threads);

  // Below about a tenth of a millisecond one thread is faster than a team and its barriers.
  int useful_threads(int64_t features) const { return pairs_ * (64 + features) < (1 << 17) ? 1 : threads_; }

  template <class Write>
  void run(const Worker& worker, const Write& write) {
    double* scratch = scratch_.data() + 2 * largest_ * size_t(worker.index);
    each(worker, [](Relation& relation, int, int row) { relation.normalise(row); });
    worker.barrier();
    // From both ends in turn: a worker's share has as many pairs as another's.
    each(worker, [](Relation& relation, int, int row) {
      relation.compare(row % 2 ? relation.rows() - 1 - row / 2 : row / 2);
    });
    worker.barrier();
    each(worker, [&](Relation& relation, int, int row) { relation.diverge(row, temperature_, scratch); });
    worker.barrier();
    each(worker, [&](Relation& relation, int which, int row) {
      relation.gradient(row, temperature_, scratch);
      write(which, row, scratch);
    });
  }

 private:
  template <class Body>
  void each(const Worker& worker, const Body& body) {
    const int64_t total = first_.back(), end = worker.end(total);
    int which = 0;
    for (int64_t item = worker.begin(total); item < end; ++item) {
      while (item >= first_[size_t(which) + 1]) ++which;
      body(relations_[size_t(which)], which, int(item - first_[size_t(which)]));
    }
  }

  std::vector<Relation>& relations_;
  double temperature_;
  int threads_;
  int64_t pairs_ = 0;
  std::vector<int64_t> first_;
  size_t largest_ = 0;
  std::vector<double> scratch_;
};

// out[k] = scale * sum_j matrix_row[j] * x_j[k] over the short features of a relation.
void feature_gradient(const RowProducts& products, int n, const double* matrix_row, double scale, float* out);

}  // namespace codmd
