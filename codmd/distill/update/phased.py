"""Score matching for a student that ends above noise level 0: the forward process from its samples, and the target.

A sample x_s of level s = `end` is noised to level t > s by x_t = a x_s + b noise with

    a = (1 - t) / (1 - s),   b^2 = t^2 - a^2 s^2 = (t - s) (t + a s) / (1 - s),

the law of x_t then being that of the flow x_t = (1 - t) x_0 + t noise wherever x_s has that of x_s. A network's x0 at
level t means the score, x0 = (x_t + t^2 score(x_t)) / (1 - t), and E[-noise/b | x_t] is the score of the x_t that
samples x_s give; the regression target of x0 is therefore

    (x_t - t^2 noise / b) / (1 - t) = (x_s - (a s^2 / b) noise) / (1 - s).

For s = 0 it is x_0. Near t = s it has the variance of 1/b; errors are weighted by b/t, which is 1 for s = 0 and leaves
the minimum at every level where it is. Source: Phased DMD, arXiv 2510.27684.
"""

from __future__ import annotations

from torch import Tensor

from codmd.models.base import VideoDenoiser, per_sample


def noised(model: VideoDenoiser, x_s: Tensor, noise: Tensor, sigma: Tensor, end: float) -> Tensor:
    """x_t [B, F, C, H, W] at levels `sigma` [B], above `end`, from samples x_s of level `end`."""
    if end == 0:
        return model.add_noise(x_s, noise, sigma)
    a, b = coefficients(per_sample(sigma, x_s), end)
    return a * x_s + b * noise


def velocity_error(x0: Tensor, x_s: Tensor, noise: Tensor, sigma: Tensor, end: float) -> Tensor:
    """(b/t) (velocity - its target), of a prediction x0 at the x_t of :func:`noised`; for `end` 0, (x0 - x_s) / t."""
    level = per_sample(sigma, x_s)
    if end == 0:
        return (x0 - x_s) / level
    a, b = coefficients(level, end)
    return (b * x0 - (b * x_s - a * end**2 * noise) / (1 - end)) / level**2


def coefficients(level: Tensor, end: float) -> tuple[Tensor, Tensor]:
    """a and b of noise levels t = `level` from s = `end`."""
    a = (1 - level) / (1 - end)
    return a, ((level - end).clamp(min=0) * (level + a * end) / (1 - end)).sqrt()
