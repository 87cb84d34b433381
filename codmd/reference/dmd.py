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
from codmd.reference.relation import compute_dtype

FRAME_AXIS = {"bfchw": 1, "bcfhw": 2, "bchw": None}


class Direction(NamedTuple):
    """g, the norm that divides (broadcasts), the guided ``real``, and x - g where a codebase rounds it."""

    g: Tensor
    norm: Tensor
    real: Tensor
    target: Tensor | None


def guided(cond: Tensor, uncond: Tensor, scale: float, form: str = "cond") -> Tensor:
    """Classifier-free guidance: ``"cond"`` is c + s(c - u), ``"uncond"`` is u + s(c - u), the same at s + 1."""
    return (cond if form == "cond" else uncond) + scale * (cond - uncond)


def x0_from_flow(noisy: Tensor, velocity: Tensor, sigma: Tensor, layout: str = "bfchw") -> Tensor:
    """x0 = x_t - σ v, in the dtype of x_t; ``sigma`` is ``[B]`` or, per frame, ``[B, F]``."""
    return noisy - per_frame(sigma, noisy, layout) * velocity


def per_frame(values: Tensor, latents: Tensor, layout: str) -> Tensor:
    """``[B]`` or ``[B, F]`` values in the latents' dtype, shaped to broadcast against the latents."""
    shape = [len(latents)] + [1] * (latents.ndim - 1)
    frame_axis = FRAME_AXIS[layout]
    if values.ndim == 2 and frame_axis is not None:
        shape[frame_axis] = latents.shape[frame_axis]
    return values.to(latents.dtype).reshape(shape)


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


def dmd_direction(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    convention: str | Convention = "self_forcing",
    *,
    real_uncond: Tensor | None = None,
    fake_uncond: Tensor | None = None,
    guidance: float = 3.5,
    fake_guidance: float | None = None,
    layout: str | None = None,
    prediction: str = "x0",
    noisy: Tensor | None = None,
    sigma: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """g = nan((f - r)/norm) as the convention computes it; arguments as :func:`dmd_loss`. No gradient."""
    convention = conventions.resolve(convention)
    return _direction(
        student, fake, real, real_uncond, fake_uncond, guidance, fake_guidance, convention,
        layout or convention.layout, prediction, noisy, sigma, sample_weight,
    ).g  # fmt: skip


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
    direction = _direction(
        student, fake, real, real_uncond, fake_uncond, guidance, fake_guidance, convention,
        layout or convention.layout, prediction, noisy, sigma, sample_weight,
    )  # fmt: skip
    return loss_of_direction(student, direction, convention, mask, sample_weight)


def loss_of_direction(
    student: Tensor, direction: Direction, convention: Convention, mask: Tensor | None, sample_weight: Tensor | None
) -> Tensor:
    """coefficient · reduce(penalty(x - sg(x - g))), over the selected elements; nothing selected gives 0."""
    x, norm = student.to(_dtype(convention, "loss", student)), direction.norm
    if direction.target is None:
        residual = x - x.detach() + direction.g
    else:
        residual = x - direction.target.to(x.dtype)
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
    elif _plain_mse(convention, sample_weight) and direction.target is not None:
        # In half precision the gradient is rounded where only this operator rounds it.
        total = torch.nn.functional.mse_loss(x, direction.target.to(x.dtype))
    else:
        total = penalty.mean()
    total = convention.coefficient * total
    return total if total.dtype is torch.float64 else total.float()


def mean_direction(direction: Direction, mask: Tensor | None) -> Tensor:
    """mean|g| over the selected elements; nothing selected gives 0."""
    magnitude = direction.g.abs()
    if mask is None:
        return magnitude.mean()
    selected = mask.expand_as(magnitude)
    return torch.where(selected, magnitude, 0).sum() / selected.sum().clamp(min=1)


def _direction(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    guidance: float,
    fake_guidance: float | None,
    convention: Convention,
    layout: str,
    prediction: str,
    noisy: Tensor | None,
    sigma: Tensor | None,
    sample_weight: Tensor | None,
) -> Direction:
    emulate = convention.arithmetic == "emulate"
    x = student.detach()
    predictions = [None if p is None else p.detach() for p in (fake, fake_uncond, real, real_uncond)]
    dtype = x.dtype if emulate else _dtype(convention, "direction", student)
    if prediction == "flow":
        assert noisy is not None
        assert sigma is not None
        wide = torch.float64 if emulate else dtype
        predictions = [
            None if p is None else x0_from_flow(noisy.to(wide), p.to(wide), sigma, layout) for p in predictions
        ]
    f, f_uncond, r, r_uncond = (None if p is None else p.to(dtype) for p in predictions)
    assert f is not None
    assert r is not None
    cond = r
    if r_uncond is not None:
        r = _guided(r, r_uncond, guidance, convention)
    if f_uncond is not None:
        f = _guided(f, f_uncond, guidance if fake_guidance is None else fake_guidance, convention)

    norm_dtype, g_dtype = _dtype(convention, "norm", student), _dtype(convention, "direction", student)
    norm = normaliser(x.to(norm_dtype), r.to(norm_dtype), convention, layout)
    weight = None
    if sample_weight is not None and convention.weight_on == "direction":
        weight = sample_weight.to(norm_dtype).reshape([-1] + [1] * (x.ndim - 1))
    difference = f.to(g_dtype) - r.to(g_dtype)
    if convention.norm_divides == "loss":
        g = difference
    elif emulate and convention.rounding.reciprocal:
        factor = 1 / norm if weight is None else 1 / norm * weight
        g = difference * factor.to(g_dtype)
    else:
        g = difference / norm
        g = g if weight is None else g * weight
    if convention.nan == "to_num":
        g = g.nan_to_num()
    if not emulate:
        return Direction(g, norm, r, None)
    target_dtype = _dtype(convention, "target", student)
    target = x.to(target_dtype) - g.to(target_dtype)
    if convention.rounding.split_target and r_uncond is not None:
        target = (x + (cond - f)) + convention.cond_scale(guidance) * (cond - r_uncond)
    return Direction(g, norm, r, target)


def _guided(cond: Tensor, uncond: Tensor, scale: float, convention: Convention) -> Tensor:
    base = convention.rounding.guidance_base if convention.arithmetic == "emulate" else convention.guidance_form
    if base == convention.guidance_form:
        return guided(cond, uncond, scale, base)
    return guided(cond, uncond, scale - 1 if base == "cond" else scale + 1, base)


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


def _dtype(convention: Convention, step: str, student: Tensor) -> torch.dtype:
    """The dtype of one step: ``rounding`` decides under emulation, ``arithmetic`` otherwise."""
    if convention.arithmetic == "float64":
        return torch.float64
    if convention.arithmetic == "float32":
        return compute_dtype(student.dtype)
    dtypes = {"input": student.dtype, "float32": torch.float32, "float64": torch.float64}
    return dtypes[getattr(convention.rounding, step)]
