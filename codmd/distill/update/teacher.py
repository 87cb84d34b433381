"""The training of a teacher from scratch: flow matching on videos, with dropped conditions for guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from codmd.distill.config.recipe import split_batch
from codmd.distill.config.sections import TeacherSettings
from codmd.models.base import Condition, VideoDenoiser, per_sample

from .ema import WeightAverage
from .noise import NoiseStream, noise_like, uniform
from .optimizer import GuardedAdamW, Step, trainable_weights
from .schedule import shift_sigma


@dataclass(frozen=True)
class TeacherLog:
    """What one update measured."""

    loss: Tensor
    step: Step
    lr: float

    def scalars(self) -> dict[str, Tensor | float]:
        """Name to value, for a log."""
        return {"loss": self.loss, "grad_norm": self.step.grad_norm, "lr": self.lr}


class FlowMatching:
    """Trains `model` to predict the velocity noise - x0 of noised videos.

    Args:
        model: trained in place.
        videos: (latents [B, F, C, H, W], condition) of this process's next micro-batch, without end.
        settings: see `TeacherSettings`.
        seed: of the noise.
        group: the data-parallel processes; None for this one alone.

    Attributes:
        update: optimizer steps made.
        average: the running average of the weights, None without `ema_decay`.
    """

    def __init__(
        self,
        model: VideoDenoiser,
        videos: Iterator[tuple[Tensor, Condition]],
        settings: TeacherSettings,
        seed: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model, self.videos, self.settings = model, videos, settings
        self.device = next(iter(model.parameters())).device
        rank, processes = (group.rank(), group.size()) if group is not None else (0, 1)
        self.micro_batch, self.accumulate = split_batch(settings.batch_size, settings.micro_batch, processes)
        generator = torch.Generator(self.device).manual_seed(seed * 65_537 + 2)
        self.noise = NoiseStream(generator, rank, processes)
        self.weights = trainable_weights(model)
        self.optimizer = GuardedAdamW(
            "teacher", self.weights, settings.lr, settings.betas, settings.weight_decay, settings.grad_clip,
            settings.max_nonfinite, group,
        )  # fmt: skip
        self.average = None if settings.ema_decay is None else WeightAverage(self.weights, settings.ema_decay)
        self.update = 0

    def cycle(self, measure_gradients: bool = False) -> TeacherLog:
        """One optimizer step; `measure_gradients` has nothing to add here.

        Raises:
            NonFiniteRun: too many updates in a row were not finite.
        """
        self.update += 1
        lr = self.learning_rate()
        for group in self.optimizer.adamw.param_groups:
            group["lr"] = lr
        losses = []
        for _ in range(self.accumulate):
            loss = self.loss(*next(self.videos))
            (loss / self.accumulate).backward()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        step = self.optimizer.step(mean)
        if self.average is not None and not step.skipped:
            self.average.update()
        return TeacherLog(mean, step, lr)

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to 0 at the last update."""
        settings = self.settings
        warm = min(1.0, self.update / max(1, settings.warmup))
        return settings.lr * warm * 0.5 * (1 + math.cos(math.pi * (self.update - 1) / settings.updates))

    def loss(self, x0: Tensor, cond: Condition) -> Tensor:
        """Mean squared error of the velocity, at shifted uniform noise levels."""
        level = shift_sigma(uniform(len(x0), self.noise, x0.device), self.settings.shift)
        # Wan's x0 form divides by the level; the level 0 itself teaches nothing.
        level = level.clamp(min=1e-3)
        x_t = self.model.add_noise(x0, noise_like(x0, self.noise), level)
        if cond is not None and self.settings.drop_condition > 0:
            cond = self._drop(cond)
        return ((self.model.predict_x0(x_t, level, cond) - x0) / per_sample(level, x0)).square().mean()

    def _drop(self, cond: Tensor) -> Tensor:
        dropped = uniform(len(cond), self.noise, cond.device) < self.settings.drop_condition
        return torch.where(dropped.view(-1, *[1] * (cond.dim() - 1)), self.model.null_cond(len(cond)), cond)

    def tensors(self) -> dict[str, Tensor]:
        """Name to tensor of all that training changes, in place; the teacher's weights are called "student.*"."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "student": self.weights,
            "ema": {} if self.average is None else self.average.average,
            "student_optimizer": self.optimizer.state(),
        }
        return {f"{group}.{name}": tensor.detach() for group, part in groups.items() for name, tensor in part.items()}

    def generators(self) -> dict[str, torch.Generator]:
        """The generators of the run, alike on all processes."""
        return {"noise": self.noise.generator}

    @property
    def optimizers(self) -> dict[str, GuardedAdamW]:
        """The guarded optimizers by the names of their networks."""
        return {"student": self.optimizer}
