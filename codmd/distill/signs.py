"""Early signs of what goes wrong in few-step distillation: over-saturation and frozen motion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EarlySigns(NamedTuple):
    """A student's sample against the teacher's x0 prediction of it, 0-dim tensors.

    The teacher's prediction from a noised sample is smoother than a sample, so the level of both ratios is above 1
    from the start; what matters is where they go. A rising `std_ratio` is over-saturation, a falling
    `frame_difference_ratio` is motion that freezes.
    """

    std_ratio: Tensor
    frame_difference_ratio: Tensor


@torch.no_grad()
def early_signs(sample: Tensor, real: Tensor) -> EarlySigns:
    """Ratios of the standard deviation and of the mean absolute difference of neighbouring frames.

    Args:
        sample, real: [B, F, C, H, W]. With one frame the second ratio is NaN: there is no motion to compare.
    """
    return EarlySigns(sample.std() / real.std(), _frame_difference(sample) / _frame_difference(real))


def _frame_difference(latents: Tensor) -> Tensor:
    return latents.diff(dim=1).abs().mean()
