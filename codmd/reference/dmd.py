"""The distribution matching loss in plain PyTorch (DMD, arXiv 2311.18828; Self-Forcing, arXiv 2506.08009)."""

from __future__ import annotations

import torch
from torch import Tensor

from codmd.reference.relation import compute_dtype


def guided(cond: Tensor, uncond: Tensor, scale: float, form: str = "cond") -> Tensor:
    """Classifier-free guidance: ``"cond"`` is c + s(c - u), ``"uncond"`` is u + s(c - u), the same at s + 1."""
    return (cond if form == "cond" else uncond) + scale * (cond - uncond)


def dmd_direction(student: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """g = (f - r) / mean|x - r|, the mean over all axes but the first; ``nan_to_num`` as Self-Forcing applies it."""
    axes = tuple(range(1, student.ndim))
    return torch.nan_to_num((fake - real) / (student - real).abs().mean(axes, keepdim=True))


def dmd_loss(student: Tensor, fake: Tensor, real: Tensor, mask: Tensor | None = None) -> Tensor:
    """½ mean(g²) in value and ∂L/∂x = g / numel; with a boolean ``mask`` both means are over its elements."""
    dtype = compute_dtype(student.dtype)
    x, f, r = student.to(dtype), fake.detach().to(dtype), real.detach().to(dtype)
    direction = dmd_direction(x.detach(), f, r)
    residual = x - x.detach() + direction
    if mask is not None:
        selected = residual[mask.expand_as(residual)]
        return 0.5 * selected.square().sum() / max(selected.numel(), 1)
    return 0.5 * residual.square().mean()
