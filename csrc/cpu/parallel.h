// SPDX-License-Identifier: Apache-2.0
//
// One team of threads per call, and the fixed way in which it divides work.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace codmd {

struct Worker {
  int index, count;

  // Its share of `items`: contiguous, so that a thread reads memory forwards.
  int64_t begin(int64_t items) const { return items * index / count; }
  int64_t end(int64_t items) const { return items * (index + 1) / count; }

  // Every worker of the team calls it.
  void barrier() const {
#if defined(_OPENMP)
#pragma omp barrier
#endif
  }
};

// Starting a team costs a few microseconds: about what one thread needs for 64 KiB.
inline int useful_threads(int requested, int64_t bytes) {
  const int64_t useful = 1 + bytes / 65536;
  const int64_t threads = requested < useful ? requested : useful;
  return threads < 1 ? 1 : int(threads);
}

template <class Work>
void parallel(int threads, const Work& work) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(Worker{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  work(Worker{0, 1});
}

}  // namespace codmd
