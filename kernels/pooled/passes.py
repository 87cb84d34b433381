"""Relation loss of pooled features: allocations and launches.

What sizes, strides and options decide is in :mod:`.plans`, so that a call allocates, launches and
returns. One forward launch for up to 32 frames and samples, two beyond; one backward launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import Launcher, alignment, counters, current_stream, mask_key, multiprocessors
from .plans import ForwardPlan, RowsPlan, backward_launch

_forward_plans: dict[Any, ForwardPlan] = {}
_rows_plans: dict[Any, RowsPlan] = {}
_backward_plans: dict[Any, Launcher] = {}


def _run_forward(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    pool: str | tuple[int, int],
    temperature: float,
    batch_weight: float,
    frame_weight: float,
    gather: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    aligned = alignment(student, real, fake)
    shape, dtype, device = student.shape, student.dtype, student.device
    key = (
        shape, student.stride(), real.stride(), fake.stride(), aligned, dtype, device, layout, pool, gather,
        batch_weight != 0, frame_weight != 0, mask_key(frame_mask),
    )  # fmt: skip
    plan = _forward_plans.get(key)
    if plan is None:
        plan = _forward_plans[key] = ForwardPlan(
            shape, key[1:4], layout, pool, dtype.itemsize, aligned is True, multiprocessors(device), *key[10:12],
            gather, frame_mask,
        )  # fmt: skip
    empty, single = torch.empty, torch.float32
    terms = empty(3, dtype=single, device=device)
    workspace = empty(plan.workspace, dtype=single, device=device)
    frame_grad = empty(plan.frame_grad_shape, dtype=single, device=device)
    batch_grad = empty(plan.batch_grad_shape, dtype=single, device=device)
    pooled = empty(plan.pooled_shape, dtype=single, device=device) if gather else None
    stream = current_stream(student)
    tickets = counters(student, stream, plan.counters)
    scalars = float(temperature), float(batch_weight), float(frame_weight)
    plan.pool(
        stream, student, real, fake, frame_mask, terms, frame_grad, batch_grad, pooled, workspace, tickets, *scalars,
    )  # fmt: skip
    if plan.rows is not None:
        plan.rows.launch(
            stream, workspace, None, None, terms, frame_grad, batch_grad, workspace, tickets,
            plan.pooled_at, plan.shares_at, *plan.rows.sizes, 0, plan.rows.sizes[-1], *scalars, 0.0, 1.0,
        )  # fmt: skip
    return terms, frame_grad, batch_grad, pooled


def relation_forward(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    pool: str | tuple[int, int],
    temperature: float,
    batch_weight: float,
    frame_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 terms ``[3]``, ∂(frame term)/∂φ ``[B, F, K]`` and ∂(batch term)/∂ψ ``[B, K]`` of one process."""
    return _run_forward(
        student, real, fake, frame_mask, layout, pool, temperature, batch_weight, frame_weight, False
    )[:3]  # fmt: skip


def relation_frames(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    pool: str | tuple[int, int],
    temperature: float,
    frame_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stage before a gather: frame term ``[1]``, its gradient, and ``[B, 3K + 1]``: ψ_x, ψ_r, ψ_d, valid frames."""
    terms, frame_grad, _, pooled = _run_forward(
        student, real, fake, frame_mask, layout, pool, temperature, 0.0, frame_weight, True
    )
    assert pooled is not None
    return terms[2:], frame_grad, pooled


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
    """The stage after a gather: float32 terms ``[3]`` and ``grad_scale``·∂(batch term)/∂ψ of the caller's rows."""
    device = pooled.device
    stream = current_stream(pooled)
    vectors, row = pooled.shape
    features = (row - 1) // 3
    key = (vectors, row, rows, first_row, device)
    plan = _rows_plans.get(key)
    if plan is None:
        plan = _rows_plans[key] = RowsPlan(0, 1, vectors, features)
    terms = torch.empty(3, dtype=torch.float32, device=device)
    grad = torch.empty((rows, features), dtype=torch.float32, device=device)
    workspace = torch.empty(plan.room, dtype=torch.float32, device=device)
    plan.launch(
        stream, pooled, None, frame, terms, grad, grad, workspace, counters(pooled, stream, plan.counters),
        0, 0, *plan.sizes, first_row, rows,
        float(temperature), float(batch_weight), float(frame_weight), 0.0, float(grad_scale),
    )  # fmt: skip
    return terms, grad


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
    pool: str | tuple[int, int],
    batch_weight: float,
    frame_weight: float,
) -> None:
    """Write the gradient of the student's latents into ``out``; ``student`` itself is not read."""
    has_frames, has_batch = frame_grad.numel() > 0, batch_grad.numel() > 0
    key = (
        out.shape, out.stride(), out.data_ptr() % 16 == 0, out.dtype, out.device, layout, pool, mask_key(frame_mask),
        has_frames, has_batch,
        grad_total is None or grad_total.dtype, grad_batch is None or grad_batch.dtype,
        grad_frame is None or grad_frame.dtype,
    )  # fmt: skip
    launch = _backward_plans.get(key)
    if launch is None:
        launch = _backward_plans[key] = backward_launch(out, layout, pool, has_batch, has_frames, frame_mask)
    launch(
        current_stream(out), out, frame_mask, grad_total, grad_batch, grad_frame,
        frame_grad if has_frames else None, batch_grad if has_batch else None,
        float(batch_weight), float(frame_weight),
    )  # fmt: skip
