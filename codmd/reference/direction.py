"""The direction g of distribution matching, for every convention, and its decoupled form over two noise levels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codmd.conventions import Convention
from codmd.reference.guidance import Prediction, step_dtype
from codmd.reference.norm import normaliser, out_of_range
from codmd.reference.scale import power_of_two

PROJECTION_EPS = 1e-8
"""Added to ⟨e, e⟩ by PDMD's released code."""


class Direction(NamedTuple):
    """g, the norm that divides (broadcasts), the guided ``real``, and x - g where a codebase rounds it."""

    g: Tensor
    norm: Tensor
    real: Tensor
    target: Tensor | None


def projected(student: Tensor, fake: Tensor, real: Tensor, convention: Convention) -> Tensor:
    """d - (⟨d, e⟩/(⟨e, e⟩ + 1e-8))·e per sample: the part of d = f - r along e = x - f is taken out (PDMD).

    As d = w - e with w = x - r, that is w - (⟨w, e⟩ + 1e-8)/(⟨e, e⟩ + 1e-8)·e too: taken where w is shorter than d,
    which cancels against e where f lies far from x and r.
    """
    difference, residual = fake - real, student - fake
    axes = tuple(range(1, difference.ndim))
    if convention.arithmetic == "emulate":
        along = (difference * residual).sum(axes, keepdim=True)
        return difference - along / (residual.square().sum(axes, keepdim=True) + PROJECTION_EPS) * residual
    scale = power_of_two(residual, axes)
    unit, eps = residual / scale, PROJECTION_EPS / scale / scale
    squares = unit.square().sum(axes, keepdim=True)
    distance = student - real
    shorter = distance.abs().amax(axes, keepdim=True) < difference.abs().amax(axes, keepdim=True)
    kept = torch.where(shorter, distance, difference)
    along = (kept * unit).sum(axes, keepdim=True) / (squares + eps)
    return kept - (along + torch.where(shorter, scale / (squares / eps + 1), 0)) * unit


def quotient(difference: Tensor, norm: Tensor, convention: Convention, weight: Tensor | None) -> Tensor:
    """nan(weight · d/norm), or d itself where the norm divides the loss; ``weight`` broadcasts, None is 1."""
    if convention.norm_divides == "loss":
        return difference
    if convention.arithmetic == "emulate" and convention.rounding.reciprocal:
        factor = 1 / norm if weight is None else 1 / norm * weight
        g = difference * factor.to(difference.dtype)
    else:
        g = difference / norm
        g = g if weight is None else g * weight
    if convention.nan == "to_num":
        return g.nan_to_num()
    return g.nan_to_num(0.0, 0.0, 0.0) if convention.nan == "zero" else g


def direction(
    student: Tensor,
    fake: Prediction,
    real: Prediction,
    guidance: float | Tensor,
    convention: Convention,
    layout: str,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Direction:
    """g = nan((f - r)/N), or f - r where the norm divides the loss; N = N(x, r), or N(f, r) with ``norm_of="fake"``.

    But under emulation, g is not finite where the norm of finite latents is out of range: no policy repairs it.
    """
    x, r, emulate = student.detach(), real.guided, convention.arithmetic == "emulate"
    norm_dtype, g_dtype = step_dtype(convention, "norm", student), step_dtype(convention, "direction", student)
    compared = (x if convention.norm_of == "student" else fake.guided).to(norm_dtype), r.to(norm_dtype)
    norm = normaliser(*compared, convention, layout, mask)
    if convention.projected:
        difference = projected(x.to(g_dtype), fake.guided.to(g_dtype), r.to(g_dtype), convention)
    else:
        difference = fake.guided.to(g_dtype) - r.to(g_dtype)
    g = quotient(difference, norm, convention, _direction_weight(sample_weight, convention, norm))
    if not emulate:
        return Direction(_shown(out_of_range(norm, *compared, convention), g, convention), norm, r, None)
    target_dtype = step_dtype(convention, "target", student)
    target = x.to(target_dtype) - g.to(target_dtype)
    if convention.rounding.split_target and real.uncond is not None:
        target = x + (real.cond - fake.guided) + convention.cond_scale(guidance) * (real.cond - real.uncond)
    return Direction(g, norm, r, target)


def decoupled_direction(
    student: Tensor,
    fake: Prediction,
    real: Prediction,
    augment_real: Tensor,
    augment_uncond: Tensor,
    guidance: float | Tensor,
    convention: Convention,
    layout: str,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Direction:
    """g = nan((f - c₁)/N(x, c₁)) - nan(k (c₂ - u₂)/N(x, c₂)): matching at one noise level, guidance at another.

    Source: Decoupled DMD, arXiv 2511.22677. c₁ is ``real`` without guidance; c₂ and u₂ are the teacher's x0
    predictions ``augment_real`` and ``augment_uncond`` at a second level; k is the cond-form scale, so the
    paper's w is k + 1. ``norm`` and ``real`` of the result are those of the first level.

    Raises:
        ValueError: the convention has no decoupled form; :attr:`Convention.undecouplable` says why.
    """
    if convention.undecouplable:
        raise ValueError(f"this convention has no decoupled loss: {convention.undecouplable}")
    matching = direction(student, fake, real, guidance, convention, layout, sample_weight, mask)
    dtype = matching.g.dtype
    x, c, u = student.detach().to(dtype), augment_real.detach().to(dtype), augment_uncond.detach().to(dtype)
    norm = normaliser(x, c, convention, layout, mask)
    weight = _direction_weight(sample_weight, convention, norm)
    augmentation = quotient(convention.cond_scale(guidance) * (u - c), norm, convention, weight)
    lost = out_of_range(norm, x, c, convention)
    return matching._replace(g=_shown(lost, matching.g + augmentation, convention))


def _shown(lost: Tensor, g: Tensor, convention: Convention) -> Tensor:
    """g, not finite where it is ``lost``; a sample with a NaN might be dropped."""
    return torch.where(lost, torch.inf if convention.nan == "zero_sample" else torch.nan, g)


def _direction_weight(sample_weight: Tensor | None, convention: Convention, norm: Tensor) -> Tensor | None:
    """``sample_weight`` where it multiplies g, shaped to broadcast."""
    if sample_weight is None or convention.weight_on != "direction":
        return None
    return sample_weight.to(norm.dtype).reshape([-1] + [1] * (norm.ndim - 1))
