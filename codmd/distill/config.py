"""The distillation recipe: every number of the update rule, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .schedule import check_sigma_range, check_step_list


@dataclass(frozen=True)
class DistillConfig:
    """One recipe of few-step distribution matching distillation.

    Attributes:
        sigmas: the student's step list, noise levels from 1 downwards.
        shift: flow-matching shift of the training levels.
        sigma_range: lowest and highest training level.
        batch_size: samples per update (on this process).
        critic_updates: critic updates per student update.
        share_rollout: the first critic update of a cycle trains on the sample of its student update.
        student_lr, critic_lr: Adam learning rates.
        betas: Adam's moment decays.
        weight_decay: decoupled weight decay.
        grad_clip: largest gradient norm of an update; None leaves it as it is.
        guidance: teacher guidance scale s in c + s (c - u); None for the conditional prediction alone.
        relation_weight: lambda, the weight of the relation term; 0 is plain DMD.
        temperature: tau of the relation term.
        batch_weight, frame_weight: weights of the relation between samples and between frames.
    """

    sigmas: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5)
    shift: float = 3.0
    sigma_range: tuple[float, float] = (0.02, 0.98)
    batch_size: int = 64
    critic_updates: int = 5
    share_rollout: bool = True
    student_lr: float = 1e-4
    critic_lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.0
    grad_clip: float | None = None
    guidance: float | None = None
    relation_weight: float = 0.1
    temperature: float = 0.1
    batch_weight: float = 1.0
    frame_weight: float = 1.0

    def __post_init__(self) -> None:
        check_step_list(self.sigmas)
        check_sigma_range(self.sigma_range)
        for name in ("batch_size", "critic_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 1")
        for name in ("shift", "student_lr", "critic_lr", "temperature"):
            _check(name, getattr(self, name), positive=True)
        for name in ("weight_decay", "relation_weight", "batch_weight", "frame_weight"):
            _check(name, getattr(self, name), positive=False)
        if self.grad_clip is not None:
            _check("grad_clip", self.grad_clip, positive=True)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}; expected two numbers in [0, 1)")

    @property
    def uses_relation(self) -> bool:
        """Whether the relation term is part of the objective."""
        return self.relation_weight > 0 and self.batch_weight + self.frame_weight > 0


def _check(name: str, value: float, positive: bool) -> None:
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}: got {value}; expected a finite number {'above 0' if positive else '>= 0'}")
