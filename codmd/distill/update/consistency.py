"""The consistency term: the student's map from x_t to x0 is constant along the teacher's path.

f(x, t) = cos t x - sin t F(x, t). Along dx/dt = F_T, the teacher's guided field, the tangent that is trained on is
cos t df/dt with a warm-up r in [0, 1]:

    g = -cos t sqrt(1 - r² sin² t) (F⁻ - F_T) - r cos t sin t x - [cos t sin t dF⁻/dt],

where F⁻ is the student's field without gradient, and dF⁻/dt its derivative along (F_T, 1). Per sample,
loss = 100 sum (F - F⁻ - g / (|g| + 0.1))². Sources: sCM (arXiv 2410.11081), rCM (arXiv 2510.08431).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codmd import conventions, reference
from codmd.distill.config.consistency import ConsistencyConfig
from codmd.distill.config.recipe import DistillConfig
from codmd.models.base import Condition, VideoDenoiser, cat_cond

from .noise import Randomness, noise_like, normal
from .trigflow import cos_sin, field, field_difference, field_jvp

SCALE = 100.0
SOFTENING = 0.1
"""c of the normalised tangent g / (|g| + c)."""


@dataclass(frozen=True)
class ConsistencyLoss:
    """The term and what was found on the way, scalars.

    Attributes:
        loss: summed over the samples.
        tangent_norm: mean of |g| over the samples kept, before it is normalised; NaN where none is.
        derivative_norm: mean of |dF/dt|, likewise.
        dropped: samples whose tangent is not a number, which count nothing.
    """

    loss: Tensor
    tangent_norm: Tensor
    derivative_norm: Tensor
    dropped: Tensor


def sample_time(batch: int, config: ConsistencyConfig, randomness: Randomness, device: torch.device) -> Tensor:
    """Times [batch], float64: sigma / (1 - sigma) = tan t is log-normal."""
    draw = normal((batch,), randomness, device, torch.float64)
    return (config.log_mean + config.log_std * draw).exp().atan()


@torch.no_grad()
def guided_field(teacher: VideoDenoiser, x_t: Tensor, t: Tensor, config: DistillConfig, cond: Condition) -> Tensor:
    """F_T, after guidance: the form is that of the configuration's convention."""
    if config.guidance is None:
        return field(teacher, x_t, t, cond)
    null = teacher.without_prompt(cond, len(x_t))
    if config.batch_guidance:
        both = field(teacher, torch.cat((x_t, x_t)), torch.cat((t, t)), cat_cond((cond, null)))
        real, uncond = both.chunk(2)
    else:
        real, uncond = field(teacher, x_t, t, cond), field(teacher, x_t, t, null)
    return reference.guided(real, uncond, config.guidance, conventions.resolve(config.convention).guidance_form)


def consistency_loss(
    student: VideoDenoiser,
    teacher: VideoDenoiser,
    x0: Tensor,
    config: DistillConfig,
    randomness: Randomness,
    warmth: float,
    cond: Condition = None,
) -> ConsistencyLoss:
    """The term on noised data x0 [B, F, C, H, W], one time a sample.

    Args:
        warmth: r, 1 after the warm-up.
    """
    t = sample_time(len(x0), config.consistency, randomness, x0.device)
    cos, sin = cos_sin(t, x0.double())
    x_t = cos * x0.double() + sin * noise_like(x0, randomness).double()
    towards = guided_field(teacher, x_t, t, config, cond)
    derivative = field_jvp if config.consistency.tangent == "jvp" else field_difference
    # The factor cos t sin t belongs to the direction: the product stays bounded where dF/dt does not.
    moved = derivative(student, x_t, t, cos * sin * towards, t.cos() * t.sin(), cond)
    own = field(student, x_t, t, cond)
    fixed = own.detach()
    with torch.no_grad():
        derivative_norm = (moved / (cos * sin)).flatten(1).norm(dim=1)
        if config.method == "scm":  # the paper's r scales this part too, rCM's code does not
            moved = warmth * moved
        g = -cos * (1 - (warmth * sin).square()).sqrt() * (fixed - towards) - warmth * cos * sin * x_t - moved
        norm = g.flatten(1).norm(dim=1).view(-1, *[1] * (g.dim() - 1))
        kept = ~norm.isnan()
        target = fixed + g / (norm + SOFTENING)
    squares = torch.where(kept, own - target, 0).square()
    return ConsistencyLoss(SCALE * squares.sum(), norm.nanmean(), derivative_norm.nanmean(), (~kept).sum().double())
