// SPDX-License-Identifier: Apache-2.0
//
// codmd._C_cuda. A tensor is (address, strides) in its own axis order, or None; a run is (device, multiprocessors,
// stream, workspace, counters), addresses and the stream as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/backend.h"
#include "cuda/version.h"
#if defined(CODMD_SIMULATED)
#include "cuda/block.h"
#endif

#if !defined(CODMD_CUDA_MODULE)
#define CODMD_CUDA_MODULE _C_cuda
#endif
#if !defined(CODMD_CUDA_TARGETS)
#define CODMD_CUDA_TARGETS "simulated"
#endif

namespace py = pybind11;

namespace codmd::cuda {
namespace {

float* floats(uintptr_t data) { return reinterpret_cast<float*>(data); }

std::vector<int64_t> axes_of(const py::handle& values, size_t count) {
  auto axes = py::cast<std::vector<int64_t>>(values);
  if (axes.size() != count) throw std::invalid_argument("codmd._C_cuda: " + std::to_string(count) + " axes expected");
  return axes;
}

// "bfchw" or, with channels_first, "bcfhw" in; (batch, frame, channel, height, width) out.
std::vector<int64_t> canonical(const py::handle& values, bool channels_first) {
  auto axes = axes_of(values, 5);
  if (channels_first) std::swap(axes[1], axes[2]);
  return axes;
}

Shape shape_of(const py::handle& sizes, bool channels_first) {
  const auto axes = canonical(sizes, channels_first);
  for (int64_t size : axes)
    if (size < 1) throw std::invalid_argument("codmd._C_cuda: sizes must be at least 1");
  if (axes[3] * axes[4] > 0x7fffffff) throw std::invalid_argument("codmd._C_cuda: planes hold at most 2^31 - 1 pixels");
  return {axes[0], axes[1], axes[2], axes[3], axes[4]};
}

Tensor tensor_of(const py::handle& tensor, bool channels_first) {
  Tensor result{};
  if (tensor.is_none()) return result;
  const auto pair = py::cast<py::tuple>(tensor);
  result.data = reinterpret_cast<const void*>(py::cast<uintptr_t>(pair[0]));
  const auto axes = canonical(pair[1], channels_first);
  std::copy(axes.begin(), axes.end(), result.stride);
  return result;
}

FrameMask mask_of(const py::handle& mask) {
  if (mask.is_none()) return {};
  const auto pair = py::cast<py::tuple>(mask);
  const auto axes = axes_of(pair[1], 2);
  return {reinterpret_cast<const uint8_t*>(py::cast<uintptr_t>(pair[0])), {axes[0], axes[1]}};
}

DType dtype_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("codmd._C_cuda: unknown dtype code " + std::to_string(code));
  return static_cast<DType>(code);
}

Grid grid_of(const Shape& shape, const py::handle& grid) {
  const auto axes = axes_of(grid, 2);
  const bool every_pixel = axes[0] == 0 && axes[1] == 0;
  if (!every_pixel && (axes[0] < 1 || axes[1] < 1 || axes[0] > shape.height || axes[1] > shape.width))
    throw std::invalid_argument("codmd._C_cuda: a grid has between one region and one per pixel along each axis");
  return {axes[0], axes[1]};
}

Run run_of(const py::tuple& run) {
  return {py::cast<int>(run[0]), py::cast<int>(run[1]), py::cast<Stream>(run[2]), py::cast<uintptr_t>(run[3]),
          reinterpret_cast<uint32_t*>(py::cast<uintptr_t>(run[4]))};
}

RelationScores scores_of(const py::tuple& latents, const py::handle& sizes, bool channels_first, int dtype,
                         const py::handle& mask, const py::handle& grid) {
  const Shape shape = shape_of(sizes, channels_first);
  return {shape,
          dtype_of(dtype),
          tensor_of(latents[0], channels_first),
          tensor_of(latents[1], channels_first),
          tensor_of(latents[2], channels_first),
          mask_of(mask),
          grid_of(shape, grid)};
}

Upstream upstream_of(const py::tuple& scalars) {
  return {floats(py::cast<uintptr_t>(scalars[0])), floats(py::cast<uintptr_t>(scalars[1])),
          floats(py::cast<uintptr_t>(scalars[2]))};
}

// (student, fake, real, real_uncond, fake_uncond, noisy, mask, sigma, sample_weight address) and the two scales.
DmdScores dmd_scores_of(const py::handle& sizes, bool channels_first, int dtype, const py::tuple& tensors,
                        double real_scale, double fake_scale) {
  DmdScores scores{};
  scores.shape = shape_of(sizes, channels_first);
  scores.dtype = dtype_of(dtype);
  Tensor* latents[7] = {&scores.student,     &scores.fake,  &scores.real, &scores.real_uncond,
                        &scores.fake_uncond, &scores.noisy, &scores.mask};
  for (size_t i = 0; i < 7; ++i) *latents[i] = tensor_of(tensors[i], channels_first);
  const FrameMask sigma = mask_of(tensors[7]);
  scores.sigma = reinterpret_cast<const float*>(sigma.data);
  std::copy(sigma.stride, sigma.stride + 2, scores.sigma_stride);
  scores.sample_weight = floats(py::cast<uintptr_t>(tensors[8]));
  scores.real_scale = float(real_scale);
  scores.fake_scale = float(fake_scale);
  return scores;
}

// (scope, block, first_alone, guard, eps, nan, huber_c, coefficient, sum, norm_divides_loss, weight_on_direction)
DmdRule rule_of(const py::tuple& fields) {
  DmdRule rule{};
  rule.scope = static_cast<NormScope>(py::cast<int>(fields[0]));
  rule.block = py::cast<int64_t>(fields[1]);
  rule.first_alone = py::cast<bool>(fields[2]);
  rule.guard = static_cast<Guard>(py::cast<int>(fields[3]));
  rule.eps = py::cast<float>(fields[4]);
  rule.nan = static_cast<NanPolicy>(py::cast<int>(fields[5]));
  rule.huber_c = py::cast<float>(fields[6]);
  rule.coefficient = py::cast<double>(fields[7]);
  rule.sum = py::cast<bool>(fields[8]);
  rule.norm_divides_loss = py::cast<bool>(fields[9]);
  rule.weight_on_direction = py::cast<bool>(fields[10]);
  return rule;
}

}  // namespace
}  // namespace codmd::cuda

PYBIND11_MODULE(CODMD_CUDA_MODULE, m) {
  using namespace codmd::cuda;
  m.doc() = "The CUDA backend of codmd on raw device memory.";
  m.attr("abi_version") = kAbiVersion;
  m.attr("targets") = CODMD_CUDA_TARGETS;
  m.def("device_problem", &device_problem);
  m.def("relation_counters", &relation_counters);
#if defined(CODMD_SIMULATED)
  m.def("shuffle", [](uint64_t seed) { simulation_seed() = seed; });
#endif

  m.def("relation_forward", [](const py::tuple& run, const py::tuple& latents, const py::handle& sizes,
                               bool channels_first, int dtype, const py::handle& mask, const py::handle& grid,
                               double temperature, double batch_weight, double frame_weight, uintptr_t terms,
                               uintptr_t frame_grad, uintptr_t batch_grad) {
    const RelationScores scores = scores_of(latents, sizes, channels_first, dtype, mask, grid);
    return relation_forward(run_of(run), scores, {temperature, batch_weight, frame_weight}, floats(terms),
                            floats(frame_grad), floats(batch_grad));
  });

  m.def("relation_frames", [](const py::tuple& run, const py::tuple& latents, const py::handle& sizes,
                              bool channels_first, int dtype, const py::handle& mask, const py::handle& grid,
                              double temperature, uintptr_t frame_term, uintptr_t frame_grad, uintptr_t pooled) {
    const RelationScores scores = scores_of(latents, sizes, channels_first, dtype, mask, grid);
    return relation_frames(run_of(run), scores, {temperature, 0.0, 1.0}, floats(frame_term), floats(frame_grad),
                           floats(pooled));
  });

  m.def("relation_batch", [](const py::tuple& run, uintptr_t pooled, int64_t samples, int64_t features,
                             int64_t first_row, int64_t rows, uintptr_t frame_term, double temperature,
                             double batch_weight, double frame_weight, double grad_scale, uintptr_t terms,
                             uintptr_t batch_grad) {
    if (first_row < 0 || rows < 1 || first_row + rows > samples)
      throw std::invalid_argument("codmd._C_cuda: rows outside the gathered ones");
    return relation_batch(run_of(run), floats(pooled), samples, features, first_row, rows, floats(frame_term),
                          {temperature, batch_weight, frame_weight}, grad_scale, floats(terms), floats(batch_grad));
  });

  m.def("relation_backward", [](const py::tuple& run, const py::handle& student, const py::handle& grad,
                                const py::handle& sizes, bool channels_first, int dtype, const py::handle& mask,
                                const py::handle& grid, const py::tuple& upstream, uintptr_t frame_grad,
                                uintptr_t batch_grad, double batch_weight, double frame_weight) {
    const Shape shape = shape_of(sizes, channels_first);
    relation_backward(run_of(run), shape, dtype_of(dtype), tensor_of(student, channels_first),
                      tensor_of(grad, channels_first), mask_of(mask), grid_of(shape, grid), upstream_of(upstream),
                      floats(frame_grad), floats(batch_grad), batch_weight, frame_weight);
  });

  m.def("dmd_forward", [](const py::tuple& run, const py::handle& sizes, bool channels_first, int dtype,
                          const py::tuple& tensors, double real_scale, double fake_scale, const py::tuple& rule,
                          bool magnitude, uintptr_t values, uintptr_t norms, uintptr_t factors) {
    const DmdScores scores = dmd_scores_of(sizes, channels_first, dtype, tensors, real_scale, fake_scale);
    return dmd_forward(run_of(run), scores, rule_of(rule), magnitude, floats(values), floats(norms), floats(factors));
  });

  m.def("codmd_forward", [](const py::tuple& run, const py::handle& sizes, bool channels_first, int dtype,
                            const py::tuple& tensors, double real_scale, double fake_scale, const py::tuple& rule,
                            bool magnitude, const py::handle& mask, const py::handle& grid, double temperature,
                            uintptr_t values, uintptr_t norms, uintptr_t factors, uintptr_t frame_term,
                            uintptr_t frame_grad, uintptr_t pooled) {
    const DmdScores scores = dmd_scores_of(sizes, channels_first, dtype, tensors, real_scale, fake_scale);
    return codmd_forward(run_of(run), scores, rule_of(rule), magnitude, mask_of(mask), grid_of(scores.shape, grid),
                         temperature, floats(values), floats(norms), floats(factors), floats(frame_term),
                         floats(frame_grad), floats(pooled));
  });

  m.def("dmd_backward", [](const py::tuple& run, const py::handle& sizes, bool channels_first, int dtype,
                           const py::tuple& tensors, double real_scale, double fake_scale, const py::tuple& rule,
                           uintptr_t norms, uintptr_t factors, const py::tuple& upstream, const py::handle& mask,
                           const py::handle& grid, uintptr_t frame_grad, uintptr_t batch_grad, double batch_weight,
                           double frame_weight, const py::handle& grad) {
    const DmdScores scores = dmd_scores_of(sizes, channels_first, dtype, tensors, real_scale, fake_scale);
    float* scalar[4];
    for (size_t i = 0; i < 4; ++i) scalar[i] = floats(py::cast<uintptr_t>(upstream[i]));
    dmd_backward(run_of(run), scores, rule_of(rule), floats(norms), floats(factors),
                 {scalar[0], scalar[1], scalar[2], scalar[3]}, mask_of(mask), grid_of(scores.shape, grid),
                 floats(frame_grad), floats(batch_grad), batch_weight, frame_weight,
                 tensor_of(grad, channels_first));
  });
}
