"""The norm N(v, r) that divides the direction of DMD: a mean of |v - r| per sample, batch or block of frames."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from codmd.conventions import Convention
from codmd.reference.guidance import FRAME_AXIS
from codmd.reference.scale import power_of_two


def mean_distance(
    values: Tensor, real: Tensor, convention: Convention, layout: str, mask: Tensor | None = None
) -> Tensor:
    """mean|v - r| of every norm segment, shaped to broadcast; 1 for an independent first frame. No guard yet.

    v is the student or, with ``norm_of="fake"``, the critic's prediction. ``mask`` restricts the mean where the
    convention's norm is over the selected elements; a segment without any has 0.
    """
    samples, axes = len(values), tuple(range(1, values.ndim))
    if convention.arithmetic == "emulate":
        scale: Tensor | float = 1.0
    else:
        scale = power_of_two(torch.maximum(values.abs(), real.abs()), () if convention.norm_scope == "batch" else axes)
    distance = (values / scale - real / scale).abs()
    selected = mask.expand_as(distance) if mask is not None and convention.norm_over == "selected" else None

    def mean(start: int, length: int, axis: int, axes: tuple[int, ...]) -> Tensor:
        piece = distance.narrow(axis, start, length)
        if selected is None:
            return scale * piece.mean(axes, keepdim=True)
        chosen = selected.narrow(axis, start, length)
        total = torch.where(chosen, piece, 0).sum(axes, keepdim=True)
        return scale * (total / chosen.sum(axes, keepdim=True).clamp(min=1))

    if convention.norm_scope == "batch":
        return mean(0, samples, 0, (0, *axes))
    frame_axis = FRAME_AXIS[layout]
    if convention.norm_scope == "sample" or frame_axis is None:
        whole = mean(0, samples, 0, axes)
        return torch.ones_like(whole) if convention.independent_first_frame else whole
    edges = convention.segments(distance.shape[frame_axis])
    blocks = [
        mean(start, end - start, frame_axis, axes).repeat_interleave(end - start, frame_axis)
        for start, end in itertools.pairwise(edges)
    ]
    if convention.independent_first_frame:
        blocks[0] = torch.ones_like(blocks[0])
    return torch.cat(blocks, frame_axis)


def guard(norm: Tensor, convention: Convention) -> Tensor:
    """The norm as it divides: unchanged, at least ``eps``, or plus ``eps``."""
    if convention.guard == "clamp":
        return norm.clamp(min=convention.eps)
    return norm + convention.eps if convention.guard == "add" else norm


def normaliser(values: Tensor, real: Tensor, convention: Convention, layout: str, mask: Tensor | None = None) -> Tensor:
    """N(v, r), the guarded norm; an independent first frame keeps exactly 1."""
    norm = mean_distance(values, real, convention, layout, mask)
    guarded = guard(norm, convention)
    if not convention.independent_first_frame:
        return guarded
    frame_axis = FRAME_AXIS[layout]
    if frame_axis is None:
        return norm
    frames = norm.shape[frame_axis]
    return torch.cat([norm.narrow(frame_axis, 0, 1), guarded.narrow(frame_axis, 1, frames - 1)], frame_axis)


def out_of_range(norm: Tensor, values: Tensor, real: Tensor, convention: Convention) -> Tensor:
    """Where finite latents have a norm beyond the largest number, or one below the normal numbers, of few digits."""
    finite = (values.isfinite() & real.isfinite()).flatten(1).all(1)
    finite = finite.all() if convention.norm_scope == "batch" else finite.reshape([-1] + [1] * (norm.ndim - 1))
    return finite & (norm.isinf() | (norm > 0) & (norm < torch.finfo(norm.dtype).tiny))
