"""The one contract between a video model and everything above it.

The objective, the rollout and the trainer know a model only as a `VideoDenoiser`: latents, noise level and
condition in, velocity or x0 out. What a model's own network expects (timesteps, packed tokens, a reversed time
axis, epsilon) is converted inside its subclass and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Condition = Any
"""What `encode` returns: opaque to the trainer, which only passes it on. `None` for an unconditional model."""


def per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """`sigma` [B] in float32 (or wider), shaped to broadcast over `like` [B, ...]."""
    if sigma.shape != (like.shape[0],):
        raise ValueError(f"sigma: shape {tuple(sigma.shape)}; expected ({like.shape[0]},), one level per sample")
    sigma = sigma.to(torch.promote_types(like.dtype, torch.float32))
    return sigma.view(-1, *[1] * (like.dim() - 1))


class VideoDenoiser(nn.Module, ABC):
    """A flow-matching video model: x_t = (1 - sigma) x0 + sigma noise, velocity v = noise - x0.

    Latents are [B, F, C, H, W]; sigma is [B] in [0, 1], float32. Calls go through `forward`, so that hooks of
    sharding and compilation wrappers run. A model with another parameterisation overrides `add_noise` and
    `predict_x0` too.
    """

    latent_shape: tuple[int, int, int, int]
    """(F, C, H, W) of one sample."""

    @abstractmethod
    def forward(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """Velocity at x_t [B, F, C, H, W] and noise level sigma [B], in float32 or wider."""

    def predict_x0(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """Clean latents x0 = x_t - sigma v, [B, F, C, H, W], in float32 or wider."""
        velocity = self(x_t, sigma, cond)
        return x_t - per_sample(sigma, x_t) * velocity

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t = (1 - sigma) x0 + sigma noise, with sigma [B]."""
        level = per_sample(sigma, x0)
        return (1 - level) * x0 + level * noise

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of a batch of prompts."""
        raise TypeError(f"{type(self).__name__} is unconditional: it encodes no prompts; pass cond=None")

    def null_cond(self, batch: int) -> Condition:
        """The condition of the unconditional branch of guidance, for a batch of that size."""
        raise TypeError(f"{type(self).__name__} is unconditional: it has no null condition; use guidance=None")

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """What an optimizer of this role updates (an adapter's own weights when a base is shared)."""
        return (p for p in self.parameters() if p.requires_grad)
