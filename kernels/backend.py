"""The Triton kernels as a backend of the operators, see :class:`codmd.ops.contract.Backend`.

Every call runs on the device of its tensors. Sizes beyond the kernels go to the reference, with a logged reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from codmd.ops.backends import reference
from codmd.ops.contract import Attention, Call, Found, Objective, Pending, Relation, Upstream

from . import load_error

if load_error is not None:
    raise ImportError(load_error)

from .attention import passes as attention
from .dmd import passes as dmd
from .launch import elsewhere
from .limits import LARGEST_TABLE, MOST_POOLED, MOST_WHOLE, Refused, log
from .pooled import passes as pooled
from .whole import passes as whole

__all__ = [
    "attention_jvp", "features", "gathered", "gradient", "load_error", "objective", "relation", "whole_batch_grad",
    "whole_gradient",
]  # fmt: skip

LONG_FEATURES = 2048
"""Features from which a gathered batch relation goes through its Gram matrices."""

Function = TypeVar("Function", bound=Callable[..., Any])


def _served(function: Function) -> Function:
    """``function`` of a call on the device of its tensors, or the reference's where the sizes are refused."""
    instead = getattr(reference, function.__name__)

    @functools.wraps(function)
    def run(call: Any, *rest: Any) -> Any:
        if elsewhere(call[0]):
            with torch.cuda.device(call[0].device):
                return run(call, *rest)
        try:
            return function(call, *rest)
        except Refused:
            return instead(call, *rest)

    return run  # type: ignore[return-value]


@_served
def attention_jvp(call: Attention) -> tuple[Tensor, Tensor]:
    return attention.attention_jvp(call)


@_served
def relation(call: Relation) -> Found:
    return whole.relation(call) if call.pool is None else pooled.relation(call)


@_served
def objective(call: Objective, separate: bool) -> Found:
    return dmd.objective(call, separate)


@_served
def features(call: Call) -> Pending:
    if isinstance(call, Objective):
        return dmd.features(call)
    return whole.features(call) if call.pool is None else pooled.features(call)


@_served
def gathered(call: Call, pending: Pending, rows: Tensor, first: int, scale: float) -> Found:
    found = pending.partial
    vectors, row = rows.shape
    long = row > 3 * LONG_FEATURES and vectors <= MOST_WHOLE
    refused = not long and (vectors > MOST_POOLED or vectors * row >= LARGEST_TABLE)
    if isinstance(call, Objective) and isinstance(pending.state, dmd.Kept):
        if not long and not refused:
            return dmd.gathered(call, pending, rows, first, scale)
        found = dmd.with_relations(call, pending.state)
    if refused:
        log(f"{vectors} gathered rows of {row}")
        return reference.gathered(call, Pending(pending.rows, found), rows, first, scale)
    batch_relation = whole.batch_relation if long else pooled.batch_relation
    frame_term = found.terms[2:] if isinstance(call, Relation) else found.terms[3:]
    terms, batch_grad = batch_relation(call.numbers, rows, frame_term, first, len(pending.rows), scale)
    if isinstance(call, Objective):
        _, dmd_loss, _, _, magnitude = found.terms
        total = dmd_loss + call.numbers[3] * terms[0]
        terms = torch.stack([total, dmd_loss, terms[1], terms[2], magnitude])
    return found._replace(terms=terms, batch_grad=batch_grad)


def gradient(out: Tensor, upstream: Upstream, call: Call, found: Found) -> None:
    if elsewhere(out):
        with torch.cuda.device(out.device):
            return gradient(out, upstream, call, found)
    if isinstance(call, Objective):
        return dmd.gradient(out, upstream, call, found)
    return dmd.relation_gradient(out, upstream, call, found)


def whole_gradient(out: Tensor, upstream: Upstream, call: Relation, found: Found) -> None:
    if elsewhere(out):
        with torch.cuda.device(out.device):
            return whole_gradient(out, upstream, call, found)
    return whole.gradient(out, upstream, call, found)


def whole_batch_grad(samples: int, frames: int, features: int) -> tuple[int, ...]:
    return (1, samples, samples) if whole.keeps_matrix(samples, frames) else (samples, features)
