// SPDX-License-Identifier: Apache-2.0
//
// codmd._C: pointers as integers, shapes and strides as tuples in the tensor's own axis order.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind_dmd.h"
#include "relation_cpu.h"
#include "version.h"

namespace py = pybind11;

namespace codmd {
namespace {

// "bfchw" or, with channels_first, "bcfhw" in; (batch, frame, channel, height, width) out.
void read_axes(const py::tuple& values, bool channels_first, int64_t out[5]) {
  if (values.size() != 5) throw std::invalid_argument("codmd._C: five axes expected");
  for (size_t axis = 0; axis < 5; ++axis) out[axis] = PyLong_AsLongLong(values[axis].ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  if (channels_first) std::swap(out[1], out[2]);
}

Shape shape_of(const py::tuple& sizes, bool channels_first) {
  int64_t axes[5];
  read_axes(sizes, channels_first, axes);
  return {axes[0], axes[1], axes[2], axes[3], axes[4]};
}

Latent latent_of(uintptr_t data, const py::tuple& strides, bool channels_first) {
  Latent latent;
  latent.data = reinterpret_cast<const void*>(data);
  read_axes(strides, channels_first, latent.stride);
  return latent;
}

DType dtype_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("codmd._C: unknown dtype code " + std::to_string(code));
  return static_cast<DType>(code);
}

float* floats(uintptr_t data) { return reinterpret_cast<float*>(data); }

FrameMask mask_of(uintptr_t data, int64_t batch_stride, int64_t frame_stride) {
  return {reinterpret_cast<const uint8_t*>(data), {batch_stride, frame_stride}};
}

Scores scores_of(uintptr_t student, uintptr_t real, uintptr_t fake, const py::tuple& sizes,
                 const py::tuple& student_strides, const py::tuple& real_strides, const py::tuple& fake_strides,
                 bool channels_first, int dtype, uintptr_t mask, int64_t mask_batch, int64_t mask_frame,
                 int64_t grid_height, int64_t grid_width) {
  Scores scores;
  scores.shape = shape_of(sizes, channels_first);
  scores.dtype = dtype_of(dtype);
  scores.student = latent_of(student, student_strides, channels_first);
  scores.real = latent_of(real, real_strides, channels_first);
  scores.fake = latent_of(fake, fake_strides, channels_first);
  scores.mask = mask_of(mask, mask_batch, mask_frame);
  scores.grid = {grid_height, grid_width};
  return scores;
}

// 0-dim float32 tensors by address; 0 stands for none.
double upstream(uintptr_t total, uintptr_t term, double weight) {
  return (total ? weight * double(*floats(total)) : 0.0) + (term ? double(*floats(term)) : 0.0);
}

// A term that no gradient reaches must not spread its NaN as 0 * NaN.
const float* used(uintptr_t total, uintptr_t term, uintptr_t feature_grad) {
  return total || term ? floats(feature_grad) : nullptr;
}

}  // namespace
}  // namespace codmd

PYBIND11_MODULE(_C, m) {
  using namespace codmd;
  m.doc() = "The CPU backend of codmd: fused relation losses on raw memory.";
  m.attr("abi_version") = kAbiVersion;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("active_isa", [] { return std::string(active_isa()); });
  m.def("select_isa", [](const std::string& name) { return select_isa(name.c_str()); });

  m.def("relation_forward", [](uintptr_t student, uintptr_t real, uintptr_t fake, const py::tuple& sizes,
                               const py::tuple& student_strides, const py::tuple& real_strides,
                               const py::tuple& fake_strides, bool channels_first, int dtype, uintptr_t mask,
                               int64_t mask_batch, int64_t mask_frame, int64_t grid_height, int64_t grid_width,
                               double temperature, double batch_weight, double frame_weight, int threads,
                               uintptr_t terms, uintptr_t frame_grad, uintptr_t batch_grad) {
    const Scores scores =
        scores_of(student, real, fake, sizes, student_strides, real_strides, fake_strides, channels_first, dtype,
                  mask, mask_batch, mask_frame, grid_height, grid_width);
    py::gil_scoped_release unlocked;
    relation_forward(scores, {temperature, batch_weight, frame_weight}, threads, floats(terms), floats(frame_grad),
                     floats(batch_grad));
  });

  m.def("relation_frames", [](uintptr_t student, uintptr_t real, uintptr_t fake, const py::tuple& sizes,
                              const py::tuple& student_strides, const py::tuple& real_strides,
                              const py::tuple& fake_strides, bool channels_first, int dtype, uintptr_t mask,
                              int64_t mask_batch, int64_t mask_frame, int64_t grid_height, int64_t grid_width,
                              double temperature, int threads, uintptr_t frame_term, uintptr_t frame_grad,
                              uintptr_t pooled) {
    const Scores scores =
        scores_of(student, real, fake, sizes, student_strides, real_strides, fake_strides, channels_first, dtype,
                  mask, mask_batch, mask_frame, grid_height, grid_width);
    py::gil_scoped_release unlocked;
    relation_frames(scores, {temperature, 0.0, 1.0}, threads, floats(frame_term), floats(frame_grad), floats(pooled));
  });

  m.def("relation_batch", [](uintptr_t pooled, int64_t samples, int64_t features, int64_t first_row, int64_t rows,
                             uintptr_t frame_term, double temperature, double batch_weight, double frame_weight,
                             double grad_scale, int threads, uintptr_t terms, uintptr_t batch_grad) {
    py::gil_scoped_release unlocked;
    relation_batch(floats(pooled), samples, features, first_row, rows, floats(frame_term),
                   {temperature, batch_weight, frame_weight}, grad_scale, threads, floats(terms), floats(batch_grad));
  });

  m.def("relation_backward", [](uintptr_t student, const py::tuple& sizes, const py::tuple& student_strides,
                                uintptr_t grad, const py::tuple& grad_strides, bool channels_first, int dtype,
                                uintptr_t mask, int64_t mask_batch, int64_t mask_frame, int64_t grid_height,
                                int64_t grid_width, uintptr_t frame_grad, uintptr_t batch_grad, uintptr_t grad_total,
                                uintptr_t grad_batch, uintptr_t grad_frame, double batch_weight, double frame_weight,
                                int threads) {
    const Shape shape = shape_of(sizes, channels_first);
    const Latent x = latent_of(student, student_strides, channels_first);
    const Latent out = latent_of(grad, grad_strides, channels_first);
    const double frame_scale = upstream(grad_total, grad_frame, frame_weight);
    const double batch_scale = upstream(grad_total, grad_batch, batch_weight);
    py::gil_scoped_release unlocked;
    relation_backward(shape, dtype_of(dtype), x, out, mask_of(mask, mask_batch, mask_frame),
                      {grid_height, grid_width}, used(grad_total, grad_frame, frame_grad),
                      used(grad_total, grad_batch, batch_grad), frame_scale, batch_scale, threads);
  });

  bind_dmd(m);
}
