// SPDX-License-Identifier: Apache-2.0
//
// Launching a body over a grid of blocks, and laying out a workspace.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "backend.h"
#include "block.h"

namespace codmd::cuda {

constexpr int64_t kMostBlocks = 0x7fffffff;

// Hands out the parts of a workspace, 256 bytes apart. Without memory it only counts what is needed, never 0 bytes:
// an empty workspace would look like none.
class Arena {
 public:
  explicit Arena(uintptr_t base) : base_(base) {}
  bool counting() const { return base_ == 0; }
  int64_t bytes() const { return used_; }

  template <class T>
  T* take(int64_t count) {
    T* part = counting() ? nullptr : reinterpret_cast<T*>(base_ + uintptr_t(used_));
    used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return part;
  }

 private:
  uintptr_t base_;
  int64_t used_ = 256;
};

inline void check_grid(const char* name, int64_t blocks) {
  if (blocks < 1 || blocks > kMostBlocks)
    throw std::invalid_argument("codmd: kernel " + std::string(name) + " would need " + std::to_string(blocks) +
                                " blocks, more than a grid holds (2^31 - 1)");
}

#if defined(__CUDACC__)

// Registers are bounded by the blocks that a multiprocessor should hold.
template <class Body>
__global__ void __launch_bounds__(kThreads, Body::kBlocksPerMultiprocessor) run(const __grid_constant__ Body body) {
  Block block;
  body(block);
}

[[noreturn]] inline void fail(const std::string& what, cudaError_t error) {
  throw std::runtime_error("codmd: " + what + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

template <class Body>
void launch(const Body& body, int64_t blocks, int64_t shared_floats, Stream stream) {
  check_grid(Body::kName, blocks);
  void* arguments[] = {const_cast<Body*>(&body)};
  const size_t shared = size_t(kReserved + shared_floats) * sizeof(float);
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(&run<Body>), dim3(unsigned(blocks)), dim3(kThreads), arguments,
                       shared, reinterpret_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) fail("kernel " + std::string(Body::kName), error);
}

#else

template <class Body>
void launch(const Body& body, int64_t blocks, int64_t shared_floats, Stream) {
  check_grid(Body::kName, blocks);
  for (int64_t index : simulated_order(blocks, 0)) {
    Block block(index, (kReserved + shared_floats) * int64_t(sizeof(float)));
    body(block);
  }
}

#endif

}  // namespace codmd::cuda
