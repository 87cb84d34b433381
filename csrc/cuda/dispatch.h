// SPDX-License-Identifier: Apache-2.0
//
// From a runtime dtype to the type that kernels are compiled for, and the device that a call runs on.
#pragma once

#include "launch.h"
#include "plan.h"

namespace codmd::cuda {

template <class Function>
void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::f32:
      return function(float{});
    case DType::bf16:
      return function(bf16{});
    case DType::f16:
      return function(f16{});
  }
}

#if defined(__CUDACC__)

// Makes `device` current for the scope, and puts the caller's device back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
    device_ = device;
  }
  ~DeviceGuard() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t error) {
    if (error != cudaSuccess) fail("selecting the device", error);
  }
  int before_ = 0, device_ = 0;
};

#else

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

#endif

}  // namespace codmd::cuda
