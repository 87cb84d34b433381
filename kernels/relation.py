"""The relation operators' entry to the kernels: which path serves a call, on which device.

Calls beyond the kernels' sizes go to the reference, with a logged reason.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .launch import elsewhere
from .limits import LARGEST_TABLE, MOST_POOLED, MOST_WHOLE, Pool, Refused, logger
from .pooled import passes as pooled_passes
from .whole import passes as whole_passes

LONG_FEATURES = 2048
"""Features from which a gathered batch relation goes through its Gram matrices."""


def _reference() -> ModuleType:
    from ..ops.backends import old as module

    return module


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
        ``pool=None``; ∂(batch term)/∂ψ, of :func:`batch_grad_shape`. Empty where a term is not computed.
    """
    scores, weights = (student, real, fake, frame_mask, layout), (temperature, batch_weight, frame_weight)
    if elsewhere(student):
        with torch.cuda.device(student.device):
            return relation_forward(*scores, pool, *weights)
    try:
        if pool is None:
            return whole_passes.relation_forward(*scores, *weights)
        return pooled_passes.relation_forward(*scores, pool, *weights)
    except Refused:
        return _reference().relation_forward(*scores, pool, *weights)


def batch_grad_shape(samples: int, frames: int, features: int, pool: Pool) -> tuple[int, ...]:
    """Shape of the batch term's gradient: ``[B, K]``, or M ``[1, B, B]`` of whole latents where that serves."""
    matrix = pool is None and whole_passes.keeps_matrix(samples, frames)
    return (1, samples, samples) if matrix else (samples, features)


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
    scores = student, real, fake, frame_mask, layout
    if elsewhere(student):
        with torch.cuda.device(student.device):
            return relation_frames(*scores, pool, temperature, frame_weight)
    try:
        if pool is None:
            return whole_passes.relation_frames(*scores, temperature, frame_weight)
        return pooled_passes.relation_frames(*scores, pool, temperature, frame_weight)
    except Refused:
        return _reference().relation_frames(*scores, pool, temperature, frame_weight)


def takes_rows(vectors: int, row: int) -> bool:
    """Whether one launch of row blocks serves a gathered ``[vectors, row]`` table."""
    return not _is_long(vectors, row) and vectors <= MOST_POOLED and vectors * row < LARGEST_TABLE


def _is_long(vectors: int, row: int) -> bool:
    return row > 3 * LONG_FEATURES and vectors <= MOST_WHOLE


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
    if elsewhere(pooled):
        with torch.cuda.device(pooled.device):
            return relation_batch(*arguments)
    vectors, row = pooled.shape
    if _is_long(vectors, row):
        return whole_passes.relation_batch(*arguments)
    if takes_rows(vectors, row):
        return pooled_passes.relation_batch(*arguments)
    logger.warning("codmd: the Triton kernels do not take %d gathered rows of %d", vectors, row)
    return _reference().relation_batch(*arguments)


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
    inputs = out, grad_total, grad_batch, grad_frame, student, frame_mask, frame_grad, batch_grad, layout
    if elsewhere(out):
        with torch.cuda.device(out.device):
            return relation_backward(*inputs, pool, batch_weight, frame_weight)
    if not frame_grad.numel() and not batch_grad.numel():
        out.zero_()
        return None
    try:
        if pool is None:
            whole_passes.relation_backward(*inputs, batch_weight, frame_weight)
        else:
            pooled_passes.relation_backward(*inputs, pool, batch_weight, frame_weight)
    except Refused:
        _reference().relation_backward(*inputs, pool, batch_weight, frame_weight)
    return None
