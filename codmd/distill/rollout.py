"""Sampling: the few-step student (backward simulation) and the many-step teacher (Euler)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from codmd.models.base import Condition, VideoDenoiser, per_sample


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the shape, dtype and device of x, from an explicit generator."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def draw_exit_step(steps: int, generator: torch.Generator) -> int:
    """The step, 0 to steps - 1, whose x0 prediction the next update trains on; uniform.

    `generator` lives on the CPU and is seeded alike on every process, so that sharded networks stay in step.
    """
    return int(torch.randint(steps, (), generator=generator))


def rollout(
    student: VideoDenoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    exit_step: int,
    generator: torch.Generator,
    cond: Condition = None,
) -> Tensor:
    """The student's own trajectory up to `exit_step`: x0 prediction, renoised to the next level, and so on.

    Steps before `exit_step` run without gradient and those after it not at all; the last prediction carries the
    caller's gradient mode.

    Args:
        noise: [B, F, C, H, W], the state at sigmas[0] = 1.
        sigmas: the step list.
        exit_step: index into `sigmas`.

    Returns:
        x0 prediction at sigmas[exit_step], [B, F, C, H, W].
    """
    batch = noise.shape[0]
    levels = [torch.full((batch,), sigma, device=noise.device) for sigma in sigmas[: exit_step + 1]]
    x_t = noise
    with torch.no_grad():
        for level, following in pairwise(levels):
            x0 = student.predict_x0(x_t, level, cond)
            x_t = student.add_noise(x0, noise_like(x0, generator), following)
    return student.predict_x0(x_t, levels[-1], cond)


@torch.no_grad()
def sample_few_step(
    student: VideoDenoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    generator: torch.Generator,
    cond: Condition = None,
) -> Tensor:
    """Samples x0 [B, F, C, H, W] of the student: the full rollout, len(sigmas) network evaluations."""
    return rollout(student, noise, sigmas, len(sigmas) - 1, generator, cond)


@torch.no_grad()
def sample_euler(model: VideoDenoiser, noise: Tensor, sigmas: Sequence[float], cond: Condition = None) -> Tensor:
    """Samples x0 [B, F, C, H, W] along the probability flow: Euler steps through `sigmas` and on to 0."""
    x_t = noise
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        level = torch.full((noise.shape[0],), sigma, device=noise.device)
        # Through predict_x0, so that every parameterisation samples: v = (x_t - x0) / sigma.
        velocity = (x_t - model.predict_x0(x_t, level, cond)) / per_sample(level, x_t)
        x_t = x_t + (following - sigma) * velocity
    return x_t
