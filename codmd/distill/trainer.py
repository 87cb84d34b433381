"""The update rule: one student update, then the critic's, on the student's own samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from codmd.models.base import Condition, VideoDenoiser

from .config import DistillConfig
from .objective import GeneratorLoss, critic_loss, generator_loss
from .rollout import draw_exit_step, rollout


@dataclass(frozen=True)
class CycleLog:
    """What one cycle measured; every value a detached scalar on the device (reading one synchronises)."""

    generator: GeneratorLoss
    critic: Tensor
    exit_step: int
    relation_to_dmd: Tensor | None
    """norm of lambda * grad(relation) over norm of grad(DMD), with respect to the sample; None when not asked."""


class Distiller:
    """Few-step distribution matching distillation of `teacher` into `student`, with a `critic` in between.

    Student and critic are expected to start from the teacher's weights. Randomness comes from two explicit
    generators: exit steps from one that is alike on all processes, noise from one of this process's own.

    Args:
        teacher: frozen; called without gradient.
        student: trained in place.
        critic: trained in place; the score of the student's distribution.
        config: the recipe.
        seed: of the exit steps, the same on every process.
        rank: of this process, which makes its noise differ from the others'.
        conditions: one condition per update for a batch of `config.batch_size`; None for unconditional models.
    """

    def __init__(
        self,
        teacher: VideoDenoiser,
        student: VideoDenoiser,
        critic: VideoDenoiser,
        config: DistillConfig,
        seed: int = 0,
        rank: int = 0,
        conditions: Iterator[Condition] | None = None,
    ) -> None:
        self.teacher, self.student, self.critic, self.config = teacher, student, critic, config
        self.device = next(iter(student.parameters())).device
        self.exit_generator = torch.Generator().manual_seed(seed)
        self.noise_generator = torch.Generator(self.device).manual_seed(seed * 65_537 + rank + 1)
        self.conditions = itertools.repeat(None) if conditions is None else conditions
        self.student_optimizer = self._optimizer(student, config.student_lr)
        self.critic_optimizer = self._optimizer(critic, config.critic_lr)

    def cycle(self, measure_gradients: bool = False) -> CycleLog:
        """One student update and `critic_updates` critic updates.

        Args:
            measure_gradients: also measure the relation term's gradient against DMD's (two more backward passes
                through the losses, none through a network).
        """
        config = self.config
        cond = next(self.conditions)
        sample, exit_step = self.draw_sample(cond)
        loss = generator_loss(sample, self.teacher, self.critic, config, self.noise_generator, cond)
        ratio = loss.gradient_ratio(sample) if measure_gradients and config.uses_relation else None
        self._update(self.student_optimizer, loss.total)

        shared = (sample.detach(), cond) if config.share_rollout else None
        for _ in range(config.critic_updates):
            critic = self.critic_update(*(shared or self._fresh()))
            shared = None
        return CycleLog(loss.detach(), critic, exit_step, ratio)

    def draw_sample(self, cond: Condition) -> tuple[Tensor, int]:
        """A batch of the student's predictions at a random exit step, and that step."""
        exit_step = draw_exit_step(len(self.config.sigmas), self.exit_generator)
        shape = (self.config.batch_size, *self.student.latent_shape)
        noise = torch.randn(shape, device=self.device, generator=self.noise_generator)
        return rollout(self.student, noise, self.config.sigmas, exit_step, self.noise_generator, cond), exit_step

    def critic_update(self, sample: Tensor, cond: Condition) -> Tensor:
        """One flow-matching update of the critic on detached samples; returns its detached loss."""
        loss = critic_loss(self.critic, sample, self.config, self.noise_generator, cond)
        self._update(self.critic_optimizer, loss)
        return loss.detach()

    def _fresh(self) -> tuple[Tensor, Condition]:
        cond = next(self.conditions)
        with torch.no_grad():
            return self.draw_sample(cond)[0], cond

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.grad_clip is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        optimizer.step()

    def _optimizer(self, model: VideoDenoiser, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            list(model.trainable_parameters()),
            lr=lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
