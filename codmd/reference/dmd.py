"""The distribution matching loss in plain PyTorch, for every named convention, one equation per function.

DMD (arXiv 2311.18828, equations 7 and 8) pushes the student's x0 along g = (f - r)/mean|x - r|: r is the teacher's
prediction after guidance, f the critic's. L = ½ mean(x - sg(x - g))² is ½ mean(g²) in value and has ∂L/∂x = g/numel.
Latents are ``[B, F, C, H, W]`` (layout ``"bfchw"``), ``[B, C, F, H, W]`` (``"bcfhw"``) or images ``[B, C, H, W]``
(``"bchw"``). ``arithmetic="emulate"`` repeats the roundings of a codebase, one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codmd import conventions
from codmd.conventions import Convention
from codmd.reference.direction import Direction, decoupled_direction, direction
from codmd.reference.guidance import step_dtype, x0_prediction
from codmd.reference.norm import guard

__all__ = [
    "Direction",
    "check_augmentation",
    "decoupled_direction",
    "direction",
    "dmd_direction",
    "dmd_loss",
    "guard",
    "loss_of_direction",
    "mean_magnitude",
]


def dmd_direction(
    student: Tensor,
    *,
    real: Tensor,
    fake: Tensor,
    real_uncond: Tensor | None = None,
    guidance: float | Tensor = 3.5,
    convention: str | Convention = "self_forcing",
    mask: Tensor | None = None,
    layout: str | None = None,
    augment_real: Tensor | None = None,
    augment_uncond: Tensor | None = None,
) -> Tensor:
    """g of x0 predictions as the convention computes it; no gradient."""
    convention = conventions.resolve(convention)
    layout = layout or convention.layout
    critic = x0_prediction(fake, None, guidance, convention, layout)
    teacher = x0_prediction(real, real_uncond, guidance, convention, layout)
    augment = check_augmentation(augment_real, augment_uncond, real_uncond, "x0")
    if augment is None:
        return direction(student, critic, teacher, guidance, convention, layout, mask=mask).g
    return decoupled_direction(student, critic, teacher, *augment, guidance, convention, layout, mask=mask).g


def dmd_loss(
    student: Tensor,
    *,
    real: Tensor,
    fake: Tensor,
    real_uncond: Tensor | None = None,
    fake_uncond: Tensor | None = None,
    augment_real: Tensor | None = None,
    augment_uncond: Tensor | None = None,
    guidance: float | Tensor = 3.5,
    fake_guidance: float | Tensor | None = None,
    convention: str | Convention = "self_forcing",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    layout: str | None = None,
    prediction: str = "x0",
    noisy: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Tensor:
    """The loss of a convention, differentiable in ``student``; arguments as :func:`codmd.ops.dmd_loss`.

    ``augment_real`` and ``augment_uncond`` make it the decoupled loss of :func:`decoupled_direction`.
    ``arithmetic="float32"`` computes float64 inputs in float64, so upcast inputs give the truth. Returns 0-dim
    float32, or float64 where the convention reduces in float64.
    """
    convention = conventions.resolve(convention)
    layout = layout or convention.layout
    augment = check_augmentation(augment_real, augment_uncond, real_uncond, prediction)
    if prediction == "x0":
        noisy = sigma = None
    critic_scale = guidance if fake_guidance is None else fake_guidance
    critic = x0_prediction(fake, fake_uncond, critic_scale, convention, layout, noisy, sigma)
    teacher = x0_prediction(real, real_uncond, guidance, convention, layout, noisy, sigma)
    if augment is None:
        found = direction(student, critic, teacher, guidance, convention, layout, sample_weight, mask)
    else:
        found = decoupled_direction(
            student, critic, teacher, *augment, guidance, convention, layout, sample_weight, mask
        )
    return loss_of_direction(student, found, convention, mask, sample_weight)


def check_augmentation(
    augment_real: Tensor | None, augment_uncond: Tensor | None, real_uncond: Tensor | None, prediction: str
) -> tuple[Tensor, Tensor] | None:
    """(c₂, u₂) of a decoupled loss, or None; ``ValueError`` where one is missing or the two levels would be mixed."""
    if augment_real is None and augment_uncond is None:
        return None
    if augment_real is None or augment_uncond is None:
        missing = "augment_real" if augment_real is None else "augment_uncond"
        raise ValueError(f"{missing} is missing: the guidance half needs the teacher with and without the condition")
    if real_uncond is not None:
        raise ValueError("real_uncond does not go with augment_real: the matching half is not guided, pass None")
    if prediction != "x0":
        raise ValueError(
            f"prediction={prediction!r} does not go with augment_real: allowed: x0 (reference.x0_from_flow)"
        )
    return augment_real, augment_uncond


def loss_of_direction(
    student: Tensor, found: Direction, convention: Convention, mask: Tensor | None, sample_weight: Tensor | None
) -> Tensor:
    """min(cap, coefficient · reduce(penalty(x - sg(x - g)))) over the selected elements; nothing selected gives 0."""
    x, norm = student.to(step_dtype(convention, "loss", student)), found.norm
    if found.target is None:
        residual = x - x.detach() + found.g
    else:
        residual = x - found.target.to(x.dtype)
    per_sample = [-1] + [1] * (student.ndim - 1)
    selected = None if mask is None else mask.expand_as(student)
    if convention.nan == "zero_sample":
        # Before the penalty: a NaN times the zero that masking sends back would be a NaN gradient.
        bad = residual.detach().isnan() if selected is None else residual.detach().isnan() & selected
        kept = ~bad.flatten(1).any(1).reshape(per_sample)
        residual = torch.where(kept, residual, 0)
    if selected is not None:
        residual, norm = torch.where(selected, residual, 0), torch.where(selected, norm, 1)
    penalty = _penalty(residual, norm if convention.norm_divides == "loss" else None, convention)
    if sample_weight is not None and convention.weight_on == "loss":
        penalty = penalty * sample_weight.to(penalty.dtype).reshape(per_sample)
    if convention.reduction == "sum":
        total = penalty.sum()
    elif convention.reduction == "mean" and selected is not None:
        total = penalty.sum() / selected.sum().clamp(min=1)
    elif selected is None and _plain_mse(convention, sample_weight):
        # Its gradient scales before it doubles: rounded and overflowing where the codebases' is.
        target = torch.zeros_like(residual) if found.target is None else found.target.to(x.dtype)
        total = torch.nn.functional.mse_loss(residual if found.target is None else x, target)
    else:
        total = penalty.mean()
    total = convention.coefficient * total
    if convention.loss_cap is not None:
        total = total.clamp(max=convention.loss_cap)
    return total if total.dtype is torch.float64 else total.float()


def mean_magnitude(found: Direction, mask: Tensor | None) -> Tensor:
    """mean|g| over the selected elements; nothing selected gives 0."""
    magnitude = found.g.abs()
    if mask is None:
        return magnitude.mean()
    selected = mask.expand_as(magnitude)
    return torch.where(selected, magnitude, 0).sum() / selected.sum().clamp(min=1)


def _plain_mse(convention: Convention, sample_weight: Tensor | None) -> bool:
    weighted = sample_weight is not None and convention.weight_on == "loss"
    repaired = convention.nan == "zero_sample" or convention.norm_divides == "loss"
    return convention.penalty == "l2" and not weighted and not repaired


def _penalty(residual: Tensor, norm: Tensor | None, convention: Convention) -> Tensor:
    """residual² or its pseudo-Huber form, over ``norm`` where it is given: divided before it is squared."""
    c = convention.huber_c
    if convention.arithmetic == "emulate":
        penalty = residual.square() if convention.penalty == "l2" else (residual.square() + c * c).sqrt() - c
        return penalty if norm is None else penalty / norm
    penalty = residual * (residual if norm is None else residual / norm)
    return penalty if convention.penalty == "l2" else penalty / (torch.hypot(residual, residual.new_full((), c)) + c)
