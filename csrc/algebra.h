// SPDX-License-Identifier: Apache-2.0
//
// The small algebra of one relation: n rows of K features become n x n cosine similarities, a divergence per
// row, and the matrix M with d(loss)/d(x_i) = sum_j M_ij x_j (CoDMD, arXiv 2606.21982).
//
// Rows are x (student), r (real) and d = fake - real. Everything follows from the change of a unit vector,
//   e_i = f_i/|f_i| - r_i/|r_i| = (d_i - r_i (|f_i| - |r_i|)/|r_i|)/|f_i|,
//   Delta_ij = S_ij(f) - S_ij(r) = e_i . f_j/|f_j| + r_i/|r_i| . e_j,
// whose summands are of the order of d: no digit is lost when fake nears real. Short features (pooled) have e at hand,
// long ones (every pixel, streamed Grams) the inner products of r and d. The sign is that of the gradient, q - p.
// The CPU instantiates with double, the GPU with float.
#pragma once

#include <cmath>
#include <cstdint>

#include "types.h"

namespace codmd {

// Inner products of row i with row j.
template <class T>
struct Inner {
  T xx;  // x_i . x_j
  T rr;  // r_i . r_j
  T rd;  // r_i . d_j
  T dr;  // d_i . r_j
  T dd;  // d_i . d_j
  T ff;  // f_i . f_j, read where a norm is clamped
};

template <class T>
struct Norms {
  T student;  // max(|x|, 1e-12)
  T real;     // max(|r|, 1e-12)
  T fake;     // max(|f|, 1e-12)
  T change;   // fake - real, without the cancellation
  bool clamped;  // |x| lies under the floor: the norm is a constant there
  bool scores_apart;  // |r| or |f| does, or |f| lies far under |r|: Delta is the plain difference of similarities
};

// The least |f|/|r| at which f = r + d keeps digits, by the way in which d was rounded and f is used.
constexpr double kLeastFloat = 0x1p-12;    // features of a float32 d
constexpr double kLeastGram = 0x1p-6;      // Grams of a float32 d, which square the ratio
constexpr double kLeastDouble = 0x1p-30;   // features of a d in double, as float32 in and out asks for

// A float32 d that rounding made -r moves by one rounding, where f is not zero: |r + d| tells such an f from a zero.
CODMD_HD inline float kept_apart(float r, float d, bool zero) {
  return r + d == 0.0f && !zero ? d * 0x1.fffffep-1f : d;
}

CODMD_HD inline float difference_of(float r, float f) { return kept_apart(r, f - r, f == 0.0f); }

// NaN where the norm is not a number of T: a quotient by infinity would be a finite wrong number.
template <class T>
CODMD_HD inline T at_least_floor(T norm) {
  if (!(norm - norm == T(0))) return T(NAN);
  return norm < T(1e-12) ? T(1e-12) : norm;
}

// `own` is row i with itself; |f_i|^2 is summed from f itself, which keeps its digits when real and difference nearly
// cancel. NaN where |f| is less than `least` |r|, but for a zero.
template <class T>
CODMD_HD inline Norms<T> norms(const Inner<T>& own, double least) {
  using std::sqrt;
  const T x = sqrt(own.xx), a = sqrt(own.rr), b = sqrt(own.ff);
  Norms<T> result;
  result.student = at_least_floor(x);
  result.real = at_least_floor(a);
  result.fake = b > T(0) && b < T(least) * a ? T(NAN) : at_least_floor(b);
  result.clamped = x < T(1e-12);
  result.scores_apart = a < T(1e-12) || b < T(1e-12) || b < T(kLeastGram) * a;
  result.change = result.scores_apart ? result.fake - result.real : (T(2) * own.rd + own.dd) / (a + b);
  return result;
}

// S_ij(x).
template <class T>
CODMD_HD inline T cosine(const Inner<T>& pair, const Norms<T>& i, const Norms<T>& j) {
  return pair.xx / (i.student * j.student);
}

// Delta_ij of rows known by their inner products. Where a norm is clamped or |f| far under |r| it is the plain difference
// of two similarities: |f_i| - |r_i| would swamp it.
template <class T>
CODMD_HD inline T score_difference(const Inner<T>& pair, const Norms<T>& i, const Norms<T>& j) {
  if (i.scores_apart || j.scores_apart) return pair.ff / i.fake / j.fake - pair.rr / i.real / j.real;
  const T rf = pair.rr + pair.rd;
  const T left = ((pair.dr + pair.dd) - (i.change / i.real) * rf) / i.fake;
  const T right = (pair.rd - (j.change / j.real) * pair.rr) / j.fake;
  return left / j.fake + right / i.real;
}

// Delta_ij of rows whose r and d are r/|r| and e.
template <class T>
CODMD_HD inline T unit_score_difference(const Inner<T>& units) {
  return units.dr + units.dd + units.rd;
}

// One component of e_i.
template <class T>
CODMD_HD inline T unit_change(T r, T d, const Norms<T>& norm) {
  if (norm.scores_apart) return (r + d) / norm.fake - r / norm.real;
  return (d - r / norm.real * norm.change) / norm.fake;
}

// expm1(x) - x, by its series where the subtraction would cost more digits than T can spare.
template <class T>
CODMD_HD inline T expm1_minus_identity(T x) {
  using std::expm1;
  const T limit = sizeof(T) > 4 ? T(0.05) : T(0.5);
  if (!(x > -limit && x < limit)) return expm1(x) - x;
  T sum = T(1) + x * T(1.0 / 9);
  sum = T(1) + sum * (x * T(1.0 / 8));
  sum = T(1) + sum * (x * T(1.0 / 7));
  sum = T(1) + sum * (x * T(1.0 / 6));
  sum = T(1) + sum * (x * T(1.0 / 5));
  sum = T(1) + sum * (x * T(1.0 / 4));
  sum = T(1) + sum * (x * T(1.0 / 3));
  return T(0.5) * x * x * sum;
}

// q (e^x - 1 - x), a term of the partition's excess over 1, and q (1 - e^y) = q - p. Beyond `overflow` the exponential
// swamps q and the direct form is exact.
template <class T>
CODMD_HD inline T excess_term(T q, T log_q, T x, T overflow = T(20)) {
  using std::exp;
  return x <= overflow ? q * expm1_minus_identity(x) : exp(log_q + x) - q * (T(1) + x);
}

template <class T>
CODMD_HD inline T probability_excess(T q, T log_q, T y, T overflow = T(20)) {
  using std::exp;
  return y < overflow ? -q * (y + expm1_minus_identity(y)) : q - exp(log_q + y);
}

// KL(p || q) of one row, q = softmax(S/tau), p = softmax((S - Delta)/tau), with the shift centred under q so that
// the first order cancels analytically. On entry `shift` holds Delta, on return q - p. `q` and `log_q` are scratch.
template <class T>
CODMD_HD inline T centred_kl_row(const T* similarity, T* shift, T* q, T* log_q, int n, T temperature) {
  using std::exp;
  using std::log;
  using std::log1p;
  const T overflow = T(20);

  T top = similarity[0];
  for (int j = 1; j < n; ++j) top = similarity[j] > top ? similarity[j] : top;
  T partition = T(0);
  for (int j = 0; j < n; ++j) {
    log_q[j] = (similarity[j] - top) / temperature;
    q[j] = exp(log_q[j]);
    partition += q[j];
  }
  const T log_partition = log(partition);
  T mean = T(0);
  for (int j = 0; j < n; ++j) {
    log_q[j] -= log_partition;
    q[j] /= partition;
    mean += q[j] * shift[j];
  }

  T excess = T(0), largest = log_q[0] + (mean - shift[0]) / temperature;
  for (int j = 0; j < n; ++j) {
    const T x = (mean - shift[j]) / temperature, t = log_q[j] + x;
    shift[j] = x;
    excess += excess_term(q[j], log_q[j], x, overflow);
    largest = t > largest ? t : largest;
  }
  const bool direct = largest > overflow;
  T log_z;
  if (!direct) {
    log_z = log1p(excess);
  } else {
    T sum = T(0);
    for (int j = 0; j < n; ++j) sum += exp(log_q[j] + shift[j] - largest);
    log_z = largest + log(sum);
  }

  T divergence = T(0);
  for (int j = 0; j < n; ++j) {
    const T x = shift[j], y = x - log_z;
    const T q_minus_p = probability_excess(q[j], log_q[j], y, overflow);
    shift[j] = q_minus_p;
    divergence += direct ? (q[j] - q_minus_p) * y : -q_minus_p * x;
  }
  return direct ? divergence : divergence - log_z;
}

// Row i of M, from the similarities S [n, n] and the excess E = q - p [n, n]: with H = (E + E^T)/(tau n),
// M_ij = H_ij/(|x_i||x_j|) - [i = j] (sum_k H_ik S_ik)/|x_i|^2; the second part is absent where |x_i| is clamped.
template <class T>
CODMD_HD inline void gradient_row(int i, const T* similarity, const T* excess, const Norms<T>* norm, int n,
                                  T temperature, T* row) {
  const T scale = T(1) / (temperature * T(n));
  T radial = T(0);
  for (int j = 0; j < n; ++j) {
    const T h = scale * (excess[int64_t(i) * n + j] + excess[int64_t(j) * n + i]);
    radial += h * similarity[int64_t(i) * n + j];
    row[j] = h / (norm[i].student * norm[j].student);
  }
  if (!norm[i].clamped) row[i] -= radial / (norm[i].student * norm[i].student);
}

// Whether 1/(|x_i||x_j|), and with it M, keeps its digits in float32; beyond, M is NaN there.
template <class T>
CODMD_HD inline bool float_holds_matrix(T left, T right) {
  return left * right < T(1e30);
}

}  // namespace codmd
