"""The direction g of distribution matching, for every convention, and its decoupled form over two noise levels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from codmd.conventions import Convention
from codmd.reference.guidance import Prediction, step_dtype
from codmd.reference.norm import normaliser
from codmd.reference.scale import power_of_two

PROJECTION_EPS = 1e-8
"""Added to ⟨e, e⟩ by PDMD's released code."""


class Direction(NamedTuple):
    """g, the norm that divides (broadcasts), the guided ``real``, and x - g where a codebase rounds it."""

    g: Tensor
    norm: Tensor
    real: Tensor
    target: Tensor | None


def projected(difference: Tensor, residual: Tensor, convention: Convention) -> Tensor:
    """d - (⟨d, e⟩/(⟨e, e⟩ + 1e-8))·e per sample: the part of d = f - r along e = x - f is taken out (PDMD)."""
    axes = tuple(range(1, difference.ndim))
    scale = 1.0 if convention.arithmetic == "emulate" else power_of_two(residual, axes)
    unit = residual / scale
    along = (difference * unit).sum(axes, keepdim=True)
    return difference - along / (unit.square().sum(axes, keepdim=True) + PROJECTION_EPS / scale / scale) * unit


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
    """g = nan((f - r)/N), or f - r where the norm divides the loss; N = N(x, r), or N(f, r) with ``norm_of="fake"``."""
    x, r, emulate = student.detach(), real.guided, convention.arithmetic == "emulate"
    norm_dtype, g_dtype = step_dtype(convention, "norm", student), step_dtype(convention, "direction", student)
    compared = x if convention.norm_of == "student" else fake.guided
    norm = normaliser(compared.to(norm_dtype), r.to(norm_dtype), convention, layout, mask)
    difference = fake.guided.to(g_dtype) - r.to(g_dtype)
    if convention.projected:
        difference = projected(difference, x.to(g_dtype) - fake.guided.to(g_dtype), convention)
    g = quotient(difference, norm, convention, _direction_weight(sample_weight, convention, norm))
    if not emulate:
        return Direction(g, norm, r, None)
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
    return matching._replace(g=matching.g + augmentation)


def _direction_weight(sample_weight: Tensor | None, convention: Convention, norm: Tensor) -> Tensor | None:
    """``sample_weight`` where it multiplies g, shaped to broadcast."""
    if sample_weight is None or convention.weight_on != "direction":
        return None
    return sample_weight.to(norm.dtype).reshape([-1] + [1] * (norm.ndim - 1))
