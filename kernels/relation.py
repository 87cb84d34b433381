"""The relation operators' entry to the kernels: which path serves a call, on which device.

Calls beyond the kernels' sizes go to the reference, with a logged reason.
"""

from __future__ import annotations

import contextlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import relation_pooled, relation_whole
from .tiling import Geometry

logger = logging.getLogger("codmd")

LONG_FEATURES = 2048
"""Features from which a gathered batch relation goes through its Gram matrices."""

LARGEST_TABLE = 1 << 31
"""Elements of a feature table that int32 offsets reach."""

Pool = str | tuple[int, int] | None

_refusals: dict[tuple[Any, ...], str] = {}


def refusal(sizes: tuple[int, int, int, int, int], pool: Pool, batch: bool, frame: bool) -> str:
    """Why latents of canonical ``sizes`` are beyond the kernels; empty if they are not."""
    samples, frames, channels = sizes[:3]
    most = relation_whole.MOST_VECTORS if pool is None else relation_pooled.MOST_VECTORS
    if frame and frames > most:
        return f"{frames} frames, at most {most} with pool={pool!r}"
    if batch and samples > most:
        return f"{samples} samples, at most {most} with pool={pool!r}"
    if pool is not None:
        rows, columns = relation_pooled.grid_of(pool)
        if 4 * channels * rows * columns * max(frames, samples) >= LARGEST_TABLE:
            return f"a table of {channels * rows * columns} features for {max(frames, samples)} vectors"
    return ""


def refusal_of(latents: Tensor, layout: str, pool: Pool, batch: bool, frame: bool) -> str:
    """:func:`refusal` of a call, logged once for each kind of call."""
    key = latents.shape, layout, pool, batch, frame
    reason = _refusals.get(key)
    if reason is None:
        reason = refusal(Geometry.of(latents.shape, latents.stride(), layout).sizes, pool, batch, frame)
        if reason:
            logger.warning("codmd: the Triton kernels do not take %s; the reference computes it", reason)
        _refusals[key] = reason
    return reason


def _reference() -> ModuleType:
    from ..ops import _reference as module

    return module


def reference_dmd() -> ModuleType:
    """The reference's DMD and CoDMD passes."""
    from ..ops import _reference_dmd as module

    return module


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make ``tensor``'s device current, at no cost where it already is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


_HERE: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def relation_forward(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    pool: Pool,
    temperature: float,
    batch_weight: float,
    frame_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and feature gradients of one process.

    Args:
        student, real, fake: ``[B, F, C, H, W]`` (``"bfchw"``) or ``[B, C, F, H, W]`` (``"bcfhw"``), any strides.
        frame_mask: bool ``[B, F]`` or None.
        layout, pool, temperature, batch_weight, frame_weight: as in :func:`codmd.ops.relation_loss`.

    Returns:
        float32 (total, batch, frame) ``[3]``; ∂(frame term)/∂φ ``[B, F, K]``, or M / B ``[B, F, F]`` for
        ``pool=None``; ∂(batch term)/∂ψ ``[B, K]``. Empty where a term is not computed.
    """
    if refusal_of(student, layout, pool, batch_weight != 0, frame_weight != 0):
        return _reference().relation_forward(
            student, real, fake, frame_mask, layout, pool, temperature, batch_weight, frame_weight
        )
    with device_of(student):
        if pool is None:
            return relation_whole.relation_forward(
                student, real, fake, frame_mask, layout, temperature, batch_weight, frame_weight
            )
        return relation_pooled.relation_forward(
            student, real, fake, frame_mask, layout, pool, temperature, batch_weight, frame_weight
        )


def relation_frames(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    pool: Pool,
    temperature: float,
    frame_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stage before a gather: frame term ``[1]``, its gradient, and ``[B, 3K + 1]``: ψ_x, ψ_r, ψ_d, valid frames."""
    if refusal_of(student, layout, pool, False, frame_weight != 0):
        return _reference().relation_frames(student, real, fake, frame_mask, layout, pool, temperature, frame_weight)
    with device_of(student):
        if pool is None:
            return relation_whole.relation_frames(student, real, fake, frame_mask, layout, temperature, frame_weight)
        return relation_pooled.relation_frames(student, real, fake, frame_mask, layout, pool, temperature, frame_weight)


def relation_batch(
    pooled: Tensor,
    frame: Tensor,
    first_row: int,
    rows: int,
    temperature: float,
    batch_weight: float,
    frame_weight: float,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    """The stage after a gather: terms ``[3]`` and ``grad_scale``·∂(batch term)/∂ψ of the caller's ``rows`` rows."""
    arguments = pooled, frame, first_row, rows, temperature, batch_weight, frame_weight, grad_scale
    vectors, row = pooled.shape
    long = row > 3 * LONG_FEATURES and vectors <= relation_whole.MOST_VECTORS
    if not long and (vectors > relation_pooled.MOST_VECTORS or pooled.numel() >= LARGEST_TABLE):
        logger.warning("codmd: the Triton kernels do not take %d gathered rows of %d", vectors, row)
        return _reference().relation_batch(*arguments)
    with device_of(pooled):
        return (relation_whole if long else relation_pooled).relation_batch(*arguments)


def relation_backward(
    out: Tensor,
    grad_total: Tensor | None,
    grad_batch: Tensor | None,
    grad_frame: Tensor | None,
    student: Tensor | None,
    frame_mask: Tensor | None,
    frame_grad: Tensor,
    batch_grad: Tensor,
    layout: str,
    pool: Pool,
    batch_weight: float,
    frame_weight: float,
) -> None:
    """Write the gradient of the student's latents into ``out``; ``student`` is read for ``pool=None`` alone."""
    gradients = grad_total, grad_batch, grad_frame
    weights = batch_weight, frame_weight
    if refusal_of(out, layout, pool, batch_grad.numel() > 0, frame_grad.numel() > 0):
        _reference().relation_backward(
            out, *gradients, student, frame_mask, frame_grad, batch_grad, layout, pool, *weights
        )
        return
    if not frame_grad.numel() and not batch_grad.numel():
        out.zero_()
        return
    with device_of(out):
        if pool is None:
            assert student is not None
            relation_whole.relation_backward(
                out, *gradients, student, frame_mask, frame_grad, batch_grad, layout, *weights
            )
        else:
            relation_pooled.relation_backward(
                out, *gradients, student, frame_mask, frame_grad, batch_grad, layout, pool, *weights
            )
