"""Launches of the DMD and CoDMD passes: one forward (relations of more than 32 vectors take a second), one backward.

What sizes, strides and options decide is in :mod:`.plans`, so that a call allocates, launches and returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import alignment, counters, current_stream
from .plans import GradientPlan, MomentsPlan, Relation


def _stride(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def _key(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...] | None:
    for tensor in tensors:
        if tensor is not None:
            break
    else:
        return None
    return tuple(None if t is None else (t.stride(), t.data_ptr() % 16 == 0, t.dtype) for t in tensors)


_plans: dict[Any, Any] = {}


def forward_plan(
    latents: tuple[Any, ...],
    others: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    layout: str,
    convention: Any,
    relation: Relation | None,
) -> MomentsPlan:
    """The plan of a forward pass; ``others`` are sigma, mask, sample_weight and frame_mask."""
    student, fake, real, real_uncond, fake_uncond, noisy = latents
    key = (
        student.shape, student.dtype, student.device, student.stride(), fake.stride(), real.stride(),
        None if real_uncond is None else real_uncond.stride(), None if fake_uncond is None else fake_uncond.stride(),
        None if noisy is None else noisy.stride(), alignment(*latents), _key(others), layout, convention.encoded,
        relation,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = MomentsPlan(latents, others, layout, convention, relation)
    return plan


def forward(
    latents: tuple[Any, ...],
    sigma: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    layout: str,
    convention: Any,
    real_scale: float,
    fake_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and mean|g| ``[2]``, norms and factors of the DMD loss."""
    plan = forward_plan(latents, (sigma, mask, sample_weight, None), layout, convention, None)
    student = latents[0]
    device, empty, single = student.device, torch.empty, torch.float32
    values = empty(2, dtype=single, device=device)
    norms = empty(plan.norm_shape, dtype=single, device=device)
    factors = empty(plan.samples, dtype=single, device=device)
    workspace = empty(plan.workspace, dtype=single, device=device)
    stream = current_stream(student)
    plan.launch(
        stream, *latents, sigma, mask, sample_weight, None, values, norms, factors, None, None, None, None,
        workspace, counters(student, stream, plan.counters), float(real_scale), float(fake_scale), 1.0, 0.0, 0.0, 0.0,
    )  # fmt: skip
    return values, norms, factors


def backward(
    out: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    scores: tuple[Any, Any, Any, Any],
    sigma: Tensor | None,
    mask: Tensor | None,
    frame_mask: Tensor | None,
    norms: Tensor,
    factors: Tensor,
    frame_grad: Tensor | None,
    batch_grad: Tensor | None,
    layout: str,
    convention: Any,
    real_scale: float,
    fake_scale: float,
    pool: str | tuple[int, int] | None,
    batch_weight: float,
    frame_weight: float,
) -> None:
    """Write the gradient of both terms into ``out``; ``grads`` are those of total, dmd, batch and frame."""
    grad_total, grad_dmd, grad_batch, grad_frame = grads
    dmd = grad_total is not None or grad_dmd is not None
    if frame_grad is not None and (not frame_grad.numel() or (grad_total is None and grad_frame is None)):
        frame_grad = None
    if batch_grad is not None and (not batch_grad.numel() or (grad_total is None and grad_batch is None)):
        batch_grad = None
    fake, real, real_uncond, fake_uncond = scores
    others = sigma, mask, frame_mask
    key = (
        out.shape, out.dtype, out.device, out.stride(), fake.stride(), real.stride(), _stride(real_uncond),
        _stride(fake_uncond), alignment(out, *scores), _key(others), layout,
        convention.encoded, pool, dmd, frame_grad is None, batch_grad is None,
        grad_total is None or grad_total.dtype, grad_dmd is None or grad_dmd.dtype,
        grad_batch is None or grad_batch.dtype, grad_frame is None or grad_frame.dtype,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = GradientPlan((out, *scores), others, layout, convention, pool, dmd)
    plan.launch(
        current_stream(out), out, *scores, sigma, mask, frame_mask, norms, factors, *grads, frame_grad, batch_grad,
        float(real_scale), float(fake_scale), float(batch_weight), float(frame_weight),
    )  # fmt: skip
