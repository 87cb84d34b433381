// SPDX-License-Identifier: Apache-2.0
//
// codmd._C: the CPU backend on calls as python.h reads them.
#include "cpu/backend.h"
#include "python.h"
#include "version.h"

namespace {

using namespace codmd;
using namespace codmd::python;

Numbers plain(const Numbers& numbers) {
  if (numbers.temperature.at) refuse("numbers", "a tuple of six floats needed, a tensor came");
  return numbers;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU backend of codmd on raw memory.";
  m.attr("abi_version") = kAbiVersion;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("active_isa", [] { return std::string(active_isa()); });
  m.def("select_isa", [](const std::string& name) { return select_isa(name.c_str()); });

  m.def("forward", [](const py::handle& tensors, const py::handle& sizes, bool channels_first, int64_t dtype,
                      const py::handle& grid, const py::handle& rule, const py::handle& numbers, int threads,
                      const py::handle& outputs) {
    const Call call(tensors.ptr(), sizes.ptr(), channels_first, dtype, grid.ptr(), rule.ptr(), numbers.ptr(),
                    Pass::forward);
    const Numbers values = plain(call.numbers);
    const Found found = call.found(outputs.ptr(), Pass::forward);
    py::gil_scoped_release unlocked;
    if (call.is_objective)
      objective(call.scores, call.rule, call.related, call.frame_mask, call.grid, values, threads, found);
    else
      relation(call.relation(), values, threads, found);
  });

  m.def("gathered", [](const py::handle& fields, const py::handle& numbers, int threads, const py::handle& terms,
                       const py::handle& batch_grad) {
    const GatheredCall call(fields.ptr(), terms.ptr(), batch_grad.ptr());
    const Numbers values = plain(numbers_of(numbers.ptr()));
    py::gil_scoped_release unlocked;
    gathered(call.gathered, values, threads, call.terms, call.batch_grad);
  });

  m.def("gradient", [](const py::handle& out, const py::handle& upstream, const py::handle& tensors,
                       const py::handle& sizes, bool channels_first, int64_t dtype, const py::handle& grid,
                       const py::handle& rule, const py::handle& numbers, int threads, const py::handle& kept) {
    const Call call(tensors.ptr(), sizes.ptr(), channels_first, dtype, grid.ptr(), rule.ptr(), numbers.ptr(),
                    Pass::gradient);
    const Numbers values = plain(call.numbers);
    const Found found = call.found(kept.ptr(), Pass::gradient);
    const Upstream arriving = upstream_of(upstream.ptr());
    const Tensor target = call.output(out.ptr());
    py::gil_scoped_release unlocked;
    if (call.grid.every_pixel())
      whole_gradient(call.scores.shape, call.scores.dtype, call.scores.student, call.frame_mask, values, arriving,
                     threads, found, target);
    else
      gradient(call.scores, call.rule, call.frame_mask, call.grid, values, arriving, threads, found, target);
  });
}
