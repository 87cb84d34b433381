"""The DMD and CoDMD operators' entry to the kernels, on the device of their tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import dmd
from .relation import Pool, device_of, reference_dmd, refusal_of


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
    with device_of(student):
        found = dmd._forward(latents, sigma, mask, sample_weight, layout, convention, real_scale, fake_scale)
    return found[0], found[1], found[2]


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
    with device_of(out):
        dmd._backward(
            out, (grad, None, None, None), (fake, real, real_uncond, fake_uncond), sigma, mask, None, norms, factors,
            None, None, layout, convention, real_scale, fake_scale, None, 0.0, 0.0,
        )  # fmt: skip


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
    latents = student, fake, real, real_uncond, fake_uncond, noisy
    tail = sigma, mask, sample_weight, layout, convention, real_scale, fake_scale
    if refusal_of(student, layout, pool, batch, frame_weight != 0):
        return reference_dmd().codmd_forward(
            *latents, *tail, magnitude, frame_mask, pool, temperature, frame_weight, batch
        )
    assert pool is not None
    with device_of(student):
        values, norms, factors, frame, frame_grad, pooled = dmd._forward(
            latents, *tail, frame_mask, pool, temperature, frame_weight, batch
        )
    return values, norms, factors, frame, frame_grad, values.new_empty(0) if pooled is None else pooled


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
    with device_of(out):
        dmd._backward(
            out, (grad_total, grad_dmd, grad_batch, grad_frame), (fake, real, real_uncond, fake_uncond), sigma, mask,
            frame_mask, norms, factors, frame_grad, batch_grad, layout, convention, real_scale, fake_scale, pool,
            relation_weight * batch_weight, relation_weight * frame_weight,
        )  # fmt: skip
