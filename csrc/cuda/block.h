// SPDX-License-Identifier: Apache-2.0
//
// The thread block that kernel bodies are written against. A body is a sequence of phases: block.each(f) calls
// f(thread) for every thread, block.sync() lies between phases that exchange data through memory, and a PerThread
// value survives from phase to phase. Under nvcc each() is the calling thread and PerThread a register; under a host
// compiler (simulated_block.h) the same body runs thread after thread, in any order asked for, with the same bits.
#pragma once

#include <cstdint>

namespace codmd::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Floats of shared memory that reductions use; a body's own begin behind them.
constexpr int kReserved = 128;

template <class T, int N>
struct Values {
  T at[N];
};

}  // namespace codmd::cuda

#if defined(__CUDACC__)

#define CODMD_DEVICE __device__ __forceinline__
#if defined(_MSC_VER)
#define CODMD_UNROLL __pragma(unroll)
#define CODMD_ROLLED __pragma(unroll 1)
#else
#define CODMD_UNROLL _Pragma("unroll")
#define CODMD_ROLLED _Pragma("unroll 1")
#endif

namespace codmd::cuda {

template <class T>
struct PerThread {
  T value;
  CODMD_DEVICE T& operator[](int) { return value; }
  CODMD_DEVICE const T& operator[](int) const { return value; }
};

class Block {
 public:
  CODMD_DEVICE int64_t index() const { return blockIdx.x; }

  template <class Phase>
  CODMD_DEVICE void each(Phase phase) {
    phase(int(threadIdx.x));
  }

  CODMD_DEVICE void sync() { __syncthreads(); }

  CODMD_DEVICE float* shared() {
    extern __shared__ float4 memory[];
    return reinterpret_cast<float*>(memory);
  }

  // Over the lanes of each warp, by butterflies: every lane holds the result.
  template <class T, int N>
  CODMD_DEVICE void warp_sum(PerThread<Values<T, N>>& values) {
CODMD_UNROLL
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
CODMD_UNROLL
      for (int n = 0; n < N; ++n) values.value.at[n] += __shfl_xor_sync(~0u, values.value.at[n], distance);
  }

  CODMD_DEVICE void warp_max(PerThread<float>& values) {
CODMD_UNROLL
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      values.value = fmaxf(values.value, __shfl_xor_sync(~0u, values.value, distance));
  }

  // True in exactly one of the `total` blocks that share `counter`: the last, which then sees what all of them
  // stored. atomicInc wraps to 0 there, so that the next launch, or replay of a graph, finds the counter at rest.
  CODMD_DEVICE bool is_last(uint32_t* counter, uint32_t total) {
    uint32_t* flag = reinterpret_cast<uint32_t*>(shared()) + kReserved - 1;
    __syncthreads();
    if (threadIdx.x == 0) {
      // The barrier orders the block's stores before this fence, and the fence before the ticket.
      __threadfence();
      *flag = atomicInc(counter, total - 1) == total - 1;
      __threadfence();
    }
    __syncthreads();
    return *flag != 0;
  }
};

}  // namespace codmd::cuda

#else
#include "simulated_block.h"
#endif

namespace codmd::cuda {

// Sums over all threads in a fixed order: within warps, then warp by warp. Thread n < N returns with sum n.
template <class T, int N>
CODMD_DEVICE PerThread<T> block_sum(Block& block, PerThread<Values<T, N>>& values) {
  static_assert(sizeof(T) * N * kWarps <= sizeof(float) * (kReserved - 1), "reductions fit their shared memory");
  T* warps = reinterpret_cast<T*>(block.shared());
  block.warp_sum(values);
  block.sync();
  block.each([&](int t) {
    if (t % kWarp) return;
CODMD_UNROLL
    for (int n = 0; n < N; ++n) warps[t / kWarp * N + n] = values[t].at[n];
  });
  block.sync();
  PerThread<T> sums;
  block.each([&](int t) {
    sums[t] = T(0);
    if (t >= N) return;
    for (int warp = 0; warp < kWarps; ++warp) sums[t] += warps[warp * N + t];
  });
  return sums;
}

}  // namespace codmd::cuda
