// SPDX-License-Identifier: Apache-2.0
//
// Reading calls from Python, for both bindings. A tensor crosses as (address, bytes of its storage, first element,
// dtype code, strides in its own axis order) or None. What a call would touch follows from its sizes and strides; a
// tensor that does not reach that far, or of another dtype, is refused by name before anything is read.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "dmd.h"
#include "types.h"

namespace codmd::python {

namespace py = pybind11;

// The first three are those of DType.
enum class Code : int64_t { float32 = 0, bfloat16 = 1, float16 = 2, boolean = 3, bytes = 4, int32 = 5 };

inline const char* name_of(int64_t code) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "bool", "uint8", "int32"};
  return code >= 0 && code < 6 ? names[code] : "an unknown dtype";
}

inline int64_t size_of(Code code) {
  constexpr int64_t sizes[] = {4, 2, 2, 1, 1, 4};
  return sizes[int64_t(code)];
}

[[noreturn]] inline void refuse(const char* name, const std::string& why) {
  throw std::invalid_argument("codmd extension: " + std::string(name) + ": " + why);
}

// A tuple of `size` objects, borrowed.
class Items {
 public:
  Items(PyObject* tuple, const char* name, Py_ssize_t size) : tuple_(tuple), name_(name) {
    if (!PyTuple_Check(tuple)) refuse(name, std::string("a tuple needed, ") + Py_TYPE(tuple)->tp_name + " came");
    const Py_ssize_t found = PyTuple_GET_SIZE(tuple);
    if (found != size) refuse(name, std::to_string(size) + " entries needed, " + std::to_string(found) + " came");
  }

  PyObject* operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(tuple_, i); }
  int64_t integer(Py_ssize_t i) const {
    const int64_t value = PyLong_AsLongLong((*this)[i]);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  int64_t integer(Py_ssize_t i, int64_t least, int64_t most) const {
    const int64_t value = integer(i);
    if (value < least || value > most) refuse(name_, "entry " + std::to_string(i) + " is " + std::to_string(value));
    return value;
  }
  uintptr_t address(Py_ssize_t i) const {
    const uint64_t value = PyLong_AsUnsignedLongLong((*this)[i]);
    if (value == ~uint64_t(0) && PyErr_Occurred()) throw py::error_already_set();
    return uintptr_t(value);
  }
  double number(Py_ssize_t i) const {
    const double value = PyFloat_AsDouble((*this)[i]);
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* tuple_;
  const char* name_;
};

// What lies behind a tensor, or nothing.
class Buffer {
 public:
  Buffer(PyObject* tensor, const char* name) : name_(name) {
    if (tensor == Py_None) return;
    const Items items(tensor, name, 5);
    data_ = items.address(0);
    bytes_ = items.integer(1);
    first_ = items.integer(2);
    code_ = items.integer(3);
    strides_ = items[4];
    present_ = true;
  }

  bool present() const { return present_; }

  // The address, once `needed` elements of `code` are known to lie behind it.
  void* hold(Code code, int64_t needed) const {
    if (!present_)
      refuse(name_, "missing, " + std::to_string(needed) + " elements of " + name_of(int64_t(code)) + " needed");
    if (code_ != int64_t(code))
      refuse(name_, std::string(name_of(int64_t(code))) + " needed, " + name_of(code_) + " came");
    // Of a view of a storage without memory, the address is the offset alone.
    const bool nowhere = first_ < 0 || bytes_ < 0 || data_ == uintptr_t(first_ * size_of(code));
    const int64_t found = nowhere ? 0 : bytes_ / size_of(code) - first_;
    if (found < needed)
      refuse(name_, std::to_string(needed) + " elements needed from its address on, " +
                        std::to_string(found < 0 ? 0 : found) + " came");
    return reinterpret_cast<void*>(data_);
  }

  // The same for a view of `sizes`; writes its strides.
  template <int N>
  void* view(Code code, const int64_t (&sizes)[N], int64_t (&strides)[N]) const {
    if (!present_) hold(code, 1);
    const Items items(strides_, name_, N);
    int64_t last = 0;
    for (int axis = 0; axis < N; ++axis) {
      strides[axis] = items.integer(axis);
      if (strides[axis] < 0) refuse(name_, "its strides must not be negative");
      // Elements beyond any storage: kept from overflowing, and refused below.
      constexpr int64_t beyond = std::numeric_limits<int64_t>::max() / 2;
      const int64_t steps = sizes[axis] - 1;
      last = steps && strides[axis] > (beyond - last) / steps ? beyond : last + steps * strides[axis];
    }
    return hold(code, last + 1);
  }

  float* floats(int64_t needed) const { return static_cast<float*>(hold(Code::float32, needed)); }
  float* floats_or_null(int64_t needed) const { return present_ ? floats(needed) : nullptr; }

 private:
  const char* name_;
  uintptr_t data_ = 0;
  int64_t bytes_ = 0, first_ = 0, code_ = -1;
  PyObject* strides_ = nullptr;
  bool present_ = false;
};

// Sizes in the tensors' own axis order: "bfchw" or, with channels_first, "bcfhw".
struct Axes {
  Shape shape;
  bool channels_first;

  Axes(PyObject* sizes, bool channels_first) : channels_first(channels_first) {
    const Items items(sizes, "sizes", 5);
    double elements = 1;
    int64_t axes[5];
    for (int axis = 0; axis < 5; ++axis) {
      axes[axis] = items.integer(axis);
      if (axes[axis] < 1) refuse("sizes", "every one must be at least 1");
      elements *= double(axes[axis]);
    }
    if (channels_first) std::swap(axes[1], axes[2]);
    shape = {axes[0], axes[1], axes[2], axes[3], axes[4]};
    if (elements > 1e17 || double(shape.batch) * double(shape.frames) > 2147483647.0 ||
        double(shape.height) * double(shape.width) > 2147483647.0)
      refuse("sizes", "samples times frames, and pixels of a plane, are at most 2^31 - 1");
  }

  Tensor tensor(PyObject* item, const char* name, Code code, bool required) const {
    const Buffer buffer(item, name);
    Tensor result{};
    if (!buffer.present() && !required) return result;
    int64_t sizes[5] = {shape.batch, shape.frames, shape.channels, shape.height, shape.width};
    if (channels_first) std::swap(sizes[1], sizes[2]);
    result.data = buffer.view(code, sizes, result.stride);
    if (channels_first) std::swap(result.stride[1], result.stride[2]);
    return result;
  }

  // [B, F] by strides, or null.
  const void* by_frame(PyObject* item, const char* name, Code code, int64_t (&strides)[2]) const {
    const Buffer buffer(item, name);
    const int64_t sizes[2] = {shape.batch, shape.frames};
    return buffer.present() ? buffer.view(code, sizes, strides) : nullptr;
  }
};

// Convention.rule.
inline DmdRule rule_of(PyObject* rule) {
  const Items items(rule, "rule", 11);
  DmdRule result;
  result.scope = static_cast<NormScope>(items.integer(0, 0, 2));
  result.block = items.integer(1, 1, std::numeric_limits<int64_t>::max() / 2);
  result.first_alone = items.integer(2, 0, 1);
  result.guard = static_cast<Guard>(items.integer(3, 0, 2));
  result.eps = items.number(4);
  result.nan = static_cast<NanPolicy>(items.integer(5, 0, 2));
  result.huber_c = items.number(6);
  result.coefficient = items.number(7);
  result.sum = items.integer(8, 0, 1);
  result.norm_divides_loss = items.integer(9, 0, 1);
  result.weight_on_direction = items.integer(10, 0, 1);
  return result;
}

// Six floats, or a float32 tensor [6] for kernels to load.
inline Numbers numbers_of(PyObject* numbers) {
  Number<double> all[6] = {};
  if (PyTuple_Check(numbers) && PyTuple_GET_SIZE(numbers) == 5) {
    const float* at = Buffer(numbers, "numbers").floats(6);
    for (int i = 0; i < 6; ++i) all[i].at = at + i;
  } else {
    const Items items(numbers, "numbers", 6);
    for (int i = 0; i < 6; ++i) all[i].value = items.number(i);
  }
  return {all[0], all[1], all[2], all[3], all[4], all[5]};
}

// What is read of a call: all of it, or what a gradient needs.
enum class Pass { forward, gradient };

// A relation (rule None) or an objective; the grid of an objective without a relation is None.
struct Call {
  Axes axes;
  DmdScores scores;
  FrameMask frame_mask;
  Grid grid;
  bool is_objective, related;
  DmdRule rule;
  Numbers numbers;

  // `tensors`: student, real, fake, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight, frame_mask,
  // augment_real, augment_uncond.
  Call(PyObject* tensors, PyObject* sizes, bool channels_first, int64_t dtype, PyObject* grid_sizes, PyObject* fields,
       PyObject* values, Pass pass)
      : axes(sizes, channels_first),
        scores{},
        frame_mask{},
        grid{1, 1},
        is_objective(fields != Py_None),
        related(grid_sizes != Py_None),
        rule{},
        numbers(numbers_of(values)) {
    const Shape& shape = axes.shape;
    if (dtype < 0 || dtype > 2)
      refuse("dtype", "float32, bfloat16 or float16 needed, " + std::string(name_of(dtype)) + " came");
    const Code code = static_cast<Code>(dtype);
    if (related) {
      const Items items(grid_sizes, "grid", 2);
      grid = {items.integer(0), items.integer(1)};
      const bool whole = grid.height == 0 && grid.width == 0 && !is_objective;
      if (!whole && (grid.height < 1 || grid.width < 1 || grid.height > shape.height || grid.width > shape.width))
        refuse("grid", "between one region and one a pixel along each axis needed");
    }
    if (is_objective) rule = rule_of(fields);

    const Items items(tensors, "tensors", 12);
    const bool forward = pass == Pass::forward, whole = grid.every_pixel();
    scores.shape = shape;
    scores.dtype = static_cast<DType>(dtype);
    scores.student = axes.tensor(items[0], "student", code, forward || whole);
    scores.real = axes.tensor(items[1], "real", code, forward || is_objective);
    scores.fake = axes.tensor(items[2], "fake", code, forward || is_objective);
    scores.real_uncond = axes.tensor(items[3], "real_uncond", code, false);
    scores.fake_uncond = axes.tensor(items[4], "fake_uncond", code, false);
    scores.sigma = static_cast<const float*>(axes.by_frame(items[6], "sigma", Code::float32, scores.sigma_stride));
    scores.noisy = axes.tensor(items[5], "noisy", code, forward && scores.sigma);
    scores.mask = axes.tensor(items[7], "mask", Code::boolean, false);
    scores.sample_weight = Buffer(items[8], "sample_weight").floats_or_null(shape.batch);
    frame_mask.data = static_cast<const uint8_t*>(
        axes.by_frame(items[9], "frame_mask", Code::boolean, frame_mask.stride));
    scores.augment_real = axes.tensor(items[10], "augment_real", code, items[11] != Py_None);
    scores.augment_uncond = axes.tensor(items[11], "augment_uncond", code, items[10] != Py_None);
    if (scores.decoupled() && (!is_objective || scores.real_uncond.data || scores.sigma || rule.norm_divides_loss))
      refuse("augment_real", "it goes with an objective of squares over norms, without real_uncond and sigma");
  }

  Scores relation() const {
    return {scores.shape, scores.dtype, scores.student, scores.real, scores.fake, frame_mask, grid};
  }

  // terms, norms, factors, frame_grad, batch_grad, rows.
  Found found(PyObject* tensors, Pass pass) const {
    const Items items(tensors, "found", 6);
    const Shape& s = scores.shape;
    const int64_t features = grid.features(s);
    Found result{};
    if (pass == Pass::forward) result.terms = Buffer(items[0], "terms").floats(is_objective ? 5 : 3);
    if (is_objective) {
      result.norms = Buffer(items[1], "norms").floats((scores.decoupled() ? 2 : 1) * rule.norms(s));
      result.factors = Buffer(items[2], "factors").floats(s.batch);
    }
    if (!related) return result;
    const int64_t row = grid.every_pixel() ? s.frames : features;
    result.frame_grad = Buffer(items[3], "frame_grad").floats_or_null(s.rows() * row);
    result.batch_grad = Buffer(items[4], "batch_grad").floats_or_null(s.batch * features);
    if (pass == Pass::forward) result.rows = Buffer(items[5], "rows").floats_or_null(s.batch * row_pitch(features));
    return result;
  }

  Tensor output(PyObject* out) const {
    return axes.tensor(out, "out", static_cast<Code>(int64_t(scores.dtype)), true);
  }
};

inline Upstream upstream_of(PyObject* tensors) {
  const Items items(tensors, "upstream", 4);
  const auto at = [&](int i) { return Buffer(items[i], "upstream gradient").floats_or_null(1); };
  return {at(0), at(1), at(2), at(3)};
}

// (rows, samples, features, first, count, scale, kept terms, whether of an objective); `terms` and `batch_grad` are
// what comes of them.
struct GatheredCall {
  Gathered gathered;
  float *terms, *batch_grad;

  GatheredCall(PyObject* fields, PyObject* terms_out, PyObject* grad_out) {
    const Items items(fields, "gathered", 8);
    constexpr int64_t most = int64_t(1) << 40;
    gathered.samples = items.integer(1, 1, 2147483647);
    const int64_t features = gathered.features = items.integer(2, 1, most);
    gathered.first = items.integer(3);
    gathered.count = items.integer(4);
    if (gathered.first < 0 || gathered.count < 1 || gathered.first > gathered.samples - gathered.count)
      refuse("gathered", "rows outside the gathered ones");
    gathered.scale = items.number(5);
    gathered.objective = items.integer(7, 0, 1);
    const int64_t terms_needed = gathered.objective ? 5 : 3;
    gathered.rows = Buffer(items[0], "rows").floats(gathered.samples * row_pitch(features));
    gathered.kept = Buffer(items[6], "kept terms").floats(terms_needed);
    terms = Buffer(terms_out, "terms").floats(terms_needed);
    batch_grad = Buffer(grad_out, "batch_grad").floats(gathered.count * features);
  }
};

}  // namespace codmd::python
