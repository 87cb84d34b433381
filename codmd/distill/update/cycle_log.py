"""Measurements of one cycle: losses, gradient norms, and signs of collapse (over-saturation, frozen motion)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import GeneratorLoss
from .optimizer import Step


class CollapseRatios(NamedTuple):
    """A student's sample against the teacher's x0 prediction of it, 0-dim tensors.

    The teacher's prediction from a noised sample is smoother than a sample, so the level of both ratios is above 1
    from the start; what matters is where they go. A rising `std_ratio` is over-saturation, a falling
    `frame_difference_ratio` is motion that freezes.
    """

    std_ratio: Tensor
    frame_difference_ratio: Tensor


@dataclass(frozen=True)
class CycleLog:
    """What one cycle measured; tensors are detached scalars on the device (reading one synchronises).

    Attributes:
        generator: the student's loss, averaged over its micro-batches.
        critic: the loss of the last critic update.
        exit_step: of the last micro-batch of the student update.
        student, critic_step: the student's update, and the last of the critic's.
        relation_to_dmd: norm of lambda * grad(relation) over norm of grad(DMD), with respect to the last sample;
            None when not asked for.
        collapse: over-saturation and frozen motion of the last sample; None when not asked for.
        diversity: the first-step loss, unweighted; None where it is off.
    """

    generator: GeneratorLoss
    critic: Tensor
    exit_step: int
    student: Step
    critic_step: Step
    relation_to_dmd: Tensor | None
    collapse: CollapseRatios | None
    diversity: Tensor | None = None

    def scalars(self) -> dict[str, Tensor | float]:
        """Name to value, for a log."""
        loss = self.generator
        measured: dict[str, Tensor] = {} if self.collapse is None else self.collapse._asdict()
        if self.relation_to_dmd is not None:
            measured["relation_to_dmd"] = self.relation_to_dmd
        if self.diversity is not None:
            measured["diversity"] = self.diversity
        return {
            "loss": loss.total, "dmd": loss.dmd, "relation_batch": loss.relation_batch,
            "relation_frame": loss.relation_frame, "relation_weight": loss.relation_weight, "critic": self.critic,
            "student_grad_norm": self.student.grad_norm, "critic_grad_norm": self.critic_step.grad_norm,
            "exit_step": float(self.exit_step), **measured,
        }  # fmt: skip


@torch.no_grad()
def collapse_ratios(sample: Tensor, real: Tensor) -> CollapseRatios:
    """Ratios of the standard deviation and of the mean absolute difference of neighbouring frames.

    Args:
        sample, real: [B, F, C, H, W]. With one frame the second ratio is NaN: there is no motion to compare.
    """
    return CollapseRatios(sample.std() / real.std(), _frame_difference(sample) / _frame_difference(real))


def _frame_difference(latents: Tensor) -> Tensor:
    return latents.diff(dim=1).abs().mean()
