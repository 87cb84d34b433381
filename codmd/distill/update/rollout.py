"""Sampling: the few-step student (backward simulation) and the many-step teacher (Euler)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from codmd.models.base import Condition, VideoDenoiser

from .noise import Randomness, noise_like

__all__ = ["draw_exit_step", "euler_step", "noise_like", "rollout", "sample_euler", "sample_few_step", "trajectory"]

Transition = Literal["renoise", "euler"]


def draw_exit_step(steps: int, generator: torch.Generator) -> int:
    """The step, 0 to steps - 1, whose x0 prediction the next update trains on; uniform.

    `generator` lives on the CPU and is seeded alike on every process, so that sharded networks stay in step.
    """
    return int(torch.randint(steps, (), generator=generator))


@torch.no_grad()
def trajectory(
    student: VideoDenoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    exit_step: int,
    randomness: Randomness,
    cond: Condition = None,
    transition: Transition = "renoise",
) -> tuple[Tensor, Tensor]:
    """The student's own trajectory to `exit_step`: x0 prediction, on to the next level, and so on.

    Args:
        noise: [B, F, C, H, W]; `sigmas[0]` times it is the first state, the noise itself where that level is 1.
        sigmas: the step list.
        exit_step: index into `sigmas`; later steps do not run.
        transition: from a prediction to the next level: noised anew, or an Euler step, which draws nothing.

    Returns:
        The state x_t [B, F, C, H, W] and the level [B] of that step, after `exit_step` network evaluations.
    """
    levels = [torch.full((len(noise),), sigma, device=noise.device) for sigma in sigmas[: exit_step + 1]]
    x_t = sigmas[0] * noise
    for step, (level, following) in enumerate(pairwise(levels)):
        x0 = student.predict_x0(x_t, level, cond)
        if transition == "euler":
            x_t = euler_step(x_t, x0, sigmas[step], sigmas[step + 1])
        else:
            x_t = student.add_noise(x0, noise_like(x0, randomness), following)
    return x_t, levels[-1]


def rollout(
    student: VideoDenoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    exit_step: int,
    randomness: Randomness,
    cond: Condition = None,
    transition: Transition = "renoise",
) -> Tensor:
    """x0 prediction [B, F, C, H, W] at `exit_step` of the student's own `trajectory`.

    Steps before `exit_step` run without gradient; the last prediction carries the caller's gradient mode.
    """
    x_t, level = trajectory(student, noise, sigmas, exit_step, randomness, cond, transition)
    return student.predict_x0(x_t, level, cond)


@torch.no_grad()
def sample_few_step(
    student: VideoDenoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    randomness: Randomness,
    cond: Condition = None,
    transition: Transition = "renoise",
) -> Tensor:
    """Samples x0 [B, F, C, H, W] of the student: the full rollout, len(sigmas) network evaluations."""
    return rollout(student, noise, sigmas, len(sigmas) - 1, randomness, cond, transition)


@torch.no_grad()
def sample_euler(model: VideoDenoiser, noise: Tensor, sigmas: Sequence[float], cond: Condition = None) -> Tensor:
    """Samples x0 [B, F, C, H, W] along the probability flow: Euler steps through `sigmas` and on to 0."""
    x_t = noise
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        level = torch.full((noise.shape[0],), sigma, device=noise.device)
        # Through predict_x0, so that every parameterisation samples.
        x_t = euler_step(x_t, model.predict_x0(x_t, level, cond), sigma, following)
    return x_t


def euler_step(x_t: Tensor, x0: Tensor, sigma: float, following: float) -> Tensor:
    """From level sigma to the following one along the velocity (x_t - x0)/sigma."""
    return x_t + (following - sigma) * ((x_t - x0) / sigma)
