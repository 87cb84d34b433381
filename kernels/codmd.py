"""The DMD and CoDMD operators' entry to the kernels, on the device of their tensors."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dmd import passes, related
from .launch import elsewhere
from .limits import Pool, Refused, grid_of
from .relation import takes_rows


def _reference() -> ModuleType:
    from ..ops.backends import old_dmd as module

    return module


def dmd_forward(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    noisy: Tensor | None,
    sigma: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    layout: str,
    convention: Any,
    real_scale: float,
    fake_scale: float,
    magnitude: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, norms and gradient factors of a fusable convention.

    Args:
        student, fake, real, real_uncond, fake_uncond, noisy: ``[B, F, C, H, W]`` or ``[B, C, F, H, W]``, any strides.
        sigma: float32 ``[B, F]`` when the predictions are velocities, with ``noisy``.
        mask: bool like the latents. sample_weight: ``[B]``.
        layout: ``"bfchw"`` or ``"bcfhw"``.
        convention: a :class:`codmd.conventions.Convention` that is ``fusable``.
        real_scale, fake_scale: guidance scales in the cond form.
        magnitude: whether mean|g| is wanted; it costs nothing here.

    Returns:
        float32 values ``[2]`` (loss, mean|g|), norms (``[B]``, ``[1]`` or ``[B, segments]``), factors ``[B]``.
    """
    latents = student, fake, real, real_uncond, fake_uncond, noisy
    if elsewhere(student):
        with torch.cuda.device(student.device):
            return passes.forward(latents, sigma, mask, sample_weight, layout, convention, real_scale, fake_scale)
    return passes.forward(latents, sigma, mask, sample_weight, layout, convention, real_scale, fake_scale)


def dmd_backward(
    out: Tensor,
    grad: Tensor,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    sigma: Tensor | None,
    mask: Tensor | None,
    norms: Tensor,
    factors: Tensor,
    layout: str,
    convention: Any,
    real_scale: float,
    fake_scale: float,
) -> None:
    """Write upstream · factor · G(d, norm) into ``out``; 0 where nothing is selected."""
    _backward(
        out, (grad, None, None, None), (fake, real, real_uncond, fake_uncond), sigma, mask, None, norms, factors,
        None, None, layout, convention, real_scale, fake_scale, None, 0.0, 0.0,
    )  # fmt: skip


def _backward(out: Tensor, *arguments: Any) -> None:
    if elsewhere(out):
        with torch.cuda.device(out.device):
            passes.backward(out, *arguments)
    else:
        passes.backward(out, *arguments)


def codmd_forward(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    noisy: Tensor | None,
    sigma: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    layout: str,
    convention: Any,
    real_scale: float,
    fake_scale: float,
    magnitude: bool,
    frame_mask: Tensor | None,
    pool: Pool,
    temperature: float,
    frame_weight: float,
    batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`dmd_forward`, then (frame term [1], its gradient, rows to gather [B, 3K + 1] when ``batch``)."""
    inputs = (
        student, fake, real, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight, layout, convention,
        real_scale, fake_scale,
    )  # fmt: skip
    arguments = frame_mask, pool, temperature, frame_weight, batch
    if elsewhere(student):
        with torch.cuda.device(student.device):
            return codmd_forward(*inputs, magnitude, *arguments)
    try:
        return related.stages(inputs, *arguments)
    except Refused:
        return _reference().codmd_forward(*inputs, magnitude, *arguments)


def codmd_terms(
    inputs: tuple[Any, ...],
    frame_mask: Tensor | None,
    pool: Pool,
    temperature: float,
    relation_weight: float,
    batch_weight: float,
    frame_weight: float,
    separate: bool = True,
) -> related.Found | None:
    """The CoDMD loss of one process.

    Args:
        inputs: the arguments of :func:`dmd_forward` but ``magnitude``.
        frame_mask, pool, temperature, relation_weight, batch_weight, frame_weight: as in
            :func:`codmd.ops.codmd_loss`.
        separate: give every result its shape and memory of its own, as an operator must. Otherwise they are flat,
            padded pieces of one allocation, for :func:`codmd_backward` alone.

    Returns:
        float32 (total, dmd, batch, frame) ``[4]``; norms and factors as :func:`dmd_forward`; the gradients of the
        relation's terms as :func:`codmd.kernels.relation_forward`. None where the kernels do not take the sizes.
    """
    arguments = inputs, frame_mask, pool, temperature, relation_weight, batch_weight, frame_weight, separate
    if elsewhere(inputs[0]):
        with torch.cuda.device(inputs[0].device):
            return codmd_terms(*arguments)
    try:
        return related.terms(*arguments)
    except Refused:
        return None


def codmd_rows(
    inputs: tuple[Any, ...],
    frame_mask: Tensor | None,
    pool: Pool,
    temperature: float,
    frame_weight: float,
    ranks: int,
) -> related.Pending | None:
    """The stage of :func:`codmd_terms` before ``ranks`` processes gather their ``rows`` ``[B, 3K + 1]``."""
    arguments = inputs, frame_mask, pool, temperature, frame_weight, ranks
    if elsewhere(inputs[0]):
        with torch.cuda.device(inputs[0].device):
            return codmd_rows(*arguments)
    student, layout = inputs[0], inputs[9]
    assert pool is not None
    rows, columns = grid_of(pool)
    features = student.shape[2 if layout == "bfchw" else 1] * rows * columns
    if not takes_rows(ranks * len(student), 3 * features + 1):
        return None
    try:
        return related.pending(inputs, frame_mask, pool, temperature, frame_weight)
    except Refused:
        return None


def codmd_gathered(
    pending: related.Pending,
    gathered: Tensor,
    first_row: int,
    relation_weight: float,
    batch_weight: float,
    frame_weight: float,
    grad_scale: float,
) -> related.Found:
    """The stage after a gather: what :func:`codmd_terms` returns, the batch gradient times ``grad_scale``."""
    arguments = pending, gathered, first_row, relation_weight, batch_weight, frame_weight, grad_scale
    if elsewhere(gathered):
        with torch.cuda.device(gathered.device):
            return related.gathered_terms(*arguments)
    return related.gathered_terms(*arguments)


def codmd_backward(
    out: Tensor,
    grad_total: Tensor | None,
    grad_dmd: Tensor | None,
    grad_batch: Tensor | None,
    grad_frame: Tensor | None,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    sigma: Tensor | None,
    mask: Tensor | None,
    frame_mask: Tensor | None,
    norms: Tensor,
    factors: Tensor,
    frame_grad: Tensor,
    batch_grad: Tensor,
    layout: str,
    convention: Any,
    real_scale: float,
    fake_scale: float,
    pool: Pool,
    relation_weight: float,
    batch_weight: float,
    frame_weight: float,
) -> None:
    """Write the gradient of both terms into ``out``, rounded once."""
    assert pool is not None
    _backward(
        out, (grad_total, grad_dmd, grad_batch, grad_frame), (fake, real, real_uncond, fake_uncond), sigma, mask,
        frame_mask, norms, factors, frame_grad, batch_grad, layout, convention, real_scale, fake_scale, pool,
        relation_weight * batch_weight, relation_weight * frame_weight,
    )  # fmt: skip
