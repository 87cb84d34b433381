"""The methods beside DMD in the same loop: rCM (arXiv 2510.08431) and sCM (arXiv 2410.11081)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from codmd import conventions
from codmd.distill.config.recipe import DistillConfig
from codmd.models.base import Condition, VideoDenoiser

from .consistency import ConsistencyLoss, consistency_loss
from .ema import WeightAverage
from .noise import NoiseStream, uniform
from .objective import GeneratorLoss, distillation_loss, predict_scores
from .optimizer import GuardedAdamW, Step, trainable_weights
from .rollout import rollout
from .schedule import shift_sigma
from .trainer import Distiller, Drawn

Videos = Iterator[tuple[Tensor, Condition]]
"""Latents [B, F, C, H, W] of this process's next micro-batch, with their condition, without end."""


@dataclass(frozen=True)
class ConsistencyLog:
    """What one cycle measured; tensors are detached scalars.

    Attributes:
        terms: the consistency term, mean of its micro-batches.
        warmth: r of the tangent.
        student: the student's update.
        generator: the score term; None in scm and before the warm-up has ended.
        critic, critic_step: the last of the critic's updates, likewise.
        steps: of the rollouts of the student's update, likewise.
    """

    terms: ConsistencyLoss
    warmth: float
    student: Step
    generator: GeneratorLoss | None = None
    critic: Tensor | None = None
    critic_step: Step | None = None
    steps: int | None = None

    def scalars(self) -> dict[str, Tensor | float]:
        """Name to value, for a log."""
        found: dict[str, Tensor | float] = {
            "loss": self.terms.loss, "consistency": self.terms.loss, "tangent_norm": self.terms.tangent_norm,
            "derivative_norm": self.terms.derivative_norm, "dropped": self.terms.dropped, "warmth": self.warmth,
            "student_grad_norm": self.student.grad_norm,
        }  # fmt: skip
        if self.generator is not None and self.critic is not None and self.critic_step is not None:
            score = self.generator
            found |= {
                "loss": self.terms.loss + score.total, "dmd": score.dmd, "relation_batch": score.relation_batch,
                "relation_frame": score.relation_frame, "relation_weight": score.relation_weight,
                "critic": self.critic, "critic_grad_norm": self.critic_step.grad_norm, "steps": float(self.steps or 0),
            }  # fmt: skip
        return found


def _mean(losses: list[ConsistencyLoss]) -> ConsistencyLoss:
    rows = ((loss.loss, loss.tangent_norm, loss.derivative_norm, loss.dropped) for loss in losses)
    loss, tangent_norm, derivative_norm, dropped = (
        torch.stack([value.detach() for value in column]) for column in zip(*rows, strict=True)
    )
    # A norm is NaN where every sample of a micro-batch was dropped.
    return ConsistencyLoss(loss.mean(), tangent_norm.nanmean(), derivative_norm.nanmean(), dropped.mean())


class ConsistencyDistiller:
    """sCM: `student` learns the consistency term alone, along the guided path of `teacher`.

    Args:
        teacher: frozen; called without gradient.
        student: trained in place; expected to start from the teacher's weights.
        config, seed, group: as of :class:`Distiller`.
        videos: what is noised.

    Attributes:
        update: student updates made (a skipped one counts).
        average: the student's running average, None without `ema_decay` and `ema_width`.
    """

    def __init__(
        self,
        teacher: VideoDenoiser,
        student: VideoDenoiser,
        config: DistillConfig,
        seed: int,
        group: dist.ProcessGroup | None,
        videos: Videos,
    ) -> None:
        self.teacher, self.student, self.config, self.videos = teacher, student, config, videos
        rank, processes = (group.rank(), group.size()) if group is not None else (0, 1)
        _, self.accumulate = config.micro_batches(processes)
        device = next(iter(student.parameters())).device
        self.noise = NoiseStream(torch.Generator(device).manual_seed(seed * 65_537 + 1), rank, processes)
        self.student_weights = trainable_weights(student)
        self.student_optimizer = GuardedAdamW(
            "student", self.student_weights, config.student_lr,
            config.betas, config.weight_decay, config.grad_clip, config.max_nonfinite, group,
        )  # fmt: skip
        self.average = WeightAverage(self.student_weights, 0.0) if config.averages else None
        self.update = 0

    def cycle(self, measure_gradients: bool = False) -> ConsistencyLog:
        """One update of the student; there is nothing else to measure.

        Raises:
            NonFiniteRun: too many updates in a row were not finite.
        """
        self.update += 1
        terms, _ = consistency_gradients(self, self.videos)
        step = self.student_optimizer.step(terms.loss)
        if self.average is not None and not step.skipped:
            self.average.update(self.config.ema_decay_at(self.update))
        return ConsistencyLog(terms, self.config.consistency.warmth(self.update), step)

    def tensors(self) -> dict[str, Tensor]:
        """Name to tensor of all that training changes, in place: what is loaded into them takes effect."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "student": self.student_weights,
            "ema": {} if self.average is None else self.average.average,
            "student_optimizer": self.student_optimizer.state(),
        }
        return {f"{group}.{name}": tensor.detach() for group, part in groups.items() for name, tensor in part.items()}

    def generators(self) -> dict[str, torch.Generator]:
        """The generators of the run, alike on all processes."""
        return {"noise": self.noise.generator}

    @property
    def optimizers(self) -> dict[str, GuardedAdamW]:
        """The guarded optimizers by the names of their networks."""
        return {"student": self.student_optimizer}


class RegularisedDistiller(Distiller):
    """rCM: the consistency term, and after its warm-up distribution matching on the student's own rollouts.

    A rollout has 1 to `len(sigmas)` steps in turn, at random falling levels. The two terms are propagated one after the
    other, so that the larger of them decides the memory. The score term takes the conditions of the noised data;
    `conditions` are the critic's.
    """

    def __init__(
        self,
        teacher: VideoDenoiser,
        student: VideoDenoiser,
        critic: VideoDenoiser,
        config: DistillConfig,
        seed: int,
        group: dist.ProcessGroup | None,
        videos: Videos,
        conditions: Iterator[Condition] | None = None,
    ) -> None:
        super().__init__(teacher, student, critic, config, seed, group, conditions)
        self.videos = videos

    def cycle(self, measure_gradients: bool = False) -> ConsistencyLog:  # type: ignore[override]
        """One student update and, after the warm-up, `critic_updates` critic updates.

        Raises:
            NonFiniteRun: too many updates in a row were not finite.
        """
        self.update += 1
        config = self.config
        warmth, scored = config.consistency.warmth(self.update), self.update > config.consistency.warmup
        terms, conditions = consistency_gradients(self, self.videos)
        score = self._score_gradients(conditions) if scored else None
        step = self.student_optimizer.step(terms.loss if score is None else terms.loss + score.total)
        if self.average is not None and not step.skipped:
            self.average.update(self.config.ema_decay_at(self.update))
        if score is None:
            return ConsistencyLog(terms, warmth, step)
        for _ in range(config.critic_updates):
            critic, critic_step = self.critic_update([self._fresh() for _ in range(self.accumulate)])
        return ConsistencyLog(terms, warmth, step, score, critic, critic_step, self._steps())

    def draw_sample(self, cond: Condition) -> Drawn:
        """A micro-batch of the student's predictions after this update's number of steps."""
        levels = [1.0]
        while len(levels) < self._steps():
            drawn = float(shift_sigma(uniform(1, self.exit_generator, torch.device("cpu")), self.config.shift))
            levels.append(min(levels[-1], drawn))
        x0 = rollout(self.student, self._start(), levels, len(levels) - 1, self.noise, cond)
        return Drawn(x0, x0.detach(), len(levels) - 1)

    def _steps(self) -> int:
        return (self.update - 1) % len(self.config.sigmas) + 1

    def _score_gradients(self, conditions: list[Condition]) -> GeneratorLoss:
        losses = []
        for cond in conditions:
            sample = self.draw_sample(cond).x0
            scores = predict_scores(sample, self.teacher, self.critic, self.config, self.noise, cond)
            # lambda is relative to half a mean, whatever the convention's DMD is.
            rule = conventions.resolve(self.config.convention)
            elements = sample.numel() if rule.reduction == "sum" else 1
            weight = self.config.relation_weight_at(self.update) * 2 * rule.coefficient * elements
            loss = distillation_loss(sample, scores, self.config, weight, self.group)
            (loss.total / self.accumulate).backward()
            losses.append(loss)
        return GeneratorLoss.mean(losses)


def consistency_trainer(
    teacher: VideoDenoiser,
    student: VideoDenoiser,
    critic: VideoDenoiser,
    config: DistillConfig,
    seed: int,
    group: dist.ProcessGroup | None,
    videos: Videos,
    conditions: Iterator[Condition] | None,
) -> ConsistencyDistiller | RegularisedDistiller:
    """The trainer of `config.method`, "rcm" or "scm"; the latter leaves `critic` and `conditions` alone."""
    if config.method == "scm":
        return ConsistencyDistiller(teacher, student, config, seed, group, videos)
    return RegularisedDistiller(teacher, student, critic, config, seed, group, videos, conditions)


def consistency_gradients(
    trainer: ConsistencyDistiller | RegularisedDistiller, videos: Videos
) -> tuple[ConsistencyLoss, list[Condition]]:
    """Accumulates the gradient of the consistency term over an update; the term, and the conditions it saw."""
    losses, conditions = [], []
    warmth = trainer.config.consistency.warmth(trainer.update)
    for x0, cond in itertools.islice(videos, trainer.accumulate):
        loss = consistency_loss(trainer.student, trainer.teacher, x0, trainer.config, trainer.noise, warmth, cond)
        (loss.loss / trainer.accumulate).backward()
        losses.append(loss)
        conditions.append(cond)
    return _mean(losses), conditions
