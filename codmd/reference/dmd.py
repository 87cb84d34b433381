"""The distribution matching loss in plain PyTorch, for every named convention, one equation per function.

DMD (arXiv 2311.18828, equations 7 and 8) pushes the student's x0 along g = (f - r)/mean|x - r|: r is the teacher's
prediction after guidance, f the critic's. L = ½ mean(x - sg(x - g))² is ½ mean(g²) in value and has ∂L/∂x = g/numel.
Latents are ``[B, F, C, H, W]`` (layout ``"bfchw"``), ``[B, C, F, H, W]`` (``"bcfhw"``) or images ``[B, C, H, W]``
(``"bchw"``). ``arithmetic="emulate"`` repeats the roundings of a codebase, one after the other.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from codmd import conventions
from codmd.conventions import Convention
from codmd.reference.guidance import FRAME_AXIS, Prediction, step_dtype, x0_prediction


class Direction(NamedTuple):
    """g, the norm that divides (broadcasts), the guided ``real``, and x - g where a codebase rounds it."""

    g: Tensor
    norm: Tensor
    real: Tensor
    target: Tensor | None


def mean_distance(student: Tensor, real: Tensor, convention: Convention, layout: str) -> Tensor:
    """mean|x - r| of every norm segment, shaped to broadcast; 1 for an independent first frame. No guard yet."""
    distance = (student - real).abs()
    if convention.norm_scope == "batch":
        return distance.mean().reshape([1] * distance.ndim)
    axes = tuple(range(1, distance.ndim))
    frame_axis = FRAME_AXIS[layout]
    if convention.norm_scope == "sample" or frame_axis is None:
        mean = distance.mean(axes, keepdim=True)
        return torch.ones_like(mean) if convention.independent_first_frame else mean
    edges = convention.segments(distance.shape[frame_axis])
    blocks = [
        distance.narrow(frame_axis, start, end - start)
        .mean(axes, keepdim=True)
        .repeat_interleave(end - start, frame_axis)
        for start, end in itertools.pairwise(edges)
    ]
    if convention.independent_first_frame:
        blocks[0] = torch.ones_like(blocks[0])
    return torch.cat(blocks, frame_axis)


def guard(norm: Tensor, convention: Convention) -> Tensor:
    """The norm as it divides: unchanged, at least ``eps``, or plus ``eps``."""
    if convention.guard == "clamp":
        return norm.clamp(min=convention.eps)
    return norm + convention.eps if convention.guard == "add" else norm


def normaliser(student: Tensor, real: Tensor, convention: Convention, layout: str) -> Tensor:
    """The guarded norm; an independent first frame keeps exactly 1."""
    norm = mean_distance(student, real, convention, layout)
    guarded = guard(norm, convention)
    if not convention.independent_first_frame:
        return guarded
    frame_axis = FRAME_AXIS[layout]
    if frame_axis is None:
        return norm
    frames = norm.shape[frame_axis]
    return torch.cat([norm.narrow(frame_axis, 0, 1), guarded.narrow(frame_axis, 1, frames - 1)], frame_axis)


def direction(
    student: Tensor,
    fake: Prediction,
    real: Prediction,
    guidance: float,
    convention: Convention,
    layout: str,
    sample_weight: Tensor | None = None,
) -> Direction:
    """g = nan((f - r)/norm), or f - r where the norm divides the loss."""
    x, r, emulate = student.detach(), real.guided, convention.arithmetic == "emulate"
    norm_dtype, g_dtype = step_dtype(convention, "norm", student), step_dtype(convention, "direction", student)
    norm = normaliser(x.to(norm_dtype), r.to(norm_dtype), convention, layout)
    weight = None
    if sample_weight is not None and convention.weight_on == "direction":
        weight = sample_weight.to(norm_dtype).reshape([-1] + [1] * (x.ndim - 1))
    g = fake.guided.to(g_dtype) - r.to(g_dtype)
    if convention.norm_divides == "direction":
        if emulate and convention.rounding.reciprocal:
            factor = 1 / norm if weight is None else 1 / norm * weight
            g = g * factor.to(g_dtype)
        else:
            g = g / norm
            g = g if weight is None else g * weight
    if convention.nan == "to_num":
        g = g.nan_to_num()
    if not emulate:
        return Direction(g, norm, r, None)
    target_dtype = step_dtype(convention, "target", student)
    target = x.to(target_dtype) - g.to(target_dtype)
    if convention.rounding.split_target and real.uncond is not None:
        target = x + (real.cond - fake.guided) + convention.cond_scale(guidance) * (real.cond - real.uncond)
    return Direction(g, norm, r, target)


def dmd_direction(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    convention: str | Convention = "self_forcing",
    *,
    real_uncond: Tensor | None = None,
    guidance: float = 3.5,
    layout: str | None = None,
) -> Tensor:
    """g of x0 predictions as the convention computes it; no gradient."""
    convention = conventions.resolve(convention)
    layout = layout or convention.layout
    critic = x0_prediction(fake, None, guidance, convention, layout)
    teacher = x0_prediction(real, real_uncond, guidance, convention, layout)
    return direction(student, critic, teacher, guidance, convention, layout).g


def dmd_loss(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    mask: Tensor | None = None,
    *,
    real_uncond: Tensor | None = None,
    fake_uncond: Tensor | None = None,
    guidance: float = 3.5,
    fake_guidance: float | None = None,
    convention: str | Convention = "self_forcing",
    sample_weight: Tensor | None = None,
    layout: str | None = None,
    prediction: str = "x0",
    noisy: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Tensor:
    """The loss of a convention, differentiable in ``student``; arguments as :func:`codmd.ops.dmd_loss`.

    ``arithmetic="float32"`` computes float64 inputs in float64, so upcast inputs give the truth. Returns 0-dim
    float32, or float64 where the convention reduces in float64.
    """
    convention = conventions.resolve(convention)
    layout = layout or convention.layout
    if prediction == "x0":
        noisy = sigma = None
    critic_scale = guidance if fake_guidance is None else fake_guidance
    critic = x0_prediction(fake, fake_uncond, critic_scale, convention, layout, noisy, sigma)
    teacher = x0_prediction(real, real_uncond, guidance, convention, layout, noisy, sigma)
    found = direction(student, critic, teacher, guidance, convention, layout, sample_weight)
    return loss_of_direction(student, found, convention, mask, sample_weight)


def loss_of_direction(
    student: Tensor, found: Direction, convention: Convention, mask: Tensor | None, sample_weight: Tensor | None
) -> Tensor:
    """coefficient · reduce(penalty(x - sg(x - g))), over the selected elements; nothing selected gives 0."""
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
    penalty = _penalty(residual, convention)
    if convention.norm_divides == "loss":
        penalty = penalty / norm
    if sample_weight is not None and convention.weight_on == "loss":
        penalty = penalty * sample_weight.to(penalty.dtype).reshape(per_sample)
    if convention.reduction == "sum":
        total = penalty.sum()
    elif selected is not None:
        total = penalty.sum() / selected.sum().clamp(min=1)
    elif _plain_mse(convention, sample_weight):
        # Its gradient scales before it doubles: rounded and overflowing where the codebases' is.
        target = torch.zeros_like(residual) if found.target is None else found.target.to(x.dtype)
        total = torch.nn.functional.mse_loss(residual if found.target is None else x, target)
    else:
        total = penalty.mean()
    total = convention.coefficient * total
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


def _penalty(residual: Tensor, convention: Convention) -> Tensor:
    if convention.penalty == "l2":
        return residual.square()
    c = convention.huber_c
    root = (residual.square() + c * c).sqrt()
    return root - c if convention.arithmetic == "emulate" else residual.square() / (root + c)
