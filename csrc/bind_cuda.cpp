// SPDX-License-Identifier: Apache-2.0
//
// codmd._C_cuda: the CUDA backend on calls as python.h reads them. A place is (device, multiprocessors, stream);
// `memory(bytes, counters)` returns a workspace and zeroed counters as tensors.
#include <string>

#include "cuda/backend.h"
#include "cuda/version.h"
#include "python.h"
#if defined(CODMD_SIMULATED)
#include "cuda/block.h"
#endif

#if !defined(CODMD_CUDA_MODULE)
#define CODMD_CUDA_MODULE _C_cuda
#endif
#if !defined(CODMD_CUDA_TARGETS)
#define CODMD_CUDA_TARGETS "simulated"
#endif

namespace {

using namespace codmd;
using namespace codmd::python;

cuda::Run run_of(const py::handle& place) {
  const Items items(place.ptr(), "place", 3);
  return {int(items.integer(0, 0, 1 << 20)), int(items.integer(1, 1, 1 << 20)), items.address(2), 0, nullptr};
}

// Calls function(run) for the bytes that it wants, and again with them.
template <class Function>
void with_memory(cuda::Run run, const py::handle& memory, int64_t samples, int64_t frames, const Function& function) {
  const int64_t bytes = function(run), counters = cuda::counters_of(samples, frames);
  const py::object given = memory(bytes, counters);
  const Items items(given.ptr(), "memory", 2);
  run.workspace = reinterpret_cast<uintptr_t>(Buffer(items[0], "workspace").hold(Code::bytes, bytes));
  run.counters = static_cast<uint32_t*>(Buffer(items[1], "counters").hold(Code::int32, counters));
  function(run);
}

}  // namespace

PYBIND11_MODULE(CODMD_CUDA_MODULE, m) {
  m.doc() = "The CUDA backend of codmd on raw device memory.";
  m.attr("abi_version") = cuda::kAbiVersion;
  m.attr("targets") = CODMD_CUDA_TARGETS;
  m.def("device_problem", &cuda::device_problem);
#if defined(CODMD_SIMULATED)
  m.def("shuffle", [](uint64_t seed) { cuda::simulation_seed() = seed; });
#endif

  m.def("forward", [](const py::handle& place, const py::handle& memory, const py::handle& tensors,
                      const py::handle& sizes, bool channels_first, int64_t dtype, const py::handle& grid,
                      const py::handle& rule, const py::handle& numbers, const py::handle& outputs) {
    const Call call(tensors.ptr(), sizes.ptr(), channels_first, dtype, grid.ptr(), rule.ptr(), numbers.ptr(),
                    Pass::forward);
    const Found found = call.found(outputs.ptr(), Pass::forward);
    const Shape& shape = call.scores.shape;
    with_memory(run_of(place), memory, shape.batch, shape.frames, [&](const cuda::Run& run) {
      if (call.is_objective)
        return cuda::objective(run, call.scores, call.rule, call.related, call.frame_mask, call.grid, call.numbers,
                               found);
      return cuda::relation(run, call.relation(), call.numbers, found);
    });
  });

  m.def("gathered", [](const py::handle& place, const py::handle& memory, const py::handle& fields,
                       const py::handle& numbers, const py::handle& terms, const py::handle& batch_grad) {
    const GatheredCall call(fields.ptr(), terms.ptr(), batch_grad.ptr());
    const Numbers values = numbers_of(numbers.ptr());
    with_memory(run_of(place), memory, 1, call.gathered.samples, [&](const cuda::Run& run) {
      return cuda::gathered(run, call.gathered, values, call.terms, call.batch_grad);
    });
  });

  m.def("gradient", [](const py::handle& place, const py::handle& out, const py::handle& upstream,
                       const py::handle& tensors, const py::handle& sizes, bool channels_first, int64_t dtype,
                       const py::handle& grid, const py::handle& rule, const py::handle& numbers,
                       const py::handle& kept) {
    const Call call(tensors.ptr(), sizes.ptr(), channels_first, dtype, grid.ptr(), rule.ptr(), numbers.ptr(),
                    Pass::gradient);
    const Found found = call.found(kept.ptr(), Pass::gradient);
    const Upstream arriving = upstream_of(upstream.ptr());
    const Tensor target = call.output(out.ptr());
    const cuda::Run run = run_of(place);
    if (call.grid.every_pixel())
      cuda::whole_gradient(run, call.scores.shape, call.scores.dtype, call.scores.student, call.frame_mask,
                           call.numbers, arriving, found, target);
    else
      cuda::gradient(run, call.scores, call.rule, call.frame_mask, call.grid, call.numbers, arriving, found, target);
  });
}
