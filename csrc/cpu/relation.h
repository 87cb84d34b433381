// SPDX-License-Identifier: Apache-2.0
//
// The two ways to a relation: features pooled over regions, and every pixel, streamed in chunks and never copied whole.
#pragma once

#include "backend.h"
#include "features.h"

namespace codmd {

Terms pooled_relation(const Scores& scores, double temperature, int threads, const Found& found);

Terms whole_relation(const Scores& scores, double temperature, int threads, const Found& found);

}  // namespace codmd
