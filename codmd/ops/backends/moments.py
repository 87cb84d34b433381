"""The DMD term of the reference backend: norms, penalty and factors of one call, and the gradient from them.

L = coefficient · reduce(penalty(g)), g = nan(d/norm); ∂L/∂x = factor · G(d, norm). The difference comes first,
d = (f - c) + k_f(f - f_u) - k(c - u), so that a critic that tracks the teacher keeps its digits. Latents are
``[B, F, C, H, W]`` in the compute dtype.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from codmd import reference
from codmd.conventions import Convention
from codmd.ops.contract import Call, Found, Numbers, Objective
from codmd.reference.norm import guard, out_of_range


class Latents(NamedTuple):
    """Student, guided real and the difference d = f - r of the guided predictions; c₂ and -k(c₂ - u₂) if decoupled."""

    student: Tensor
    real: Tensor
    difference: Tensor
    augment_real: Tensor | None
    augmentation: Tensor | None


def numbers_of(call: Call) -> Numbers:
    """The numbers, 0-dim tensors where the device holds them."""
    return call.numbers if isinstance(call.numbers, Numbers) else Numbers(*call.numbers.unbind())  # type: ignore[arg-type]


def latents_of(call: Objective) -> Latents:
    """What the loss is computed from."""
    second = None if call.augment_real is None else _wide(call, call.augment_real)
    real = _guided(call, call.real, call.real_uncond, numbers_of(call).real_scale)
    return Latents(_wide(call, call.student), real, _difference(call), second, _augmentation(call))


def loss(latents: Latents, call: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, mean|g|, norms, factors) in the compute dtype; nothing selected gives 0."""
    x, r, d, second, augmentation = latents
    rule = call.convention
    norms = _norms((x - r).abs(), rule)
    if second is not None:
        norms = torch.stack([norms, _norms((x - second).abs(), rule)])
    selected = torch.ones_like(d, dtype=torch.bool) if call.mask is None else _view(call, call.mask)
    weight = torch.ones_like(d[:, 0, 0, 0, 0]) if call.sample_weight is None else call.sample_weight.to(d.dtype)
    g = torch.where(selected, _direction(d, augmentation, norms, rule), 0)
    # The square of a small difference would be lost before a norm as small divides it.
    by = torch.where(selected, g / _per_frame(norms, d, rule), 0) if rule.norm_divides == "loss" else g
    penalty = g * by
    if rule.penalty == "huber":
        penalty = penalty / ((g.square() + rule.huber_c**2).sqrt() + rule.huber_c)
    per_sample, magnitude = penalty.sum((1, 2, 3, 4)), g.abs().sum((1, 2, 3, 4))

    factor = rule.coefficient * (2 if rule.penalty == "l2" else 1) * weight
    if rule.weight_on == "direction":
        per_sample, magnitude = per_sample * weight.square(), magnitude * weight.abs()
    else:
        per_sample = per_sample * weight
    non_finite = (selected & ~x.isfinite()).flatten(1).any(1)
    for level, prediction in [(norms, r)] if second is None else zip(norms, (r, second), strict=True):
        non_finite |= out_of_range(_per_frame(level, d, rule), x, prediction, rule).flatten(1).any(1)
    per_sample, factor = (torch.where(non_finite, torch.nan, v) for v in (per_sample, factor))
    if rule.nan == "zero_sample":
        dropped = per_sample.isnan()
        per_sample, factor = (torch.where(dropped, 0, v) for v in (per_sample, factor))
    count = selected.sum()
    at_least_one = count.clamp(min=1).to(d.dtype)
    if rule.reduction == "mean":
        per_sample, factor = per_sample / at_least_one, factor / at_least_one
    return (
        rule.coefficient * per_sample.sum(),
        magnitude.sum() / at_least_one,
        norms,
        torch.where(count > 0, factor, 0),
    )


def gradient(call: Objective, found: Found, upstream: Tensor) -> Tensor:
    """upstream · factor · G with G = nan(d/norm), or d/sqrt(d² + c²)/norm for the pseudo-Huber penalty."""
    assert found.norms is not None
    assert found.factors is not None
    d, rule = _difference(call), call.convention
    if rule.penalty == "huber":
        d = d / (d.square() + rule.huber_c**2).sqrt()
    if rule.norm_divides == "loss":
        g = d / _per_frame(found.norms, d, rule)
    else:
        g = _direction(d, _augmentation(call), found.norms, rule)
    factor = (upstream * found.factors)[:, None, None, None, None]
    gradient = torch.where(factor == 0, 0, factor * g)
    return gradient if call.mask is None else torch.where(_view(call, call.mask), gradient, 0)


def _direction(d: Tensor, augmentation: Tensor | None, norms: Tensor, rule: Convention) -> Tensor:
    """g = nan(d/N), plus nan(augmentation/N₂) of a decoupled loss; d itself where the norm divides the loss."""
    if rule.norm_divides == "loss":
        return d
    halves = [(d, norms)] if augmentation is None else list(zip((d, augmentation), norms.unbind(), strict=True))
    quotients = [half / _per_frame(norm, half, rule) for half, norm in halves]
    if rule.nan == "to_num":
        quotients = [quotient.nan_to_num() for quotient in quotients]
    return functools.reduce(torch.add, quotients)


def _view(call: Objective, latents: Tensor) -> Tensor:
    return reference.to_bfchw(latents, call.layout)


def _wide(call: Objective, latents: Tensor) -> Tensor:
    return _view(call, latents).to(reference.compute_dtype(latents.dtype))


def _difference(call: Objective) -> Tensor:
    """d = f - r of the guided x0 predictions."""
    numbers = numbers_of(call)
    f, c = _wide(call, call.fake), _wide(call, call.real)
    d = f - c
    if call.fake_uncond is not None:
        d = d + numbers.fake_scale * (f - _wide(call, call.fake_uncond))
    if call.real_uncond is not None:
        d = d - numbers.real_scale * (c - _wide(call, call.real_uncond))
    return d if call.sigma is None else -call.sigma[:, :, None, None, None] * d


def _augmentation(call: Objective) -> Tensor | None:
    """-k(c₂ - u₂), the guidance half of a decoupled loss."""
    if call.augment_real is None or call.augment_uncond is None:
        return None
    return numbers_of(call).real_scale * (_wide(call, call.augment_uncond) - _wide(call, call.augment_real))


def guided_fake(call: Objective) -> Tensor:
    """f, which r + d does not tell from 0 where it lies far under r."""
    return _guided(call, call.fake, call.fake_uncond, numbers_of(call).fake_scale)


def _guided(call: Objective, cond: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    guided = _wide(call, cond)
    if uncond is not None:
        guided = guided + scale * (guided - _wide(call, uncond))
    if call.sigma is None or call.noisy is None:
        return guided
    return _wide(call, call.noisy) - call.sigma[:, :, None, None, None] * guided


def _norms(distance: Tensor, rule: Convention) -> Tensor:
    """Guarded means of |x - r|: ``[B]`` per sample, ``[1]`` of the batch, ``[B, segments]`` of blocks.

    Summed in float64: latents near the largest number have a mean that their float32 sum does not.
    """
    per_frame = distance.sum((2, 3, 4), dtype=torch.float64)
    frame_size = distance[0, 0].numel()
    if rule.norm_scope == "batch":
        return guard((per_frame.sum() / distance.numel()).to(distance.dtype), rule).reshape(1)
    edges = itertools.pairwise(rule.segments(distance.shape[1]))
    means = [per_frame[:, start:end].sum(1) / ((end - start) * frame_size) for start, end in edges]
    norms = guard(torch.stack(means, 1).to(distance.dtype), rule)
    if rule.independent_first_frame:
        norms[:, 0] = 1
    return norms if rule.norm_scope == "block" else norms[:, 0]


def _per_frame(norms: Tensor, latents: Tensor, rule: Convention) -> Tensor:
    """The norms of every frame, shaped to broadcast."""
    samples, frames = latents.shape[:2]
    if rule.norm_scope == "block":
        edges = itertools.pairwise(rule.segments(frames))
        norm = torch.cat([norms[:, i, None].expand(samples, end - start) for i, (start, end) in enumerate(edges)], 1)
    else:
        norm = norms[:, None].expand(samples, frames)
    return norm[:, :, None, None, None]
