// SPDX-License-Identifier: Apache-2.0
//
// The passes over latents, written once over a vector type V. Included by one file per instruction set, which
// defines V in an anonymous namespace: everything here has internal linkage.

namespace {

using codmd::kLane;
using codmd::Plane;

template <class T>
inline const T* row_of(const Plane& plane, int64_t y) {
  return static_cast<const T*>(plane.data) + y * plane.row;
}

// The third latent is fake - real in half precision. In float32 it is fake: float64 sums of fake and of real lose
// nothing that matters in their difference, and the pass needs no subtraction.
struct RegionSums {
  V::Sum student{}, real{}, third{};
};

struct Vectors {
  V::Float student, real, third;
};

inline Vectors operator+(const Vectors& a, const Vectors& b) {
  return {V::multiplier_add(a.student, b.student), V::multiplier_add(a.real, b.real), V::add(a.third, b.third)};
}

// Sums of 2 W elements, W to a vector. Half of the additions go through the multipliers: with all of them on the adders
// the pass waits for these and not for memory.
template <class T>
inline Vectors add_pair(const T* x, const T* r, const T* f) {
  V::Float xs[2], rs[2], fs[2];
  V::load_two(x, xs[0], xs[1]);
  V::load_two(r, rs[0], rs[1]);
  V::load_two(f, fs[0], fs[1]);
  return {V::multiplier_add(xs[0], xs[1]), V::multiplier_add(rs[0], rs[1]),
          V::add(V::sub(fs[0], rs[0]), V::sub(fs[1], rs[1]))};
}

inline void add_to(RegionSums& sums, const Vectors& values) {
  V::add_to(sums.student, values.student);
  V::add_to(sums.real, values.real);
  V::add_to(sums.third, values.third);
}

inline V::Float third_of(float, V::Float, V::Float fake) { return fake; }
template <class Half>
inline V::Float third_of(Half, V::Float real, V::Float fake) {
  return V::sub(fake, real);
}

// Float64 lanes throughout, so that a mean that nearly cancels keeps its digits. Half precision has few bits: float32
// sums over sixteen vectors come first and round next to nothing.
template <class T>
inline void reduce_row(const T* x, const T* r, const T* f, int64_t n, RegionSums& sums) {
  constexpr int W = V::kWidth;
  int64_t k = 0;
  if constexpr (sizeof(T) == 2) {
    for (; k + 16 * W <= n; k += 16 * W) {
      Vectors block = add_pair(x + k, r + k, f + k);
      for (int64_t at = k + 2 * W; at < k + 16 * W; at += 2 * W) block = block + add_pair(x + at, r + at, f + at);
      add_to(sums, block);
    }
    for (; k + W <= n; k += W) {
      const V::Float real = V::load(r + k);
      add_to(sums, {V::load(x + k), real, V::sub(V::load(f + k), real)});
    }
  } else {
    for (; k + W <= n; k += W) {
      V::add_to(sums.student, x + k);
      V::add_to(sums.real, r + k);
      V::add_to(sums.third, f + k);
    }
  }
  if (k < n) {
    const int64_t left = n - k;
    const bool room = k > 0;  // a whole vector lies before the end
    const V::Float real = V::load_tail(r + k, left, room), fake = V::load_tail(f + k, left, room);
    add_to(sums, {V::load_tail(x + k, left, room), real, third_of(T{}, real, fake)});
  }
}

template <class T>
void reduce(const Plane& student, const Plane& real, const Plane& fake, int64_t rows, int64_t columns,
            double* sums) {
  if (columns == 1 || (student.column == 1 && real.column == 1 && fake.column == 1)) {
    RegionSums total;
    for (int64_t y = 0; y < rows; ++y)
      reduce_row(row_of<T>(student, y), row_of<T>(real, y), row_of<T>(fake, y), columns, total);
    sums[0] = V::total(total.student);
    sums[1] = V::total(total.real);
    sums[2] = V::total(total.third) - (sizeof(T) == 2 ? 0.0 : sums[1]);
    return;
  }
  double x_sum = 0, r_sum = 0, d_sum = 0;
  for (int64_t y = 0; y < rows; ++y) {
    const T *x = row_of<T>(student, y), *r = row_of<T>(real, y), *f = row_of<T>(fake, y);
    for (int64_t k = 0; k < columns; ++k) {
      const float rv = to_float(r[k * real.column]);
      x_sum += double(to_float(x[k * student.column]));
      r_sum += double(rv);
      d_sum += double(to_float(f[k * fake.column])) - double(rv);
    }
  }
  sums[0] = x_sum;
  sums[1] = r_sum;
  sums[2] = d_sum;
}

template <class T>
void fill(const Plane& plane, int64_t rows, int64_t columns, float value) {
  T element;
  from_float(value, element);
  for (int64_t y = 0; y < rows; ++y) {
    T* out = const_cast<T*>(row_of<T>(plane, y));
    if (plane.column == 1) {
      for (int64_t k = 0; k < columns; ++k) out[k] = element;
    } else {
      for (int64_t k = 0; k < columns; ++k) out[k * plane.column] = element;
    }
  }
}

template <class T>
void load(const void* from, int64_t stride, int64_t n, float* to) {
  constexpr int W = V::kWidth;
  const T* source = static_cast<const T*>(from);
  int64_t k = 0;
  if (stride == 1) {
    for (; k + W <= n; k += W) V::store(to + k, V::load(source + k));
  }
  for (; k < n; ++k) to[k] = to_float(source[k * stride]);
}

template <class T>
void store(const float* from, int64_t n, void* to, int64_t stride) {
  constexpr int W = V::kWidth;
  T* target = static_cast<T*>(to);
  int64_t k = 0;
  if (stride == 1) {
    for (; k + W <= n; k += W) V::store(target + k, V::load(from + k));
  }
  for (; k < n; ++k) from_float(from[k], target[k * stride]);
}

double subtract(const float* real, float* fake, int64_t n) {
  constexpr int W = V::kWidth;
  V::Sum squares{};
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    const V::Float f = V::load(fake + k);
    V::add_to(squares, V::mul(f, f));
    V::store(fake + k, V::sub(f, V::load(real + k)));
  }
  double sum = V::total(squares);
  for (; k < n; ++k) {
    sum += double(fake[k]) * fake[k];
    fake[k] -= real[k];
  }
  return sum;
}

void accumulate(float scale, const float* from, float* to, int64_t n) {
  for (int64_t k = 0; k < n; ++k) to[k] += scale * from[k];
}

template <int M, int N>
inline void gram_tile(const float* a, const float* b, int64_t pitch, int64_t length, double* out, int64_t out_pitch) {
  V::Float sum[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) sum[i][j] = V::zero();
  for (int64_t k = 0; k < length; k += V::kWidth) {
    V::Float right[N];
    for (int j = 0; j < N; ++j) right[j] = V::load(b + j * pitch + k);
    for (int i = 0; i < M; ++i) {
      const V::Float left = V::load(a + i * pitch + k);
      for (int j = 0; j < N; ++j) sum[i][j] = V::fma(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) out[i * out_pitch + j] += double(V::total(sum[i][j]));
}

template <int M, int N>
inline void gram_edge(int64_t m, int64_t n, const float* a, const float* b, int64_t pitch, int64_t length,
                      double* out, int64_t out_pitch) {
  if constexpr (M > 1) {
    if (m < M) return gram_edge<M - 1, N>(m, n, a, b, pitch, length, out, out_pitch);
  }
  if constexpr (N > 1) {
    if (n < N) return gram_edge<M, N - 1>(m, n, a, b, pitch, length, out, out_pitch);
  }
  gram_tile<M, N>(a, b, pitch, length, out, out_pitch);
}

void gram(const float* rows, int64_t pitch, int64_t n, int64_t length, double* out) {
  constexpr int R = V::kTile;
  for (int64_t i = 0; i < n; i += R)
    for (int64_t j = i; j < n; j += R)
      gram_edge<R, R>(n - i, n - j, rows + i * pitch, rows + j * pitch, pitch, length, out + i * n + j, n);
}

template <int M>
inline void combine_tile(const float* rows, int64_t pitch, int64_t n, const int32_t* columns,
                         const float* const* matrix, float row_scale, const float* shared, float shared_scale,
                         int64_t length, float* out) {
  constexpr int W = V::kWidth;
  for (int64_t k = 0; k < length; k += 2 * W) {
    const bool pair = k + W < length;
    V::Float sum[M][2];
    for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = V::zero();
    for (int64_t j = 0; j < n; ++j) {
      const V::Float first = V::load(rows + j * pitch + k);
      const V::Float second = pair ? V::load(rows + j * pitch + k + W) : V::zero();
      for (int i = 0; i < M; ++i) {
        const V::Float weight = V::set1(matrix[i][columns[j]]);
        sum[i][0] = V::fma(weight, first, sum[i][0]);
        sum[i][1] = V::fma(weight, second, sum[i][1]);
      }
    }
    for (int half = 0; half < (pair ? 2 : 1); ++half) {
      const int64_t at = k + half * W;
      const V::Float common = shared ? V::mul(V::set1(shared_scale), V::load(shared + at)) : V::zero();
      for (int i = 0; i < M; ++i)
        V::store(out + i * pitch + at, V::fma(V::set1(row_scale), sum[i][half], common));
    }
  }
}

void combine(const float* rows, int64_t pitch, int64_t n, const int32_t* columns, const float* const* matrix,
             int64_t outputs, float row_scale, const float* shared, float shared_scale, int64_t length, float* out) {
  int64_t i = 0;
  for (; i + 4 <= outputs; i += 4)
    combine_tile<4>(rows, pitch, n, columns, matrix + i, row_scale, shared, shared_scale, length, out + i * pitch);
  for (; i < outputs; ++i)
    combine_tile<1>(rows, pitch, n, columns, matrix + i, row_scale, shared, shared_scale, length, out + i * pitch);
}

void inner(const double* const i[3], const double* const j[3], int64_t features, double* sums) {
  const double *xi = i[0], *ri = i[1], *di = i[2], *xj = j[0], *rj = j[1], *dj = j[2];
  double xx = 0, rr = 0, rd = 0, dr = 0, dd = 0;
#pragma omp simd reduction(+ : xx, rr, rd, dr, dd)
  for (int64_t k = 0; k < features; ++k) {
    xx += xi[k] * xj[k];
    rr += ri[k] * rj[k];
    rd += ri[k] * dj[k];
    dr += di[k] * rj[k];
    dd += di[k] * dj[k];
  }
  sums[0] = xx;
  sums[1] = rr;
  sums[2] = rd;
  sums[3] = dr;
  sums[4] = dd;
}

}  // namespace

#define CODMD_PASSES(isa)                              \
  {                                                    \
    isa, {reduce<float>, reduce<bf16>, reduce<f16>},   \
        {fill<float>, fill<bf16>, fill<f16>},          \
        {load<float>, load<bf16>, load<f16>},          \
        {store<float>, store<bf16>, store<f16>},       \
        subtract, accumulate, gram, combine, inner     \
  }
