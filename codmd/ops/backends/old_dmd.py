"""The fused DMD and CoDMD losses behind the operator boundary, in PyTorch: moments, small algebra, one gradient pass.

What a fused backend computes, in the same order: one pass over the latents sums |x - r| per segment of the norm and
the penalty of d = f - r per sample and frame; the loss follows from those sums; the gradient needs d alone, which the
backward pass computes again. Differences come first, d = (f - c) + k_f(f - f_u) - k(c - u), so that a critic that
tracks the teacher keeps its digits.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from codmd import reference
from codmd.conventions import Convention
from codmd.ops.backends.old import _frames, _plain, _pooled, _upstream, relation_backward
from codmd.reference.dmd import guard
from codmd.reference.relation import Pool

load_error: str | None = None


class _Moments(NamedTuple):
    """Sums per frame, ``[B, F]``: over all elements, then over the selected ones."""

    distance: Tensor
    penalty: Tensor
    magnitude: Tensor
    selected: Tensor
    nans: Tensor
    wild_student: Tensor


@_plain
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
    convention: Convention,
    real_scale: float,
    fake_scale: float,
    magnitude: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [2] = loss and mean|g|; norms, one per segment; factors [B], ∂L/∂x = factor · G(d, norm))."""
    x = _wide(student, layout)
    d = _difference(fake, real, real_uncond, fake_uncond, sigma, layout, real_scale, fake_scale)
    r = _guided_real(real, real_uncond, noisy, sigma, layout, real_scale)
    return _loss(x, r, d, None if mask is None else reference.to_bfchw(mask, layout), sample_weight, convention)


@_plain
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
    convention: Convention,
    real_scale: float,
    fake_scale: float,
) -> None:
    """Write upstream · factor · G(d, norm) into ``out``; 0 where nothing is selected."""
    d = _difference(fake, real, real_uncond, fake_uncond, sigma, layout, real_scale, fake_scale)
    selected = None if mask is None else reference.to_bfchw(mask, layout)
    reference.to_bfchw(out, layout).copy_(_gradient(d, grad * factors, norms, selected, convention))


@_plain
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
    convention: Convention,
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
    x = _wide(student, layout)
    d = _difference(fake, real, real_uncond, fake_uncond, sigma, layout, real_scale, fake_scale)
    r = _guided_real(real, real_uncond, noisy, sigma, layout, real_scale)
    selected = None if mask is None else reference.to_bfchw(mask, layout)
    values, norms, factors = _loss(x, r, d, selected, sample_weight, convention)
    pooled_x, pooled_r, pooled_d = (reference.frame_features(v, "bfchw", pool) for v in (x, r, d))
    features = pooled_x, pooled_r, pooled_d
    frame, frame_grad = _frames(features, frame_mask, pool, temperature, frame_weight)
    rows = _pooled(features, frame_mask) if batch else values.new_empty(0)
    return values, norms, factors, frame[None], frame_grad, rows


@_plain
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
    convention: Convention,
    real_scale: float,
    fake_scale: float,
    pool: Pool,
    relation_weight: float,
    batch_weight: float,
    frame_weight: float,
) -> None:
    """Write the gradient of both terms into ``out``, rounded once."""
    total = torch.empty_like(out, dtype=factors.dtype)
    relation_backward(
        total, grad_total, grad_batch, grad_frame, None, frame_mask, frame_grad, batch_grad, layout, pool,
        relation_weight * batch_weight, relation_weight * frame_weight,
    )  # fmt: skip
    grad = _upstream(grad_total, 1.0, grad_dmd)
    if grad is not None:
        d = _difference(fake, real, real_uncond, fake_uncond, sigma, layout, real_scale, fake_scale)
        selected = None if mask is None else reference.to_bfchw(mask, layout)
        reference.to_bfchw(total, layout).add_(_gradient(d, grad * factors, norms, selected, convention))
    out.copy_(total)


def _wide(latents: Tensor, layout: str) -> Tensor:
    return reference.to_bfchw(latents, layout).to(reference.compute_dtype(latents.dtype))


def _difference(
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    sigma: Tensor | None,
    layout: str,
    real_scale: float,
    fake_scale: float,
) -> Tensor:
    """d = f - r of the guided x0 predictions, ``[B, F, C, H, W]``."""
    f, c = _wide(fake, layout), _wide(real, layout)
    d = f - c
    if fake_uncond is not None:
        d = d + fake_scale * (f - _wide(fake_uncond, layout))
    if real_uncond is not None:
        d = d - real_scale * (c - _wide(real_uncond, layout))
    return d if sigma is None else -sigma[:, :, None, None, None] * d


def _guided_real(
    real: Tensor, real_uncond: Tensor | None, noisy: Tensor | None, sigma: Tensor | None, layout: str, real_scale: float
) -> Tensor:
    r = _wide(real, layout)
    if real_uncond is not None:
        r = r + real_scale * (r - _wide(real_uncond, layout))
    if sigma is None or noisy is None:
        return r
    return _wide(noisy, layout) - sigma[:, :, None, None, None] * r


def _loss(
    x: Tensor, r: Tensor, d: Tensor, mask: Tensor | None, sample_weight: Tensor | None, convention: Convention
) -> tuple[Tensor, Tensor, Tensor]:
    moments = _moments(x, r, d, mask, convention)
    norms = _norms(moments.distance, x[0, 0].numel(), convention)
    return _algebra(moments, norms, sample_weight, convention)


def _moments(x: Tensor, r: Tensor, d: Tensor, mask: Tensor | None, convention: Convention) -> _Moments:
    selected = torch.ones_like(d, dtype=torch.bool) if mask is None else mask
    counted = torch.where(selected & ~d.isnan(), d, 0)
    penalty = counted.square()
    if convention.penalty == "huber":
        penalty = penalty / ((penalty + convention.huber_c**2).sqrt() + convention.huber_c)
    terms = ((x - r).abs(), penalty, counted.abs(), selected, selected & d.isnan(), selected & ~x.isfinite())
    return _Moments(*(term.sum((2, 3, 4)) for term in terms))


def _by_segment(values: Tensor, convention: Convention) -> Tensor:
    """``[B, F]`` sums to ``[B, segments]``."""
    edges = convention.segments(values.shape[1])
    return torch.stack([values[:, start:end].sum(1) for start, end in itertools.pairwise(edges)], 1)


def _norms(distance: Tensor, frame_size: int, convention: Convention) -> Tensor:
    """Guarded norms: ``[B]`` per sample, ``[1]`` of the batch, ``[B, segments]`` of blocks."""
    samples, frames = distance.shape
    if convention.norm_scope == "batch":
        return guard(distance.sum().reshape(1) / (samples * frames * frame_size), convention)
    edges = itertools.pairwise(convention.segments(frames))
    means = [distance[:, start:end].sum(1) / ((end - start) * frame_size) for start, end in edges]
    norms = guard(torch.stack(means, 1), convention)
    if convention.independent_first_frame:
        norms[:, 0] = 1
    return norms if convention.norm_scope == "block" else norms[:, 0]


def _algebra(
    moments: _Moments, norms: Tensor, sample_weight: Tensor | None, convention: Convention
) -> tuple[Tensor, Tensor, Tensor]:
    samples = len(moments.penalty)
    norm = norms.reshape(1, 1).expand(samples, 1) if convention.norm_scope == "batch" else norms.reshape(samples, -1)
    penalty, magnitude, selected, nans, wild = (_by_segment(value, convention) for value in moments[1:])
    if convention.norm_divides == "loss":
        value = penalty / norm
    else:
        value, magnitude = penalty / norm / norm, magnitude / norm
    if convention.nan == "to_num":
        value, magnitude = (torch.where(v.isnan(), 0, v) for v in (value, magnitude))
    else:
        value = torch.where(nans > 0, torch.nan, value)
    value, magnitude = (torch.where(selected > 0, v, 0) for v in (value, magnitude))

    loss, wild = value.sum(1), wild.sum(1) > 0
    weight = torch.ones_like(loss) if sample_weight is None else sample_weight.to(loss.dtype)
    factor = convention.coefficient * (2 if convention.penalty == "l2" else 1) * weight
    loss, factor = (torch.where(wild, torch.nan, v) for v in (loss, factor))
    if convention.nan == "zero_sample":
        dropped = loss.isnan()
        loss, factor = (torch.where(dropped, 0, v) for v in (loss, factor))
    loss = loss * (weight if convention.weight_on == "loss" else weight.square())
    count = selected.sum()
    at_least_one = count.clamp(min=1).to(loss.dtype)
    if convention.reduction == "mean":
        loss, factor = loss / at_least_one, factor / at_least_one
    values = torch.stack([convention.coefficient * loss.sum(), magnitude.sum() / at_least_one])
    return values, norms, torch.where(count > 0, factor, 0)


def _gradient(d: Tensor, factors: Tensor, norms: Tensor, mask: Tensor | None, convention: Convention) -> Tensor:
    """factor · G with G = nan(d/norm), or d/sqrt(d² + c²)/norm for the pseudo-Huber penalty."""
    samples, frames = d.shape[:2]
    if convention.norm_scope == "block":
        edges = convention.segments(frames)
        lengths = [end - start for start, end in itertools.pairwise(edges)]
        norm = torch.cat([norms[:, i : i + 1].expand(samples, n) for i, n in enumerate(lengths)], 1)
    else:
        norm = norms[:, None].expand(samples, frames)
    if convention.penalty == "huber":
        d = d / (d.square() + convention.huber_c**2).sqrt()
    g = d / norm[:, :, None, None, None]
    if convention.nan == "to_num":
        g = g.nan_to_num()
    factor = factors[:, None, None, None, None]
    gradient = torch.where(factor == 0, 0, factor * g)
    return gradient if mask is None else torch.where(mask, gradient, 0)
