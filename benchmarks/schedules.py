"""One training cycle in two schedules, `codmd train`'s and that of CoDMD's own loop, with a lap for every update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import eager_relation_loss
from benchmarks.whole_network import synchronise
from codmd import conventions, reference
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.update.cycle_log import CycleLog
from codmd.distill.update.objective import GeneratorLoss, Scores
from codmd.distill.update.rollout import rollout, trajectory
from codmd.distill.update.trainer import Batch, Distiller, Drawn
from codmd.models.base import Condition, VideoDenoiser


@dataclass(frozen=True)
class Schedule:
    """One way to run a cycle: the recipe, and whether it is CoDMD's own loop."""

    name: str
    config: DistillConfig
    published: bool


@dataclass(frozen=True)
class Lap:
    """One update: seconds, network forwards (of one sample; a backward pass is 2, recomputation 1), peak bytes."""

    schedule: str
    phase: str
    exit_step: int | None
    seconds: float
    forwards: float
    allocated: int | None
    reserved: int | None


class Meter:
    """Seconds, network forwards and peak memory from lap to lap."""

    def __init__(self, device: torch.device, networks: tuple[VideoDenoiser, ...]) -> None:
        self.device, self.laps = device, list[Lap]()
        for denoiser in networks:
            denoiser.register_forward_pre_hook(self._count)
        self.start()

    def _count(self, denoiser: VideoDenoiser, inputs: tuple[Tensor, ...]) -> None:
        self._forwards += (3 + denoiser.checkpointing if torch.is_grad_enabled() else 1) * len(inputs[0])

    def start(self) -> None:
        """Begins a lap."""
        synchronise(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._forwards, self._clock = 0, time.perf_counter()

    def end(self, schedule: str, phase: str, exit_step: int | None) -> None:
        """Ends a lap and begins the next."""
        synchronise(self.device)
        elapsed, cuda = time.perf_counter() - self._clock, self.device.type == "cuda"
        allocated = torch.cuda.max_memory_allocated(self.device) if cuda else None
        reserved = torch.cuda.max_memory_reserved(self.device) if cuda else None
        self.laps.append(Lap(schedule, phase, exit_step, elapsed, self._forwards, allocated, reserved))
        self.start()


class MeasuredDistiller(Distiller):
    """`Distiller` with given exit steps, in one of the two schedules, that ends a lap after every update."""

    meter: Meter
    schedule: Schedule
    exits: Iterator[int]

    def measured_cycle(self, schedule: Schedule, exits: list[int]) -> CycleLog:
        """One cycle; `exits` has one step for each sample that it draws.

        Raises:
            SystemExit: an update was skipped, so its time would mean nothing.
        """
        self.config, self.schedule, self.exits = schedule.config, schedule, iter(exits)
        self._exit: int | None = None
        self._student_done = False
        self.meter.start()
        log = self.cycle()
        if any(optimizer.skipped for optimizer in self.optimizers.values()):
            raise SystemExit("an update was not finite and was skipped: nothing was measured")
        assert next(self.exits, None) is None, "more exit steps than samples"
        return log

    def draw_sample(self, cond: Condition) -> Drawn:
        self._exit = exit_step = next(self.exits)
        if self.schedule.published:
            x0 = self.student.predict_x0(*self._states(cond)[exit_step], cond)
        else:
            x0 = rollout(self.student, self._start(), self.config.sigmas, exit_step, self.noise, cond)
        return Drawn(x0, x0.detach(), exit_step)

    def _states(self, cond: Condition) -> list[tuple[Tensor, Tensor]]:
        """The states of one trajectory at all levels."""
        states = [trajectory(self.student, self._start(), self.config.sigmas[:1], 0, self.noise, cond)]
        with torch.no_grad():
            for sigma in self.config.sigmas[1:]:
                x0 = self.student.predict_x0(*states[-1], cond)
                level = torch.full_like(states[-1][1], sigma)
                states.append((self.student.add_noise(x0, torch.randn_like(x0), level), level))
        return states

    def _loss(self, sample: Tensor, scores: Scores) -> GeneratorLoss:
        return plain_loss(sample, scores, self.config) if self.schedule.published else super()._loss(sample, scores)

    def _fresh(self) -> Batch:
        self._end_student()
        return super()._fresh()

    def critic_update(self, batches: Any) -> Any:
        self._end_student()
        result = super().critic_update(batches)
        self.meter.end(self.schedule.name, "critic, shared sample" if self._exit is None else "critic", self._exit)
        self._exit = None
        return result

    def _end_student(self) -> None:
        if not self._student_done:
            self.meter.end(self.schedule.name, "student", self._exit)
            self._exit, self._student_done = None, True


def plain_loss(sample: Tensor, scores: Scores, config: DistillConfig) -> GeneratorLoss:
    """The objective as training code writes it: guidance, DMD in float64, relation over float32 copies.

    Its two relation terms are not told apart.
    """
    assert config.guidance is not None
    assert scores.real_uncond is not None
    form = conventions.resolve(config.convention).guidance_form
    with torch.no_grad():
        real = reference.guided(scores.real, scores.real_uncond, config.guidance, form)
        norm = (sample - real).abs().mean(dim=[1, 2, 3, 4], keepdim=True)
        direction = torch.nan_to_num((scores.fake - real) / norm)
    wide = sample.double()
    dmd = 0.5 * torch.nn.functional.mse_loss(wide, (wide - direction.double()).detach())
    options = {"batch_weight": config.batch_weight, "frame_weight": config.frame_weight}
    relation = eager_relation_loss(sample, real, scores.fake, config.temperature, **options)
    total = dmd + config.relation_weight * relation
    return GeneratorLoss(total, dmd, relation, relation, relation, config.relation_weight)


def schedules(recipe: DistillConfig) -> tuple[Schedule, Schedule]:
    """This project's and CoDMD's own, of one sample an update."""
    ours = replace(recipe, batch_size=1, micro_batch=1)
    published = replace(ours, share_rollout=False, batch_guidance=False)
    return Schedule("codmd", ours, False), Schedule("CoDMD's own loop", published, True)


def exit_steps(schedule: Schedule, number: int) -> list[int]:
    """Of the samples that cycle `number` draws: the student's from the middle outwards, then the critic's in turn."""
    steps = len(schedule.config.sigmas)
    outwards = sorted(range(steps), key=lambda step: (abs(step - (steps - 1) / 2), step))
    fresh = schedule.config.critic_updates - schedule.config.share_rollout
    return [outwards[number % steps], *(index % steps for index in range(fresh))]
