// SPDX-License-Identifier: Apache-2.0
//
// Block for host compilers: runs a body thread after thread. Within a phase threads may run in any order, and so may
// the blocks of a launch; a body whose result depends on either has a race, which the tests look for by shuffling.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#if !defined(__clang__) && !defined(__GNUC__)
#error "the simulation is built by the tests, with GCC or Clang"
#endif

#define CODMD_DEVICE inline
#define CODMD_UNROLL
#define CODMD_ROLLED

namespace codmd::cuda {

// 0 runs everything in order; any other seed shuffles threads and blocks.
inline uint64_t& simulation_seed() {
  static uint64_t seed = 0;
  return seed;
}

inline std::vector<int64_t> simulated_order(int64_t count, uint64_t salt) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t(0));
  if (simulation_seed()) std::shuffle(order.begin(), order.end(), std::mt19937_64(simulation_seed() + salt));
  return order;
}

template <class T>
struct PerThread {
  std::array<T, kThreads> values;
  PerThread() { std::memset(static_cast<void*>(values.data()), 0xFF, sizeof(values)); }  // an unset register is NaN
  T& operator[](int thread) { return values[size_t(thread)]; }
  const T& operator[](int thread) const { return values[size_t(thread)]; }
};

class Block {
 public:
  Block(int64_t index, int64_t shared_bytes)
      : index_(index),
        memory_(size_t(shared_bytes) / sizeof(float), std::numeric_limits<float>::quiet_NaN()),
        order_(simulated_order(kThreads, uint64_t(index) + 1)) {}

  int64_t index() const { return index_; }
  float* shared() { return memory_.data(); }
  void sync() {}

  template <class Phase>
  void each(Phase phase) {
    for (int64_t thread : order_) phase(int(thread));
  }

  template <class T, int N>
  void warp_sum(PerThread<Values<T, N>>& values) {
    const auto add = [](T a, T b) { return a + b; };
    for (int n = 0; n < N; ++n) butterfly<T>([&](int t) -> T& { return values[t].at[n]; }, add);
  }

  void warp_max(PerThread<float>& values) {
    butterfly<float>([&](int t) -> float& { return values[t]; }, [](float a, float b) { return std::fmax(a, b); });
  }

  bool is_last(uint32_t* counter, uint32_t total) {
    const uint32_t ticket = *counter;
    *counter = ticket >= total - 1 ? 0 : ticket + 1;
    return ticket == total - 1;
  }

 private:
  template <class T, class At, class Combine>
  void butterfly(const At& at, const Combine& combine) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      std::array<T, kThreads> before;
      for (int t = 0; t < kThreads; ++t) before[size_t(t)] = at(t);
      for (int t = 0; t < kThreads; ++t) at(t) = combine(before[size_t(t)], before[size_t(t ^ distance)]);
    }
  }

  int64_t index_;
  std::vector<float> memory_;
  std::vector<int64_t> order_;
};

}  // namespace codmd::cuda
