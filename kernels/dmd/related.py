"""CoDMD forward: the DMD moments and the relation's features in one launch, rows of large relations in a second.

One process: up to 32 frames and samples the first launch does everything, down to the total. Several processes: the
first launch leaves the rows to gather, the second computes what is left, frame relations beyond 32 frames included.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import counters, current_stream
from ..limits import Pool
from ..pooled.plans import RowsPlan
from .passes import forward_plan
from .plans import MomentsPlan, Relation

Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Terms [4] = (total, dmd, batch, frame), norms, factors, frame gradient, batch gradient."""


relation_of = functools.cache(Relation)


class Pending(NamedTuple):
    """A forward pass that waits for the ``rows`` ``[B, 3K + 1]`` of other processes."""

    rows: Tensor
    plan: MomentsPlan
    workspace: Tensor
    terms: Tensor
    norms: Tensor
    factors: Tensor
    frame_grad: Tensor
    temperature: float


def _first(
    inputs: tuple[Any, ...],
    frame_mask: Tensor | None,
    relation: Relation,
    temperature: float,
    weights: tuple[float, float, float],
    values: Tensor | None,
    finish: bool,
    separate: bool = True,
) -> tuple[MomentsPlan, Found, Tensor, Tensor | None]:
    """The first launch and, to ``finish``, the second: (plan, what was found, workspace, rows to gather).

    Not ``separate``, what was found are flat, padded pieces of one allocation: less host time.
    """
    sigma, mask, sample_weight, layout, convention, real_scale, fake_scale = inputs[6:]
    latents = inputs[:6]
    plan = forward_plan(latents, (sigma, mask, sample_weight, frame_mask), layout, convention, relation)
    student = latents[0]
    device, empty, single = student.device, torch.empty, torch.float32
    if separate:
        terms = empty(4, dtype=single, device=device)
        norms = empty(plan.norm_shape, dtype=single, device=device)
        factors = empty(plan.samples, dtype=single, device=device)
        frame_grad = empty(plan.frame_grad_shape, dtype=single, device=device)
        batch_grad = empty(plan.batch_grad_shape, dtype=single, device=device)
        workspace = empty(plan.workspace, dtype=single, device=device)
    else:
        memory = empty(plan.room, dtype=single, device=device)
        terms, norms, factors, frame_grad, batch_grad, workspace = memory.unsafe_split_with_sizes(plan.pieces)
    rows = empty(plan.pooled_shape, dtype=single, device=device) if relation.gather else None
    stream = current_stream(student)
    tickets = counters(student, stream, plan.counters)
    plan.launch(
        stream, *latents, sigma, mask, sample_weight, frame_mask, values, norms, factors, terms, frame_grad,
        batch_grad, rows, workspace, tickets, float(real_scale), float(fake_scale), temperature, *weights,
    )  # fmt: skip
    if finish and plan.rows is not None:
        plan.rows.launch(
            stream, workspace, None, None, terms, frame_grad, batch_grad, workspace, tickets, plan.pooled_at,
            plan.shares_at, *plan.rows.sizes, 0, plan.rows.sizes[-1], temperature, weights[1], weights[2], weights[0],
            1.0,
        )  # fmt: skip
    return plan, (terms, norms, factors, frame_grad, batch_grad), workspace, rows


def terms(
    inputs: tuple[Any, ...],
    frame_mask: Tensor | None,
    pool: Pool,
    temperature: float,
    relation_weight: float,
    batch_weight: float,
    frame_weight: float,
    separate: bool,
) -> Found:
    """The loss of one process, in one launch or two."""
    assert pool is not None
    relation = relation_of(pool, batch_weight != 0, frame_weight != 0, False)
    weights = float(relation_weight), float(batch_weight), float(frame_weight)
    return _first(inputs, frame_mask, relation, float(temperature), weights, None, True, separate)[1]


def stages(
    inputs: tuple[Any, ...],
    frame_mask: Tensor | None,
    pool: Pool,
    temperature: float,
    frame_weight: float,
    batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values [2], norms, factors, frame term [1], its gradient, rows to gather (empty unless ``batch``)."""
    assert pool is not None
    relation = Relation(pool, batch, frame_weight != 0, batch)
    values = torch.empty(2, dtype=torch.float32, device=inputs[0].device)
    _, found, _, rows = _first(inputs, frame_mask, relation, float(temperature), (0.0, 0.0, 0.0), values, True)
    terms, norms, factors, frame_grad, batch_grad = found
    return values, norms, factors, terms[3:], frame_grad, batch_grad if rows is None else rows


def pending(
    inputs: tuple[Any, ...], frame_mask: Tensor | None, pool: Pool, temperature: float, frame_weight: float
) -> Pending:
    """The first launch before a gather."""
    assert pool is not None
    relation = Relation(pool, True, frame_weight != 0, True)
    temperature = float(temperature)
    plan, found, workspace, rows = _first(inputs, frame_mask, relation, temperature, (0.0, 0.0, 0.0), None, False)
    assert rows is not None
    return Pending(rows, plan, workspace, *found[:4], temperature)


_gathered_plans: dict[Any, RowsPlan] = {}


def gathered_terms(
    left: Pending,
    gathered: Tensor,
    first_row: int,
    relation_weight: float,
    batch_weight: float,
    frame_weight: float,
    grad_scale: float,
) -> Found:
    """The second launch, after a gather; the batch gradient of the caller's rows is times ``grad_scale``."""
    plan = left.plan
    vectors, row = gathered.shape
    features = (row - 1) // 3
    samples, frames = (0, 1) if plan.rows is None else plan.rows.sizes[:2]
    key = samples, frames, vectors, features, gathered.device
    rows = _gathered_plans.get(key)
    if rows is None:
        rows = _gathered_plans[key] = RowsPlan(samples, frames, vectors, features, True)
    device, empty, single = gathered.device, torch.empty, torch.float32
    batch_grad = empty((len(left.rows), features), dtype=single, device=device)
    workspace = empty(rows.room, dtype=single, device=device)
    stream = current_stream(gathered)
    rows.launch(
        stream, left.workspace, gathered, None, left.terms, left.frame_grad, batch_grad, workspace,
        counters(gathered, stream, rows.counters), 0, 0, *rows.sizes, first_row, len(left.rows), left.temperature,
        float(batch_weight), float(frame_weight), float(relation_weight), float(grad_scale),
    )  # fmt: skip
    return left.terms, left.norms, left.factors, left.frame_grad, batch_grad
