"""The update rule: one student update, then the critic's, on the student's own samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from codmd.distill.config.recipe import DistillConfig
from codmd.models.base import Condition, VideoDenoiser
from codmd.models.experts import ExpertPair

from .cycle_log import CollapseRatios, CycleLog, collapse_ratios
from .diversity import first_step_loss
from .ema import WeightAverage
from .mixing import mix_critic
from .noise import NoiseStream, normal
from .objective import GeneratorLoss, Scores, critic_loss, distillation_loss, predict_scores
from .optimizer import GuardedAdamW, Step, trainable_weights
from .rollout import draw_exit_step, euler_step, trajectory

Batch = tuple[Tensor, Condition]
"""Detached samples of the student, and the condition they were drawn for."""


class Drawn(NamedTuple):
    """A micro-batch of the student.

    Attributes:
        x0: its prediction at the exit step.
        handed_on: what the critic learns, detached: `x0`, or the state at the level where an expert's phase ends.
        exit_step: index into the step list.
    """

    x0: Tensor
    handed_on: Tensor
    exit_step: int


class _StudentPass(NamedTuple):
    loss: GeneratorLoss
    batches: list[Batch]
    exit_step: int
    ratio: Tensor | None
    collapse: CollapseRatios | None


class Distiller:
    """Few-step distribution matching distillation of `teacher` into `student`, with a `critic` in between.

    Student and critic are expected to start from the teacher's weights. Randomness comes from two explicit
    generators, both alike on all processes: one draws exit steps, so that sharded networks stay in step, one the
    noise of the global batch, of which every process keeps its rows.

    Args:
        teacher: frozen; called without gradient.
        student: trained in place.
        critic: trained in place; the score of the student's distribution.
        config: the recipe.
        seed: of both generators.
        group: the data-parallel processes; None for this one alone.
        conditions: one condition per micro-batch of this process; None for unconditional models.
        resting: the high-noise expert, frozen, which makes the first steps of a student that is the low-noise one.

    Attributes:
        update: student updates made (a skipped one counts).
        average: the student's running average, None without `ema_decay` and `ema_width`.
    """

    def __init__(
        self,
        teacher: VideoDenoiser,
        student: VideoDenoiser,
        critic: VideoDenoiser,
        config: DistillConfig,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        conditions: Iterator[Condition] | None = None,
        resting: VideoDenoiser | None = None,
    ) -> None:
        self.teacher, self.student, self.critic, self.config, self.group = teacher, student, critic, config, group
        self.resting = resting
        self.path = student if resting is None else ExpertPair(resting, student, config.boundary)
        self.device = next(iter(student.parameters())).device
        rank, processes = (group.rank(), group.size()) if group is not None else (0, 1)
        self.micro_batch, self.accumulate = config.micro_batches(processes)
        self.exit_generator = torch.Generator().manual_seed(seed)
        noise = torch.Generator(self.device).manual_seed(seed * 65_537 + 1)
        self.noise = NoiseStream(noise, rank, processes)
        self.conditions = itertools.repeat(None) if conditions is None else conditions
        self.student_weights, self.critic_weights = trainable_weights(student), trainable_weights(critic)
        common = (config.betas, config.weight_decay, config.grad_clip, config.max_nonfinite, group)
        self.student_optimizer = GuardedAdamW("student", self.student_weights, config.student_lr, *common)
        self.critic_optimizer = GuardedAdamW("critic", self.critic_weights, config.critic_lr, *common)
        self.average = WeightAverage(self.student_weights, 0.0) if config.averages else None
        self.update = 0

    def cycle(self, measure_gradients: bool = False) -> CycleLog:
        """One student update and `critic_updates` critic updates.

        Args:
            measure_gradients: also measure the relation term's gradient against DMD's (two more backward passes
                through the losses, none through a network) and the ratios of collapse; does not change training.

        Raises:
            NonFiniteRun: too many updates in a row were not finite.
        """
        self.update += 1
        config = self.config
        made = self._student_gradients(measure_gradients)
        diversity = self._first_step_gradients() if config.diversity_weight > 0 else None
        loss = made.loss.total if diversity is None else made.loss.total + config.diversity_weight * diversity
        student_step = self.student_optimizer.step(loss)
        if not student_step.skipped:
            if self.average is not None:
                self.average.update(config.ema_decay_at(self.update))
            if config.critic_mixing > 0:
                mix_critic(self.critic_weights, self.student_weights, config.critic_mixing)

        batches = made.batches
        for number in range(config.critic_updates):
            if number > 0 or not config.share_rollout:
                batches = [self._fresh() for _ in range(self.accumulate)]
            critic, critic_step = self.critic_update(batches)
        return CycleLog(
            made.loss, critic, made.exit_step, student_step, critic_step, made.ratio, made.collapse, diversity
        )

    def draw_sample(self, cond: Condition) -> Drawn:
        """A micro-batch of the student's predictions at a random exit step."""
        exit_step = self._exit_step()
        x_t, level = self._trajectory(exit_step, cond)
        x0 = self.student.predict_x0(x_t, level, cond)
        return Drawn(x0, self._handed_on(x_t, x0, exit_step), exit_step)

    def critic_update(self, batches: Sequence[Batch]) -> tuple[Tensor, Step]:
        """One flow-matching update of the critic on detached samples; returns its detached loss and the step."""
        losses = []
        for sample, cond in batches:
            loss = critic_loss(self.critic, sample, self.config, self.noise, cond)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        return mean, self.critic_optimizer.step(mean)

    def _student_gradients(self, measure: bool) -> _StudentPass:
        """Accumulates the gradient of one student update, micro-batch by micro-batch."""
        config = self.config
        if config.relation_accumulate and self.accumulate > 1 and config.uses_relation and config.batch_weight > 0:
            return self._window_gradients(measure)
        losses, batches = [], []
        for number in range(self.accumulate):
            cond = next(self.conditions)
            sample, handed_on, exit_step = self.draw_sample(cond)
            scores = self._scores(handed_on, exit_step, cond)
            loss = self._loss(sample, scores)
            if number == self.accumulate - 1:
                ratio, collapse = self._measure(loss, sample, scores) if measure else (None, None)
            (loss.total / self.accumulate).backward()
            losses.append(loss)
            batches.append((handed_on, cond))
        return _StudentPass(GeneratorLoss.mean(losses), batches, exit_step, ratio, collapse)

    def _window_gradients(self, measure: bool) -> _StudentPass:
        """The same, with one relation over all micro-batches.

        The latents of the whole batch fit where its activations do not: samples and scores are drawn without
        gradient, the loss gives the gradient of every sample, and each micro-batch is evaluated once more, from
        the state at its exit step, to take that gradient through the network.
        """
        states, predictions, batches, scores = [], [], [], []
        for _ in range(self.accumulate):
            cond = next(self.conditions)
            exit_step = self._exit_step()
            state = self._trajectory(exit_step, cond)
            with torch.no_grad():
                sample = self.student.predict_x0(*state, cond)
            handed_on = self._handed_on(state[0], sample, exit_step)
            states.append(state)
            predictions.append(sample)
            batches.append((handed_on, cond))
            scores.append(self._scores(handed_on, exit_step, cond))
        samples, joint = torch.cat(predictions).requires_grad_(), Scores.cat(scores)
        loss = self._loss(samples, joint)
        ratio, collapse = self._measure(loss, samples, joint) if measure else (None, None)
        (gradient,) = torch.autograd.grad(loss.total, samples)
        for state, (_, cond), part in zip(states, batches, gradient.split(self.micro_batch), strict=True):
            self.student.predict_x0(*state, cond).backward(part)
        return _StudentPass(GeneratorLoss.mean([loss]), batches, exit_step, ratio, collapse)

    def _start(self) -> Tensor:
        return normal((self.micro_batch, *self.student.latent_shape), self.noise, self.device)

    def _exit_step(self) -> int:
        """A random step of those that distribution matching trains."""
        phase = self.config.phase
        first = phase.first + int(self.config.diversity_weight > 0)
        return first + draw_exit_step(phase.stop - first, self.exit_generator)

    def _trajectory(self, exit_step: int, cond: Condition) -> tuple[Tensor, Tensor]:
        config = self.config
        return trajectory(self.path, self._start(), config.sigmas, exit_step, self.noise, cond, config.transition)

    def _handed_on(self, x_t: Tensor, x0: Tensor, exit_step: int) -> Tensor:
        """x0 itself, or an Euler step from the exit step to where the phase ends."""
        end = self.config.phase.end
        return euler_step(x_t, x0.detach(), self.config.sigmas[exit_step], end) if end > 0 else x0.detach()

    def _first_step_gradients(self) -> Tensor:
        """Accumulates the gradient of the weighted first-step loss; returns the loss."""
        losses = []
        for _ in range(self.accumulate):
            loss = first_step_loss(self.student, self.teacher, self._start(), self.config, next(self.conditions))
            (self.config.diversity_weight / self.accumulate * loss).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _scores(self, handed_on: Tensor, exit_step: int, cond: Condition) -> Scores:
        level = self.config.sigmas[exit_step]
        return predict_scores(handed_on, self.teacher, self.critic, self.config, self.noise, cond, level)

    def _loss(self, sample: Tensor, scores: Scores) -> GeneratorLoss:
        weight = self.config.relation_weight_at(self.update)
        return distillation_loss(sample, scores, self.config, weight, self.group)

    def _measure(self, loss: GeneratorLoss, sample: Tensor, scores: Scores) -> tuple[Tensor | None, CollapseRatios]:
        ratio = loss.gradient_ratio(sample) if self.config.uses_relation else None
        return ratio, collapse_ratios(sample.detach(), scores.guided(self.config))

    def _fresh(self) -> Batch:
        cond = next(self.conditions)
        with torch.no_grad():
            return self.draw_sample(cond).handed_on, cond

    def tensors(self) -> dict[str, Tensor]:
        """Name to tensor of all that training changes, in place: what is loaded into them takes effect."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "student": self.student_weights,
            "critic": self.critic_weights,
            "ema": {} if self.average is None else self.average.average,
            "student_optimizer": self.student_optimizer.state(),
            "critic_optimizer": self.critic_optimizer.state(),
        }
        return {f"{group}.{name}": tensor.detach() for group, part in groups.items() for name, tensor in part.items()}

    def generators(self) -> dict[str, torch.Generator]:
        """The generators of the run, alike on all processes."""
        return {"exit": self.exit_generator, "noise": self.noise.generator}

    @property
    def optimizers(self) -> dict[str, GuardedAdamW]:
        """The guarded optimizers by the names of their networks."""
        return {"student": self.student_optimizer, "critic": self.critic_optimizer}
