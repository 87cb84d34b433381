"""Calls as the C++ and the CUDA extension read them: plain tuples of addresses, sizes, strides and numbers.

A tensor crosses as (address, bytes of its storage, first element, dtype code, strides), so that the extension refuses
what does not reach as far as a call would touch (``csrc/python.h``). The order of tensors is that of
:class:`codmd.ops.contract.Objective`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codmd.conventions import Convention
from codmd.ops.contract import Call, Found, Grid, Objective, Relation, Upstream

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3, torch.uint8: 4, torch.int32: 5}
_WHOLE: Grid = (0, 0)

Described = tuple[Any, ...] | None


def described(tensor: Tensor | None) -> Described:
    """A tensor as the extension reads it; code -1 stands for a dtype that no buffer has."""
    if tensor is None:
        return None
    storage = tensor.untyped_storage().nbytes()
    return tensor.data_ptr(), storage, tensor.storage_offset(), CODES.get(tensor.dtype, -1), tensor.stride()


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
    return described(total), described(dmd), described(batch), described(frame)


def kept_arguments(found: Found) -> tuple[Described, ...]:
    """What a backward pass reads of a forward one."""
    return (
        None, described(found.norms), described(found.factors), _unless_empty(found.frame_grad),
        _unless_empty(found.batch_grad), None,
    )  # fmt: skip


class Outputs(NamedTuple):
    """What a forward pass writes, and how the extension reads it, the rows last."""

    found: Found
    rows: Tensor
    described: tuple[Described, ...]


def outputs(call: Call, gathered: bool, separate: bool) -> Outputs:
    """Room for what ``call`` finds: with ``gathered``, in the stage before a gather.

    Unless ``separate``, flat pieces of one allocation.
    """
    samples, frames, features = sizes(call)
    device = call.student.device
    related = isinstance(call, Relation) or call.related
    frame_shape: tuple[int, ...] = (0,)
    batch_shape: tuple[int, ...] = (0,)
    if related and call.frame and frames > 1:
        frame_shape = samples, frames, features if call.pool else frames
    if related and call.batch and samples > 1 and not gathered:
        batch_shape = samples, features
    rows_shape = (samples, 3 * features + 1) if gathered else (0,)
    if isinstance(call, Relation):
        terms, own = _room((3,), device)
        frame_grad, frame = _room(frame_shape, device)
        batch_grad, batch = _room(batch_shape, device)
        rows, staged = _room(rows_shape, device) if gathered else (batch_grad, None)
        return Outputs(Found(terms, None, None, frame_grad, batch_grad), rows, (own, None, None, frame, batch, staged))
    shapes = (5,), _norms(call, samples, frames), (samples,), frame_shape, batch_shape, rows_shape
    pieces, written = (_apart if separate else _flat)(shapes, device)
    terms, norms, factors, frame_grad, batch_grad, rows = pieces
    return Outputs(Found(terms, norms, factors, frame_grad, batch_grad), rows, written)


def _room(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Described]:
    """An uninitialised float32 tensor; nothing to write where it is empty."""
    tensor = torch.empty(shape, dtype=torch.float32, device=device)
    length = math.prod(shape)
    return tensor, (tensor.data_ptr(), 4 * length, 0, 0, None) if length else None


def _apart(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[list[Tensor], tuple[Described, ...]]:
    rooms = [_room(shape, device) for shape in shapes]
    return [tensor for tensor, _ in rooms], tuple(written for _, written in rooms)


def _flat(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[list[Tensor], tuple[Described, ...]]:
    lengths = [math.prod(shape) for shape in shapes]
    flat = torch.empty(sum(lengths), dtype=torch.float32, device=device)
    address, written = flat.data_ptr(), []
    for length in lengths:
        written.append((address, 4 * length, 0, 0, None) if length else None)
        address += 4 * length
    return list(flat.split_with_sizes(lengths)), tuple(written)


def sizes(call: Call) -> tuple[int, int, int]:
    """B, F and the features K."""
    samples, frames, channels, height, width = call.student.shape
    if call.layout == "bcfhw":
        frames, channels = channels, frames
    return samples, frames, channels * (call.pool[0] * call.pool[1] if call.pool else height * width)


def gathered_arguments(
    call: Call, rows: Tensor, first: int, scale: float, kept: Found
) -> tuple[tuple[Any, ...], Any, Tensor, Tensor]:
    """(what the extension's ``gathered`` reads, the numbers, room for terms and for the batch gradient)."""
    samples, _, features = sizes(call)
    rows = rows.contiguous()
    terms = torch.empty_like(kept.terms)
    batch_grad = torch.empty(samples, features, dtype=torch.float32, device=rows.device)
    objective = not isinstance(call, Relation)
    fields = described(rows), len(rows), features, first, samples, scale, described(kept.terms), objective
    return fields, numbers(call), terms, batch_grad


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


def _unless_empty(tensor: Tensor) -> Described:
    return described(tensor) if tensor.numel() else None
