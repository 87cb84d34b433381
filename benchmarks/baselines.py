"""The relation loss in eager PyTorch, the two sides that a speed-up is quoted against.

``eager_relation_loss`` is how such a loss is usually written in training code: a loop over samples, float32
working copies of the three latents, ``F.normalize``, softmax, ``F.kl_div`` and autograd. ``lean_relation_loss`` is
the same mathematics by somebody who minds the memory: no loop before the features, no copy of a float32 latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(features: Tensor) -> Tensor:
    """Cosine similarities ``[N, N]`` of the rows of ``[N, K]``."""
    units = F.normalize(features, dim=-1)
    return units @ units.T


def relation_kl(student: Tensor, real: Tensor, fake: Tensor, temperature: float) -> Tensor:
    """KL(softmax((S(x) - S(f) + S(r))/τ) ‖ softmax(S(x)/τ)), mean over the rows of ``[N, K]`` features."""
    relation = similarity(student)
    with torch.no_grad():
        target = F.softmax((relation - (similarity(fake) - similarity(real))) / temperature, dim=-1)
    return F.kl_div(F.log_softmax(relation / temperature, dim=-1), target, reduction="batchmean")


def frame_features(latents: Tensor, pool: str | None) -> Tensor:
    """``[..., F, C, H, W]`` to ``[..., F, K]``: the spatial mean, or every pixel for ``pool=None``."""
    return latents.mean(dim=(-2, -1)) if pool == "mean" else latents.flatten(-3)


def combine(
    features: list[tuple[Tensor, Tensor, Tensor]], temperature: float, batch_weight: float, frame_weight: float
) -> Tensor:
    """The weighted terms of per-sample features (student, real, fake), each ``[F, K]``."""
    total = features[0][0].new_zeros(())
    if frame_weight and len(features[0][0]) > 1:
        losses = [relation_kl(*sample, temperature) for sample in features]
        total = total + frame_weight * torch.stack(losses).mean()
    if batch_weight and len(features) > 1:
        student, real, fake = (torch.stack(rows).mean(dim=1) for rows in zip(*features, strict=True))
        total = total + batch_weight * relation_kl(student, real, fake, temperature)
    return total


def eager_relation_loss(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    temperature: float = 0.1,
    batch_weight: float = 1.0,
    frame_weight: float = 1.0,
    pool: str | None = "mean",
) -> Tensor:
    """Relation loss of ``[B, F, C, H, W]`` latents as usually written; ``pool`` is ``"mean"`` or ``None``."""
    features = []
    for b in range(len(student)):
        x, r, f = (latents[b].to(torch.float32, copy=True) for latents in (student, real, fake))
        features.append((frame_features(x, pool), frame_features(r, pool), frame_features(f, pool)))
    return combine(features, temperature, batch_weight, frame_weight)


def lean_relation_loss(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    temperature: float = 0.1,
    batch_weight: float = 1.0,
    frame_weight: float = 1.0,
    pool: str | None = "mean",
) -> Tensor:
    """As :func:`eager_relation_loss`, pooling whole batches and copying half-precision latents alone."""
    x, r, f = (frame_features(latents.float(), pool) for latents in (student, real, fake))
    return combine(list(zip(x, r, f, strict=True)), temperature, batch_weight, frame_weight)
