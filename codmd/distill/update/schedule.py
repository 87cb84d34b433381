"""Noise levels: the flow-matching shift, the student's step list, and the levels at which scores are compared.

sigma = 1 is pure noise, sigma = 0 a clean latent; the `t of 1000` that Wan's papers print is 1000 sigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .noise import Randomness, uniform

MAX_STEPS = 8
LEAST_FIRST = 0.95
"""First level of a step list; rCM's is 0.98765. Further below, a list lacks its first step."""


def shift_sigma(t: Tensor, shift: float) -> Tensor:
    """t' = shift t / (1 + (shift - 1) t), elementwise on [0, 1]: more weight to high noise for shift > 1."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """`steps` levels from 1 downwards, evenly spaced before the shift; the end point 0 is left out.

    >>> sampling_sigmas(4, shift=3.0)
    (1.0, 0.9, 0.75, 0.5)
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}; expected at least 1")
    return tuple(shift * t / (1 + (shift - 1) * t) for t in ((steps - i) / steps for i in range(steps)))


def check_step_list(sigmas: Sequence[float]) -> tuple[float, ...]:
    """The student's step list: 1 to 8 levels, the first 1.0 or just below, strictly falling, the last above 0.

    Raises:
        ValueError: naming what is wrong with the list.
    """
    levels = tuple(float(sigma) for sigma in sigmas)
    if not 1 <= len(levels) <= MAX_STEPS:
        raise ValueError(f"sigmas: got {len(levels)} levels; expected 1 to {MAX_STEPS}")
    if not LEAST_FIRST <= levels[0] <= 1:
        raise ValueError(f"sigmas: the first level is {levels[0]}; expected 1.0, pure noise, or {LEAST_FIRST} at least")
    if not all(high > low for high, low in pairwise(levels)) or not levels[-1] > 0:
        raise ValueError(f"sigmas: got {levels}; expected levels that fall strictly and stay above 0")
    return levels


def check_sigma_range(sigma_range: Sequence[float]) -> tuple[float, float]:
    """(lowest, highest) level at which scores are compared, 0 < lowest < highest <= 1."""
    low, high = (float(sigma) for sigma in sigma_range)
    if not 0 < low < high <= 1 or not math.isfinite(high):
        raise ValueError(f"sigma_range: got ({low}, {high}); expected 0 < lowest < highest <= 1")
    return low, high


def sample_sigma(
    batch: int,
    shift: float,
    sigma_range: tuple[float, float],
    randomness: Randomness,
    device: torch.device,
    highest: float = 1.0,
    drawn: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Training levels [batch], float32: uniform in `drawn`, shifted, scaled to `highest`, clamped to `sigma_range`."""
    low, high = drawn
    level = low + (high - low) * uniform(batch, randomness, device)
    return (highest * shift_sigma(level, shift)).clamp(*sigma_range)
