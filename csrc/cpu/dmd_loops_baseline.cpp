// SPDX-License-Identifier: Apache-2.0
#include "dmd_loops.h"

#include "dmd_loops.inl"

namespace codmd {
extern const DmdLoops dmd_loops_baseline = CODMD_DMD_LOOPS;
}
