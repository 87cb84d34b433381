"""First-step diversity: the student's first step follows the teacher's path, later steps match distributions.

Distribution matching lets samples of different noise agree; the first level decides layout and motion, so that is where
diversity is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codmd.distill.config.recipe import DistillConfig
from codmd.models.base import Condition, VideoDenoiser

from .objective import guided_path
from .schedule import sampling_sigmas


def first_step_loss(
    student: VideoDenoiser, teacher: VideoDenoiser, noise: Tensor, config: DistillConfig, cond: Condition = None
) -> Tensor:
    """mean |v(noise, 1) - (noise - x_a)/(1 - sigma_a)|^2 with v the student's velocity; 0-dim, not yet weighted.

    x_a is the state of the guided teacher after the first k of n Euler steps from the same noise, sigma_a its level;
    (k, n) = `config.diversity_steps`. One student forward with gradient, k guided teacher evaluations without.

    Args:
        noise: [B, F, C, H, W], the state at level 1.

    Source: DP-DMD, arXiv 2602.03139.
    """
    taken, of = config.diversity_steps
    levels = sampling_sigmas(of, config.shift)[: taken + 1]
    state = guided_path(teacher, noise, levels, config, cond)
    top = torch.ones(len(noise), device=noise.device)
    velocity = noise - student.predict_x0(noise, top, cond)
    error = velocity - (noise - state) / (1 - levels[-1])
    return error[:, student.known_frames :].square().mean()
