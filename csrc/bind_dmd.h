// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace codmd {

void bind_dmd(pybind11::module_& m);

}  // namespace codmd
