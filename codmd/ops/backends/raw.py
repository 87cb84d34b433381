"""Calls as the C++ and the CUDA extension read them: plain tuples of addresses, sizes, strides and numbers.

A tensor crosses as (address, bytes of its storage, first element, dtype code, strides), so that the extension refuses
what does not reach as far as a call would touch (``csrc/python.h``). The order of tensors is that of
:class:`codmd.ops.contract.Objective`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codmd.conventions import Convention
from codmd.ops.contract import Call, Found, Grid, Objective, Pending, Relation, Upstream

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3, torch.uint8: 4, torch.int32: 5}
_WHOLE: Grid = (0, 0)

Described = tuple[Any, ...] | None


def described(tensor: Tensor | None) -> Described:
    """A tensor as the extension reads it; code -1 stands for a dtype that no buffer has."""
    if tensor is None:
        return None
    storage, code = tensor.untyped_storage().nbytes(), CODES.get(tensor.dtype, -1)
    return tensor.data_ptr(), storage, tensor.storage_offset(), code, tensor.stride()


def _flat(tensor: Tensor | None) -> Described:
    """The same of contiguous memory that an operator made, from its first element on: in half the time."""
    size = 0 if tensor is None else tensor.nbytes
    return (tensor.data_ptr(), size, 0, CODES.get(tensor.dtype, -1), None) if size else None  # type: ignore[union-attr]


def arguments(call: Call) -> tuple[Any, ...]:
    """The leading arguments of the extension's ``forward``."""
    frame_mask, student = described(call.frame_mask), call.student
    if isinstance(call, Relation):
        latents = described(student), described(call.real), described(call.fake)
        tensors: tuple[Described, ...] = (*latents, None, None, None, None, None, None, frame_mask, None, None)
        return _options(tensors, student, call, call.pool or _WHOLE, None)
    tensors = (
        described(student), described(call.real), described(call.fake), described(call.real_uncond),
        described(call.fake_uncond), described(call.noisy), described(call.sigma), described(call.mask),
        described(call.sample_weight), frame_mask, described(call.augment_real), described(call.augment_uncond),
    )  # fmt: skip
    return _options(tensors, student, call, call.pool if call.related else None, call.convention)


def gradient_arguments(out: Tensor, call: Call, whole: bool) -> tuple[Any, ...]:
    """The same of its ``gradient``, with the tensors that are read again."""
    frame_mask = described(call.frame_mask)
    if isinstance(call, Relation):
        student = described(call.student) if whole else None
        tensors: tuple[Described, ...] = (student, *(None,) * 8, frame_mask, None, None)
        return _options(tensors, out, call, call.pool or _WHOLE, None)
    tensors = (
        None, described(call.real), described(call.fake), described(call.real_uncond), described(call.fake_uncond),
        None, described(call.sigma), described(call.mask), None, frame_mask, described(call.augment_real),
        described(call.augment_uncond),
    )  # fmt: skip
    return _options(tensors, out, call, call.pool if call.related else None, call.convention)


def upstream_arguments(upstream: Upstream) -> tuple[Described, ...]:
    total, dmd, batch, frame = upstream
    return _flat(total), _flat(dmd), _flat(batch), _flat(frame)


def kept_arguments(found: Found) -> tuple[Described, ...]:
    """What a backward pass reads of a forward one."""
    return None, _flat(found.norms), _flat(found.factors), _flat(found.frame_grad), _flat(found.batch_grad), None


class Outputs(NamedTuple):
    """What a forward pass writes, and how the extension reads it, the rows last."""

    found: Found
    rows: Tensor
    described: tuple[Described, ...]


def outputs(call: Call, gathered: bool, separate: bool) -> Outputs:
    """Uninitialised memory for what ``call`` finds: with ``gathered``, in the stage before a gather.

    Unless ``separate``, an objective's are flat pieces of one allocation.
    """
    samples, frames, features = sizes(call)
    related = isinstance(call, Relation) or call.related
    row = features if call.pool else frames
    frame_length = samples * frames * row if related and call.frame and frames > 1 else 0
    batch_length = samples * features if related and call.batch and samples > 1 and not gathered else 0
    rows_length = samples * (3 * features + 1) if gathered else 0
    if isinstance(call, Relation):
        terms = call.student.new_empty(3, dtype=torch.float32)
        # Sizes as integers and the options of another tensor: an allocation in half the time.
        frame_grad = terms.new_empty(samples, frames, row) if frame_length else terms.new_empty(0)
        batch_grad = terms.new_empty(samples, features) if batch_length else terms.new_empty(0)
        rows = terms.new_empty(samples, 3 * features + 1) if gathered else batch_grad
        written: tuple[Described, ...] = (
            _written(terms, 3), None, None, _written(frame_grad, frame_length), _written(batch_grad, batch_length),
            _written(rows, rows_length),
        )  # fmt: skip
        return Outputs(Found(terms, None, None, frame_grad, batch_grad), rows, written)
    norms_shape = _norms(call, samples, frames)
    lengths = 5, math.prod(norms_shape), samples, frame_length, batch_length, rows_length
    flat = call.student.new_empty(5 if separate else sum(lengths), dtype=torch.float32)
    if separate:
        shapes = (
            norms_shape, (samples,), (samples, frames, row) if frame_length else (0,),
            (samples, features) if batch_length else (0,), (samples, 3 * features + 1) if gathered else (0,),
        )  # fmt: skip
        pieces = [flat, *(flat.new_empty(shape) for shape in shapes)]
        written = tuple(map(_written, pieces, lengths))
    else:
        pieces = list(flat.split_with_sizes(lengths))
        address = flat.data_ptr()
        described_pieces: list[Described] = []
        for length in lengths:
            described_pieces.append((address, 4 * length, 0, 0, None) if length else None)
            address += 4 * length
        written = tuple(described_pieces)
    terms, norms, factors, frame_grad, batch_grad, rows = pieces
    return Outputs(Found(terms, norms, factors, frame_grad, batch_grad), rows, written)


def _written(tensor: Tensor, length: int) -> Described:
    """A float32 tensor of its own memory as the extension reads it; nothing to write where it is empty."""
    return (tensor.data_ptr(), 4 * length, 0, 0, None) if length else None


def sizes(call: Call) -> tuple[int, int, int]:
    """B, F and the features K."""
    samples, frames, channels, height, width = call.student.shape
    if call.layout == "bcfhw":
        frames, channels = channels, frames
    return samples, frames, channels * (call.pool[0] * call.pool[1] if call.pool else height * width)


def numbers(call: Call) -> Any:
    return described(call.numbers) if isinstance(call.numbers, Tensor) else call.numbers


def _options(
    tensors: tuple[Described, ...], like: Tensor, call: Call, grid: Grid | None, convention: Convention | None
) -> tuple[Any, ...]:
    rule = None if convention is None else convention.rule
    return tensors, like.shape, call.layout == "bcfhw", CODES.get(like.dtype, -1), grid, rule, numbers(call)


def _norms(call: Objective, samples: int, frames: int) -> tuple[int, ...]:
    levels = () if call.augment_real is None else (2,)
    scope = call.convention.norm_scope
    if scope == "block":
        return *levels, samples, len(call.convention.segments(frames)) - 1
    return (*levels, 1) if scope == "batch" else (*levels, samples)


class Extension(ABC):
    """The functions of :class:`codmd.ops.contract.Backend` on an extension, which a subclass calls."""

    @abstractmethod
    def run_forward(self, call: Call, outputs: tuple[Described, ...]) -> None:
        """The losses of a call, into its outputs."""

    @abstractmethod
    def run_gathered(self, rows: Tensor, fields: tuple[Any, ...], terms: Described, batch_grad: Described) -> None:
        """``fields``: what the extension reads, then the numbers."""

    @abstractmethod
    def run_gradient(
        self, out: Tensor, upstream: tuple[Described, ...], arguments: tuple[Any, ...], found: tuple[Described, ...]
    ) -> None:
        """The gradient of the student, into `out`."""

    def relation(self, call: Relation) -> Found:
        return self._forward(call, False, True).found

    def objective(self, call: Objective, separate: bool) -> Found:
        return self._forward(call, False, separate).found

    def features(self, call: Call) -> Pending:
        outputs = self._forward(call, True, True)
        return Pending(outputs.rows, outputs.found)

    def gathered(self, call: Call, pending: Pending, rows: Tensor, first: int, scale: float) -> Found:
        partial = pending.partial
        samples, _, features = sizes(call)
        rows = rows.contiguous()
        terms = torch.empty_like(partial.terms)
        batch_grad = torch.empty(samples, features, dtype=torch.float32, device=rows.device)
        objective = not isinstance(call, Relation)
        fields = described(rows), len(rows), features, first, samples, scale, described(partial.terms), objective
        self.run_gathered(rows, (fields, numbers(call)), described(terms), described(batch_grad))
        return partial._replace(terms=terms, batch_grad=batch_grad)

    def gradient(self, out: Tensor, upstream: Upstream, call: Call, found: Found) -> None:
        self._backward(out, upstream, call, found, False)

    def whole_gradient(self, out: Tensor, upstream: Upstream, call: Relation, found: Found) -> None:
        self._backward(out, upstream, call, found, True)

    def whole_batch_grad(self, samples: int, frames: int, features: int) -> tuple[int, ...]:
        return samples, features

    def _forward(self, call: Call, staged: bool, separate: bool) -> Outputs:
        written = outputs(call, staged, separate)
        self.run_forward(call, written.described)
        return written

    def _backward(self, out: Tensor, upstream: Upstream, call: Call, found: Found, whole: bool) -> None:
        arguments = gradient_arguments(out, call, whole)
        self.run_gradient(out, upstream_arguments(upstream), arguments, kept_arguments(found))
