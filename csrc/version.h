// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace codmd {

// Raised whenever a bound function changes its arguments or their meaning; codmd/ops/backends/cpp.py names
// the same number.
constexpr int kAbiVersion = 3;

}  // namespace codmd
