"""The reference behind the operator boundary: explicit gradients, so that what is saved is a few features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codmd import reference
from codmd.reference.relation import Pool

load_error: str | None = None


def _plain(function: Any) -> Any:
    """Run without autograd and outside autocast, whatever surrounds the call."""

    def wrapped(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*args)

    wrapped.__doc__, wrapped.__name__ = function.__doc__, function.__name__
    return wrapped


def _term(
    student: Tensor, real: Tensor, difference: Tensor, temperature: float, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The mean over leading indices of the divergence, and M of that mean, ``[..., N, N]``."""
    samples = student.shape[:-2].numel()
    if valid is None:
        rows: Any = student.shape[-2]
    else:
        valid = valid & (valid.sum(-1, keepdim=True) >= 2)
        student, real, difference = (torch.where(valid[..., None], v, 0) for v in (student, real, difference))
        rows = valid.sum(-1)[..., None, None].clamp(min=1)
    score_difference = reference.score_difference_relation(real, difference)
    kl, q_minus_p = reference.divergence(reference.relation(student), score_difference, temperature, valid)
    loss = (kl.sum(-1) / (rows if valid is None else rows[..., 0, 0])).mean()
    gradient = reference.similarity_gradient(q_minus_p, temperature, rows) / samples
    return loss, reference.feature_gradient_matrix(student, gradient)


def _features(student: Tensor, real: Tensor, fake: Tensor, layout: str, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.compute_dtype(student.dtype)
    difference = fake.to(dtype) - real.to(dtype)
    x, r, d = (reference.frame_features(v, layout, pool) for v in (student, real, difference))
    return x, r, d


def _frames(
    features: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    pool: Pool,
    temperature: float,
    frame_weight: float,
) -> tuple[Tensor, Tensor]:
    x = features[0]
    if not frame_weight or x.shape[1] < 2:
        return x.new_zeros(()), x.new_empty(0)
    loss, matrix = _term(*features, temperature, mask)
    if pool is None:
        return loss, matrix
    return loss, matrix @ (x if mask is None else torch.where(mask[..., None], x, 0))


def _batch(pooled: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    x, r, d = pooled[:, :-1].chunk(3, dim=1)
    loss, matrix = _term(x, r, d, temperature, pooled[:, -1] > 0)
    return loss, matrix @ torch.where(pooled[:, -1:] > 0, x, 0)


def _pooled(features: tuple[Tensor, Tensor, Tensor], mask: Tensor | None) -> Tensor:
    x = features[0]
    count = x.new_full((len(x), 1), x.shape[1]) if mask is None else mask.sum(1, keepdim=True).to(x.dtype)
    return torch.cat([*(reference.batch_features(v, mask) for v in features), count], dim=1)


def _total(batch: Tensor, frame: Tensor, batch_weight: float, frame_weight: float) -> Tensor:
    return torch.stack([batch_weight * batch + frame_weight * frame, batch, frame])


@_plain
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
    """(terms [3] = total, batch, frame; frame gradient; batch gradient) without communication."""
    features = _features(student, real, fake, layout, pool)
    frame, frame_grad = _frames(features, frame_mask, pool, temperature, frame_weight)
    batch, batch_grad = frame.new_zeros(()), frame.new_empty(0)
    if batch_weight and len(student) > 1:
        batch, batch_grad = _batch(_pooled(features, frame_mask), temperature)
    return _total(batch, frame, batch_weight, frame_weight), frame_grad, batch_grad


@_plain
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
    """(frame term [1], frame gradient, rows to gather [B, 3K + 1]), the stage before a gather."""
    features = _features(student, real, fake, layout, pool)
    frame, frame_grad = _frames(features, frame_mask, pool, temperature, frame_weight)
    return frame[None], frame_grad, _pooled(features, frame_mask)


@_plain
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
    """(terms [3], gradient of the rows ``first_row : first_row + rows``), the stage after a gather."""
    batch, batch_grad = _batch(pooled, temperature)
    return _total(batch, frame[0], batch_weight, frame_weight), grad_scale * batch_grad[first_row : first_row + rows]


@_plain
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
    """Write the gradient of the student's latents into ``out``."""
    grad = reference.to_bfchw(out, layout)
    samples, frames, channels, height, width = grad.shape
    features = (channels, height, width) if pool is None else (channels, *(pool if isinstance(pool, tuple) else (1, 1)))
    total = torch.zeros(samples, frames, *features, dtype=frame_grad.dtype, device=out.device)
    frame_scale = _upstream(grad_total, frame_weight, grad_frame)
    batch_scale = _upstream(grad_total, batch_weight, grad_batch)
    if frame_grad.numel() and frame_scale is not None:
        if pool is None:
            assert student is not None
            x = reference.frame_features(student, layout, None)
            frame_grad = frame_grad @ (x if frame_mask is None else torch.where(frame_mask[..., None], x, 0))
        total += frame_scale * frame_grad.view_as(total)
    if batch_grad.numel() and batch_scale is not None:
        share = torch.full_like(total[:, :, :1, :1, :1], 1 / frames)
        if frame_mask is not None:
            valid = frame_mask.to(total.dtype)
            share = (valid / valid.sum(1, keepdim=True).clamp(min=1))[:, :, None, None, None]
        total += batch_scale * share * batch_grad.view(samples, 1, *features)
    if pool is not None:
        rows = reference.region_average(height, features[1], total)
        columns = reference.region_average(width, features[2], total)
        total = torch.einsum("bfcij,ih,jw->bfchw", total, rows, columns)
    grad.copy_(total)


def _upstream(grad_total: Tensor | None, weight: float, grad_term: Tensor | None) -> Tensor | None:
    if grad_total is None:
        return grad_term
    return grad_total * weight if grad_term is None else grad_total * weight + grad_term
