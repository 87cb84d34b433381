// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace codmd::cuda {

// Raised whenever a bound function changes its arguments or their meaning; codmd/ops/backends/cuda_binary.py names
// the same number.
constexpr int kAbiVersion = 3;

}  // namespace codmd::cuda
