"""The relation of pooled features: allocations and launches.

What sizes, strides and options decide is in :mod:`.plans`, so that a call allocates, launches and returns. One launch
for up to 32 frames and samples, three beyond. The gradient is that of :mod:`..dmd.passes`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codmd.ops.contract import Found, Pending, Relation

from ..launch import current_stream, multiprocessors
from ..plans import PLANS, alignment, mask_key, number_arguments
from ..tickets import counters
from .plans import ForwardPlan, RowsPlan


def _run(call: Relation, gather: bool) -> tuple[Found, Tensor | None]:
    """What one process finds, and its rows if others wait for them."""
    student, real, fake, frame_mask, layout, pool, batch, frame, numbers = call
    assert pool is not None
    aligned = alignment(student, real, fake)
    shape, dtype, device = student.shape, student.dtype, student.device
    strides = student.stride(), real.stride(), fake.stride()
    key = (
        ForwardPlan, shape, strides, aligned, dtype, device, layout, pool, batch, frame, gather,
        mask_key(frame_mask), type(numbers),
    )  # fmt: skip
    plan = PLANS.get(key) or PLANS.of(
        key,
        lambda: ForwardPlan(
            shape, strides, layout, pool, dtype.itemsize, aligned is True, multiprocessors(device), batch, frame,
            gather, frame_mask,
        ),
    )  # fmt: skip
    empty, single = torch.empty, torch.float32
    terms = empty(3, dtype=single, device=device)
    workspace = empty(plan.workspace, dtype=single, device=device)
    frame_grad = empty(plan.frame_grad_shape, dtype=single, device=device)
    batch_grad = empty(plan.batch_grad_shape, dtype=single, device=device)
    rows = empty(plan.rows_shape, dtype=single, device=device) if gather else None
    stream = current_stream(student)
    tickets = counters(student, stream, plan.counters)
    scalars = number_arguments(numbers)
    plan.launch(
        stream, student, real, fake, frame_mask, terms, frame_grad, batch_grad, rows, workspace, tickets, *scalars
    )
    if plan.rows is not None:
        plan.rows.launch(
            stream, workspace, None, None, terms, frame_grad, batch_grad, workspace, scalars, 1.0,
            plan.rows_at, 0, plan.rows.batch,
        )  # fmt: skip
    return Found(terms, None, None, frame_grad, batch_grad), rows


def relation(call: Relation) -> Found:
    """The relation of one process: ∂(frame term)/∂φ ``[B, F, K]``, ∂(batch term)/∂ψ ``[B, K]``."""
    return _run(call, False)[0]


def features(call: Relation) -> Pending:
    """The stage before a gather."""
    found, rows = _run(call, True)
    assert rows is not None
    return Pending(rows, found)


def batch_relation(
    numbers: object, rows: Tensor, frame_term: Tensor, first: int, count: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The batch relation of gathered rows: terms ``[3]``, ``scale``·gradient of ``count`` rows from ``first`` on."""
    vectors, row = rows.shape
    device, features = rows.device, (row - 1) // 3
    key = (RowsPlan, 0, 1, vectors, features, False, device, type(numbers))  # fmt: skip
    plan = PLANS.get(key) or PLANS.of(key, lambda: RowsPlan(0, 1, vectors, features))
    terms = torch.empty(3, dtype=torch.float32, device=device)
    grad = torch.empty((count, features), dtype=torch.float32, device=device)
    workspace = torch.empty(plan.room, dtype=torch.float32, device=device)
    plan.launch(
        current_stream(rows), rows, rows, frame_term, terms, grad, grad, workspace, number_arguments(numbers), scale,
        (0, 0), first, count,
    )  # fmt: skip
    return terms, grad
