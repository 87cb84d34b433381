"""Shapes of what a forward pass finds, from those of its call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codmd import backends, distributed
from codmd.ops.contract import Call, Gather, Objective
from codmd.ops.gradient_memory import dense_strides


def norm_shape(call: Objective) -> torch.Size:
    """Shape of the norms: one value a segment, of both levels where the loss is decoupled."""
    samples, rule = call.student.shape[0], call.convention
    frames = call.student.shape[1 if call.layout == "bfchw" else 2]
    shapes = {"sample": (samples,), "batch": (1,), "block": (samples, len(rule.segments(frames)) - 1)}
    levels = () if call.augment_real is None else (2,)
    return torch.Size(levels + shapes[rule.norm_scope])


class Shapes(NamedTuple):
    """Shapes of :class:`Found`."""

    terms: tuple[int, ...]
    norms: tuple[int, ...]
    factors: tuple[int, ...]
    frame_grad: tuple[int, ...]
    batch_grad: tuple[int, ...]


def found_shapes(call: Call, gather: Gather, backend: str) -> Shapes:
    """What a forward pass returns for the shapes of ``call``."""
    samples, frames, channels, height, width = call.student.shape
    if call.layout == "bcfhw":
        frames, channels = channels, frames
    features = channels * (height * width if call.pool is None else call.pool[0] * call.pool[1])
    ranks = distributed.resolve(gather.group).size() if gather.group else 1
    frame_grad: tuple[int, ...] = (0,)
    batch_grad: tuple[int, ...] = (0,)
    if call.frame and frames > 1:
        frame_grad = samples, frames, frames if call.pool is None else features
    if call.batch and ranks * samples > 1:
        batch_grad = samples, features
        if call.pool is None and ranks == 1:
            run = backends.select(backend, call.student, "whole_relation_loss")
            batch_grad = run.whole_batch_grad(samples, frames, features)
    if isinstance(call, Objective):
        return Shapes((5,), norm_shape(call), (samples,), frame_grad, batch_grad)
    return Shapes((3,), (0,), (0,), frame_grad, batch_grad)


def empty_attention(q: Tensor) -> tuple[Tensor, Tensor]:
    """Memory of attention's output and of its tangent: the strides of q where they are dense and its head axis is."""
    strides = dense_strides(q.shape, q.stride())
    if strides[-1] != 1:
        strides = torch.empty(q.shape, device="meta").stride()
    out, out_dot = (torch.empty_strided(q.shape, strides, dtype=q.dtype, device=q.device) for _ in range(2))
    return out, out_dot
