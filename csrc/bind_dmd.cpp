// SPDX-License-Identifier: Apache-2.0
//
// The DMD functions of codmd._C. A tensor is (address, strides) in its own axis order, or None.
#include "bind_dmd.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "dmd_cpu.h"

namespace py = pybind11;

namespace codmd {
namespace {

float* floats(uintptr_t data) { return reinterpret_cast<float*>(data); }

// "bfchw" or, with channels_first, "bcfhw" in; (batch, frame, channel, height, width) out.
void read_axes(const py::handle& values, bool channels_first, int64_t out[5]) {
  const auto axes = py::cast<std::vector<int64_t>>(values);
  if (axes.size() != 5) throw std::invalid_argument("codmd._C: five axes expected");
  std::copy(axes.begin(), axes.end(), out);
  if (channels_first) std::swap(out[1], out[2]);
}

Latent latent_of(const py::handle& tensor, bool channels_first) {
  Latent latent{};
  if (tensor.is_none()) return latent;
  const auto pair = py::cast<py::tuple>(tensor);
  latent.data = reinterpret_cast<const void*>(py::cast<uintptr_t>(pair[0]));
  read_axes(pair[1], channels_first, latent.stride);
  return latent;
}

// (student, fake, real, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight address) and the two scales.
DmdScores scores_of(const py::tuple& sizes, bool channels_first, int dtype, const py::tuple& tensors,
                    double real_scale, double fake_scale) {
  if (dtype < 0 || dtype > 2 || tensors.size() != 9) throw std::invalid_argument("codmd._C: bad DMD arguments");
  DmdScores scores{};
  int64_t shape[5];
  read_axes(sizes, channels_first, shape);
  scores.shape = {shape[0], shape[1], shape[2], shape[3], shape[4]};
  scores.dtype = static_cast<DType>(dtype);
  Latent* latents[6] = {&scores.student, &scores.fake, &scores.real, &scores.real_uncond, &scores.fake_uncond,
                        &scores.noisy};
  for (size_t i = 0; i < 6; ++i) *latents[i] = latent_of(tensors[i], channels_first);
  if (!tensors[6].is_none()) {
    const auto sigma = py::cast<py::tuple>(tensors[6]);
    const auto strides = py::cast<std::vector<int64_t>>(sigma[1]);
    scores.sigma = floats(py::cast<uintptr_t>(sigma[0]));
    scores.sigma_stride[0] = strides.at(0), scores.sigma_stride[1] = strides.at(1);
  }
  const Latent mask = latent_of(tensors[7], channels_first);
  scores.mask = static_cast<const uint8_t*>(mask.data);
  std::copy(mask.stride, mask.stride + 5, scores.mask_stride);
  scores.sample_weight = floats(py::cast<uintptr_t>(tensors[8]));
  scores.real_scale = float(real_scale);
  scores.fake_scale = float(fake_scale);
  return scores;
}

// (scope, edges, first_alone, guard, eps, nan, huber_c, coefficient, sum, norm_divides_loss, weight_on_direction)
struct OwnedRule : DmdRule {
  explicit OwnedRule(const py::tuple& fields) {
    starts = py::cast<std::vector<int64_t>>(fields[1]);
    scope = static_cast<NormScope>(py::cast<int>(fields[0]));
    edges = starts.data(), segments = int64_t(starts.size()) - 1;
    first_alone = py::cast<bool>(fields[2]);
    guard = static_cast<Guard>(py::cast<int>(fields[3]));
    eps = py::cast<double>(fields[4]);
    nan = static_cast<NanPolicy>(py::cast<int>(fields[5]));
    huber_c = py::cast<double>(fields[6]);
    coefficient = py::cast<double>(fields[7]);
    sum = py::cast<bool>(fields[8]);
    norm_divides_loss = py::cast<bool>(fields[9]);
    weight_on_direction = py::cast<bool>(fields[10]);
  }
  OwnedRule(const OwnedRule&) = delete;
  OwnedRule& operator=(const OwnedRule&) = delete;

  std::vector<int64_t> starts;
};

// (mask address, batch stride, frame stride, grid rows, grid columns, temperature)
RelationPart relation_of(const py::tuple& fields) {
  RelationPart part{};
  part.mask.data = reinterpret_cast<const uint8_t*>(py::cast<uintptr_t>(fields[0]));
  part.mask.stride[0] = py::cast<int64_t>(fields[1]), part.mask.stride[1] = py::cast<int64_t>(fields[2]);
  part.grid = {py::cast<int64_t>(fields[3]), py::cast<int64_t>(fields[4])};
  part.temperature = py::cast<double>(fields[5]);
  return part;
}

double upstream(uintptr_t total, double weight, uintptr_t term) {
  return (total ? weight * double(*floats(total)) : 0.0) + (term ? double(*floats(term)) : 0.0);
}

}  // namespace

void bind_dmd(py::module_& m) {
  m.def("dmd_forward", [](const py::tuple& sizes, bool channels_first, int dtype, const py::tuple& tensors,
                          double real_scale, double fake_scale, const py::tuple& rule_fields, int threads,
                          uintptr_t values, uintptr_t norms, uintptr_t factors) {
    const DmdScores scores = scores_of(sizes, channels_first, dtype, tensors, real_scale, fake_scale);
    const OwnedRule rule(rule_fields);
    py::gil_scoped_release unlocked;
    dmd_forward(scores, rule, threads, floats(values), floats(norms), floats(factors));
  });

  m.def("codmd_forward", [](const py::tuple& sizes, bool channels_first, int dtype, const py::tuple& tensors,
                            double real_scale, double fake_scale, const py::tuple& rule_fields,
                            const py::tuple& relation_fields, int threads, uintptr_t values, uintptr_t norms,
                            uintptr_t factors, uintptr_t frame_term, uintptr_t frame_grad, uintptr_t pooled) {
    const DmdScores scores = scores_of(sizes, channels_first, dtype, tensors, real_scale, fake_scale);
    const OwnedRule rule(rule_fields);
    const RelationPart relation = relation_of(relation_fields);
    py::gil_scoped_release unlocked;
    codmd_forward(scores, rule, relation, threads, floats(values), floats(norms), floats(factors),
                  floats(frame_term), floats(frame_grad), floats(pooled));
  });

  // Upstream gradients are addresses of float32 scalars, 0 for none, in the order total, dmd, batch, frame. A term
  // that none reaches adds nothing, not 0 * NaN.
  m.def("dmd_backward", [](const py::tuple& sizes, bool channels_first, int dtype, const py::tuple& tensors,
                           double real_scale, double fake_scale, const py::tuple& rule_fields,
                           const py::tuple& relation_fields, int threads, uintptr_t norms, uintptr_t factors,
                           uintptr_t frame_grad, uintptr_t batch_grad, const std::vector<uintptr_t>& grads,
                           double batch_weight, double frame_weight, const py::tuple& out) {
    const DmdScores scores = scores_of(sizes, channels_first, dtype, tensors, real_scale, fake_scale);
    const OwnedRule rule(rule_fields);
    const RelationPart relation = relation_of(relation_fields);
    const Latent grad = latent_of(out, channels_first);
    const uintptr_t total = grads.at(0), own = grads.at(1), batch = grads.at(2), frame = grads.at(3);
    const double scale = upstream(total, 1.0, own), batch_scale = upstream(total, batch_weight, batch);
    const double frame_scale = upstream(total, frame_weight, frame);
    py::gil_scoped_release unlocked;
    dmd_backward(scores, rule, floats(norms), floats(factors), scale, total || own, relation,
                 total || frame ? floats(frame_grad) : nullptr, total || batch ? floats(batch_grad) : nullptr,
                 frame_scale, batch_scale, grad, threads);
  });
}

}  // namespace codmd
