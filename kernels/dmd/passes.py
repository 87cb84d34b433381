"""The DMD loss, alone or with the pooled relation, and gradients: allocations and launches.

One process: up to 32 frames and samples one launch finds everything, down to the total; beyond, two more add the
relations. Several processes: the first launch leaves the rows to gather, the last two compute what is left, frame
relations beyond 32 frames included. A decoupled loss takes one launch more after the first, which reads the predictions
again for the value. A gradient is one launch. What sizes, strides and options decide is in :mod:`.plans`, so that a
call allocates, launches and returns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codmd.ops.contract import Call, Found, Objective, Pending, Upstream

from ..launch import current_stream
from ..plans import PLANS, alignment, details, mask_key, number_arguments
from ..pooled.plans import RowsPlan
from ..tickets import counters
from .plans import TERMS, GradientPlan, MomentsPlan


class Kept(NamedTuple):
    """What a forward pass leaves until the rows are gathered."""

    plan: MomentsPlan
    workspace: Tensor
    found: Found


def _stride(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def _first(call: Objective, gather: bool, separate: bool) -> tuple[Kept, Tensor | None]:
    """The launches that read latents, and the rows to ``gather``."""
    (
        student, real, fake, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight, frame_mask, second, guided,
        layout, rule, related, pool, batch, frame, numbers,
    ) = call  # fmt: skip
    device, single = student.device, torch.float32
    key = (
        MomentsPlan, student.shape, student.dtype, device, student.stride(), real.stride(), fake.stride(),
        _stride(real_uncond), _stride(fake_uncond), _stride(noisy), _stride(second), _stride(guided),
        alignment(student, real, fake, real_uncond, fake_uncond, noisy, second, guided),
        details(sigma, mask, sample_weight),
        mask_key(frame_mask), layout, rule.encoded, related, pool, batch, frame, gather, type(numbers),
    )  # fmt: skip
    plan = PLANS.get(key) or PLANS.of(key, lambda: MomentsPlan(call, gather))
    rows = torch.empty(plan.rows_shape, dtype=single, device=device) if gather else None
    if separate:
        shapes = plan.norm_shape, plan.samples, plan.frame_grad_shape, plan.batch_grad_shape, plan.workspace.size, TERMS
        pieces = tuple(torch.empty(shape, dtype=single, device=device) for shape in shapes)
    else:
        pieces = torch.empty(plan.room, dtype=single, device=device).unsafe_split_with_sizes(plan.pieces)
    norms, factors, frame_grad, batch_grad, workspace, terms = pieces
    stream = current_stream(student)
    plan.launch(
        stream, student, real, fake, real_uncond, fake_uncond, noisy, second, sigma, mask, sample_weight, frame_mask,
        terms, norms, factors, frame_grad, batch_grad, rows, workspace, counters(student, stream, plan.counters),
        *number_arguments(numbers),
    )  # fmt: skip
    if plan.value is not None:
        plan.value.launch(
            stream, real, fake, fake_uncond, second, guided, mask, sample_weight, norms, terms, factors, workspace,
            torch.empty(plan.value.room, dtype=single, device=device), counters(student, stream, plan.counters),
            *number_arguments(numbers),
        )  # fmt: skip
    return Kept(plan, workspace, Found(terms, norms, factors, frame_grad, batch_grad)), rows


def with_relations(call: Objective, kept: Kept) -> Found:
    """The launches after the first of one process, where its relations need them."""
    plan, workspace, found = kept
    rows = plan.rows
    if rows is not None:
        rows.launch(
            current_stream(call.student), workspace, None, None, found.terms, found.frame_grad, found.batch_grad,
            workspace, number_arguments(call.numbers), 1.0, plan.rows_at, 0, rows.batch,
        )  # fmt: skip
    return found


def objective(call: Objective, separate: bool) -> Found:
    """The loss of one process; unless ``separate``, flat, padded pieces of one allocation: less host time."""
    return with_relations(call, _first(call, False, separate)[0])


def features(call: Objective) -> Pending:
    """The stage before a gather."""
    kept, rows = _first(call, True, True)
    assert rows is not None
    return Pending(rows, kept.found, kept)


def gathered(call: Objective, pending: Pending, rows: Tensor, first: int, scale: float) -> Found:
    """The stage after a gather; ``scale`` multiplies the batch term's gradient of this process's rows."""
    assert isinstance(pending.state, Kept)
    plan, source, found = pending.state
    vectors, row = rows.shape
    device, count, features = rows.device, len(pending.rows), (row - 1) // 3
    samples, frames = (0, 1) if plan.rows is None else plan.rows.relations
    key = (RowsPlan, samples, frames, vectors, features, True, device, type(call.numbers))  # fmt: skip
    second = PLANS.get(key) or PLANS.of(key, lambda: RowsPlan(samples, frames, vectors, features, True))
    batch_grad = torch.empty((count, features), dtype=torch.float32, device=device)
    workspace = torch.empty(second.room, dtype=torch.float32, device=device)
    second.launch(
        current_stream(rows), source, rows, None, found.terms, found.frame_grad, batch_grad, workspace,
        number_arguments(call.numbers), scale, (0, 0), first, count,
    )  # fmt: skip
    return found._replace(batch_grad=batch_grad)


def relation_gradient(out: Tensor, upstream: Upstream, call: Call, found: Found) -> None:
    """Write the gradient of the pooled relation into ``out``."""
    total, _, batch, frame = upstream
    layout, pool, frame_mask, numbers = call.layout, call.pool, call.frame_mask, call.numbers
    frame_grad, batch_grad = _wanted(found.frame_grad, total, frame), _wanted(found.batch_grad, total, batch)
    assert pool is not None
    key = (
        relation_gradient, out.shape, out.stride(), out.data_ptr() % 16, out.dtype, out.device, layout, pool,
        mask_key(frame_mask), frame_grad is None, batch_grad is None, None if total is None else total.dtype,
        None if batch is None else batch.dtype, None if frame is None else frame.dtype, type(numbers),
    )  # fmt: skip
    plan = PLANS.get(key) or PLANS.of(
        key, lambda: GradientPlan((out, *[None] * 6), None, None, frame_mask, layout, pool, None)
    )
    plan.launch(
        current_stream(out), out, None, None, None, None, None, None, None, None, frame_mask, None, None, total, None,
        batch, frame, frame_grad, batch_grad, *number_arguments(numbers),
    )  # fmt: skip


def gradient(out: Tensor, upstream: Upstream, call: Objective, found: Found) -> None:
    """Write the gradient of all terms into ``out``, rounded once."""
    total, dmd, batch, frame = upstream
    if total is None and dmd is None:
        relation_gradient(out, upstream, call, found)
        return
    frame_grad, batch_grad = _wanted(found.frame_grad, total, frame), _wanted(found.batch_grad, total, batch)
    (
        _, real, fake, real_uncond, fake_uncond, _, sigma, mask, _, frame_mask, second, guided, layout, rule, related,
        pool, _, _, numbers,
    ) = call  # fmt: skip
    key = (
        GradientPlan, out.shape, out.dtype, out.device, out.stride(), real.stride(), fake.stride(),
        _stride(real_uncond), _stride(fake_uncond), _stride(second), _stride(guided),
        alignment(out, real, fake, real_uncond, fake_uncond, second, guided),
        details(sigma, mask), mask_key(frame_mask), layout, rule.encoded, pool, related,
        frame_grad is None, batch_grad is None, None if total is None else total.dtype,
        None if dmd is None else dmd.dtype, None if batch is None else batch.dtype,
        None if frame is None else frame.dtype, type(numbers),
    )  # fmt: skip
    plan = PLANS.get(key) or PLANS.of(
        key,
        lambda: GradientPlan(
            (out, real, fake, real_uncond, fake_uncond, second, guided), sigma, mask, frame_mask, layout,
            pool if related else (1, 1), rule,
        ),
    )  # fmt: skip
    plan.launch(
        current_stream(out), out, real, fake, real_uncond, fake_uncond, second, guided, sigma, mask, frame_mask,
        found.norms, found.factors, total, dmd, batch, frame, frame_grad, batch_grad, *number_arguments(numbers),
    )  # fmt: skip


def _wanted(term_grad: Tensor, total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """The features' gradient of a term that is computed and has an upstream gradient."""
    return None if not term_grad.numel() or (total is None and term is None) else term_grad
