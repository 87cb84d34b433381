"""The reference as a backend: the equations of :mod:`codmd.reference`, and explicit gradients of a few features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from codmd import reference
from codmd.ops.backends import moments
from codmd.ops.backends.moments import numbers_of
from codmd.ops.contract import Attention, Call, Found, Grid, Objective, Pending, Relation, Upstream
from codmd.ops.shapes import empty_attention
from codmd.reference.relation import Pool

load_error: str | None = None

MOST_SCORES = 1 << 24
"""Scores of attention that a chunk of queries may have, unless a single query has more."""

Function = TypeVar("Function", bound=Callable[..., Any])
Features = tuple[Tensor, Tensor, Tensor]
"""Of student, real and fake - real."""


def _plain(function: Function) -> Function:
    """Run without autograd and outside autocast, whatever surrounds the call."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        first = next(a for a in arguments if isinstance(a, (Tensor, Relation, Objective, Attention)))
        tensor = first if isinstance(first, Tensor) else first[0]
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            return function(*arguments, **keywords)

    return wrapped  # type: ignore[return-value]


@_plain
def attention_jvp(call: Attention) -> tuple[Tensor, Tensor]:
    """Attention and its tangent by chunks of queries, so that scores take O(chunk · M) memory; float32 at least."""
    q, k, v, q_dot, k_dot, v_dot = call
    dtype = reference.compute_dtype(q.dtype)
    out, out_dot = empty_attention(q)
    keys, values = k.to(dtype), v.to(dtype)
    keys_dot, values_dot = (t if t is None else t.to(dtype) for t in (k_dot, v_dot))
    rows = max(1, MOST_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], rows):
        chunk = slice(first, first + rows)
        part, part_dot = q[:, :, chunk].to(dtype), None if q_dot is None else q_dot[:, :, chunk].to(dtype)
        out[:, :, chunk], out_dot[:, :, chunk] = reference.attention_jvp(
            part, keys, values, part_dot, keys_dot, values_dot
        )
    return out, out_dot


@_plain
def relation(call: Relation) -> Found:
    """The relation term of one process."""
    features = frame_features(call)
    frame, frame_grad = _frame_term(call, features)
    batch, batch_grad = frame.new_zeros(()), frame.new_empty(0)
    if call.batch and len(call.student) > 1:
        batch, batch_grad = _batch_term(_rows(call, features), numbers_of(call).temperature)
    return Found(_relation_terms(call, batch, frame), None, None, frame_grad, batch_grad)


@_plain
def objective(call: Objective, separate: bool) -> Found:
    """The DMD loss, and the relation where ``related``, of one process."""
    latents = moments.latents_of(call)
    loss, magnitude, norms, factors = moments.loss(latents, call)
    batch = frame = loss.new_zeros(())
    batch_grad, frame_grad = loss.new_empty(0), loss.new_empty(0)
    if call.related:
        features = _pooled(call, latents)
        frame, frame_grad = _frame_term(call, features)
        if call.batch and len(call.student) > 1:
            batch, batch_grad = _batch_term(_rows(call, features), numbers_of(call).temperature)
    return Found(_objective_terms(call, loss, batch, frame, magnitude), norms, factors, frame_grad, batch_grad)


@_plain
def features(call: Call) -> Pending:
    """The stage before a gather: everything but the batch term."""
    if isinstance(call, Relation):
        features = frame_features(call)
        frame, frame_grad = _frame_term(call, features)
        terms, norms, factors = _relation_terms(call, torch.zeros_like(frame), frame), None, None
    else:
        latents = moments.latents_of(call)
        features = _pooled(call, latents)
        frame, frame_grad = _frame_term(call, features)
        loss, magnitude, norms, factors = moments.loss(latents, call)
        terms = _objective_terms(call, loss, torch.zeros_like(frame), frame, magnitude)
    return Pending(_rows(call, features), Found(terms, norms, factors, frame_grad, frame.new_empty(0)))


@_plain
def gathered(call: Call, pending: Pending, rows: Tensor, first: int, scale: float) -> Found:
    """The stage after a gather: the batch term of all rows, the gradient of this process's."""
    batch, batch_grad = _batch_term(rows, numbers_of(call).temperature)
    own = scale * batch_grad[first : first + len(pending.rows)]
    if isinstance(call, Relation):
        _, _, frame = pending.partial.terms
        terms = _relation_terms(call, batch, frame)
    else:
        _, loss, _, frame, magnitude = pending.partial.terms
        terms = _objective_terms(call, loss, batch, frame, magnitude)
    return pending.partial._replace(terms=terms, batch_grad=own)


@_plain
def gradient(out: Tensor, upstream: Upstream, call: Call, found: Found) -> None:
    """Write the gradient of the student's latents into ``out``, rounded once."""
    dtype = reference.compute_dtype(out.dtype)
    total = torch.zeros_like(reference.to_bfchw(out, call.layout), dtype=dtype)
    related = isinstance(call, Relation) or call.related
    if related:
        total += _relation_gradient(total, upstream, call, found)
    if isinstance(call, Objective):
        scale = _scale(upstream.total, 1.0, upstream.dmd)
        if scale is not None:
            total += moments.gradient(call, found, scale)
    reference.to_bfchw(out, call.layout).copy_(total)


@_plain
def whole_gradient(out: Tensor, upstream: Upstream, call: Relation, found: Found) -> None:
    """The same where every pixel is a feature."""
    x = reference.frame_features(call.student, call.layout, None)
    frame_grad = found.frame_grad
    if frame_grad.numel():
        frame_grad = frame_grad @ (x if call.frame_mask is None else torch.where(call.frame_mask[..., None], x, 0))
    grad = reference.to_bfchw(out, call.layout)
    total = torch.zeros_like(grad, dtype=x.dtype)
    total += _relation_gradient(total, upstream, call, found._replace(frame_grad=frame_grad))
    grad.copy_(total)


def whole_batch_grad(samples: int, frames: int, features: int) -> tuple[int, ...]:
    """Shape of ``batch_grad`` for ``pool=None`` in one process."""
    return samples, features


def _pool(grid: Grid | None) -> Pool:
    return "mean" if grid == (1, 1) else grid


def frame_features(call: Relation) -> Features:
    dtype = reference.compute_dtype(call.student.dtype)
    latents = call.student, call.real, reference.difference_of(call.real.to(dtype), call.fake.to(dtype))
    x, r, d = (reference.frame_features(v, call.layout, _pool(call.pool)) for v in latents)
    return x, r, d


def _pooled(call: Objective, latents: moments.Latents) -> Features:
    difference = reference.kept_apart(latents.real, latents.difference, moments.guided_fake(call) == 0)
    pooled = latents.student, latents.real, difference
    x, r, d = (reference.frame_features(v, "bfchw", _pool(call.pool)) for v in pooled)
    return x, r, d


def term(features: Features, temperature: Any, valid: Tensor | None, matrix: bool) -> tuple[Tensor, Tensor]:
    """The mean over leading indices of the divergence, and its gradient ``[..., N, K]``, or M ``[..., N, N]``."""
    student, real, difference = features
    samples = student.shape[:-2].numel()
    rows: Any = student.shape[-2]
    if valid is not None:
        valid = valid & (valid.sum(-1, keepdim=True) >= 2)
        student, real, difference = (torch.where(valid[..., None], v, 0) for v in features)
        rows = valid.sum(-1)[..., None, None].clamp(min=1)
    score_difference = reference.score_difference_relation(real, difference)
    kl, q_minus_p = reference.divergence(reference.relation(student), score_difference, temperature, valid)
    loss = (kl.sum(-1) / (rows if valid is None else rows[..., 0, 0])).mean()
    gradient = reference.similarity_gradient(q_minus_p, temperature, rows) / samples
    write = reference.feature_gradient_matrix if matrix else reference.feature_gradient
    return loss, write(student, gradient)


def _frame_term(call: Call, features: Features) -> tuple[Tensor, Tensor]:
    """The frame term, and its gradient ``[B, F, K]``, or M/B ``[B, F, F]`` for every pixel."""
    x = features[0]
    if not call.frame or x.shape[1] < 2:
        return x.new_zeros(()), x.new_empty(0)
    return term(features, numbers_of(call).temperature, call.frame_mask, call.pool is None)


def _rows(call: Call, features: Features) -> Tensor:
    """``[B, 3K + 1]``: ψ of student, real and difference, then the number of valid frames."""
    x, mask = features[0], call.frame_mask
    count = x.new_full((len(x), 1), x.shape[1]) if mask is None else mask.sum(1, keepdim=True).to(x.dtype)
    return torch.cat([*(reference.batch_features(v, mask) for v in features), count], dim=1)


def _batch_term(rows: Tensor, temperature: Any) -> tuple[Tensor, Tensor]:
    x, r, d = rows[:, :-1].chunk(3, dim=1)
    return term((x, r, d), temperature, rows[:, -1] > 0, False)


def _weighted(call: Call, batch: Tensor, frame: Tensor) -> Tensor:
    """batch_weight · batch + frame_weight · frame; a term that is not computed adds nothing."""
    numbers = numbers_of(call)
    return numbers.batch_weight * batch + numbers.frame_weight * frame


def _relation_terms(call: Relation, batch: Tensor, frame: Tensor) -> Tensor:
    return torch.stack([_weighted(call, batch, frame), batch, frame])


def _objective_terms(call: Objective, loss: Tensor, batch: Tensor, frame: Tensor, magnitude: Tensor) -> Tensor:
    total = loss
    if call.related:
        total = loss + numbers_of(call).relation_weight * _weighted(call, batch, frame)
    return torch.stack([total, loss, batch, frame, magnitude])


def _relation_gradient(like: Tensor, upstream: Upstream, call: Call, found: Found) -> Tensor:
    """The features' gradients over the pixels, ``[B, F, C, H, W]``."""
    samples, frames, channels, height, width = like.shape
    grid = (height, width) if call.pool is None else call.pool
    total = like.new_zeros(samples, frames, channels, *grid)
    numbers = numbers_of(call)
    frame_scale = _scale(upstream.total, numbers.relation_weight * numbers.frame_weight, upstream.frame)
    batch_scale = _scale(upstream.total, numbers.relation_weight * numbers.batch_weight, upstream.batch)
    if found.frame_grad.numel() and frame_scale is not None:
        total += frame_scale * found.frame_grad.view_as(total)
    if found.batch_grad.numel() and batch_scale is not None:
        share = torch.full_like(total[:, :, :1, :1, :1], 1 / frames)
        if call.frame_mask is not None:
            valid = call.frame_mask.to(total.dtype)
            share = (valid / valid.sum(1, keepdim=True).clamp(min=1))[:, :, None, None, None]
        total += batch_scale * share * found.batch_grad.view(samples, 1, channels, *grid)
    if call.pool is None:
        return total
    rows = reference.region_average(height, grid[0], total)
    columns = reference.region_average(width, grid[1], total)
    return torch.einsum("bfcij,ih,jw->bfchw", total, rows, columns)


def _scale(total: Tensor | None, weight: Any, term: Tensor | None) -> Tensor | None:
    """total · weight + term; None where neither arrives."""
    if total is None:
        return term
    return total * weight if term is None else total * weight + term
