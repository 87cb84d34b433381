"""One arm of the demo at one seed: a student (or the teacher itself), its samples and their measures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from codmd import metrics
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.update.cycle_log import CycleLog
from codmd.distill.update.rollout import sample_euler, sample_few_step
from codmd.distill.update.schedule import sampling_sigmas
from codmd.distill.update.trainer import Distiller
from codmd.models.toy import ToyDenoiser

from .arc import ArcConfig, ArcVideo

TEACHER_STEPS = 50
ARMS = ("data", "teacher", "teacher_few", "dmd", "codmd")
TRAINED_ARMS = ("dmd", "codmd")
KEPT_VIDEOS = 128
MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "relation_energy": metrics.relation_energy_distance,
    "video_energy": metrics.energy_distance,
    "rank_relation": metrics.rank_relation_distance,
    "sample_relation": metrics.sample_relation_distance,
    "speed": metrics.speed_distance,
    "std_ratio": metrics.std_ratio,
}


@dataclass(frozen=True)
class Settings:
    """The settings that every job of one demo shares."""

    teacher_path: str
    arc: ArcConfig
    distill: DistillConfig
    updates: int
    samples: int
    log_every: int = 10


@dataclass(frozen=True)
class Job:
    """One arm at one seed."""

    arm: str
    seed: int
    settings: Settings

    @property
    def updates(self) -> int:
        """Student updates this job makes, the unit of its progress."""
        return self.settings.updates if self.arm in TRAINED_ARMS else 0


@dataclass
class Outcome:
    """The measurements of one job; plain lists, so that it crosses a process boundary and JSON.

    Attributes:
        metrics: by the names of `MEASURES`.
        relation: mean frame relation matrix over the samples, F x F.
        speeds: of every sample.
        scenes, paths: the first `KEPT_VIDEOS` videos in the coordinates of the nearest scene's plane, [N, F, 2].
        curves: loss curves, one value per `log_every` student updates; empty for untrained arms.
    """

    arm: str
    seed: int
    metrics: dict[str, float]
    relation: list[list[float]]
    speeds: list[float]
    scenes: list[int]
    paths: list[list[list[float]]]
    curves: dict[str, list[float]] = field(default_factory=dict)


def run_job(job: Job, progress: Callable[[int], None]) -> Outcome:
    """Runs one job. Alike in (arm, seed, settings) means alike in every digit, whatever ran before.

    Args:
        progress: called with the number of student updates made since the last call.

    Raises:
        FloatingPointError: a loss became non-finite.
    """
    settings = job.settings
    data = ArcVideo(settings.arc)
    real = data.sample(settings.samples, torch.Generator().manual_seed(2 * job.seed))
    sampling = torch.Generator().manual_seed(2 * job.seed + 1)
    curves: dict[str, list[float]] = {}
    if job.arm == "data":
        videos = data.sample(settings.samples, sampling)
    else:
        teacher = ToyDenoiser.load(settings.teacher_path).requires_grad_(False)
        noise = torch.randn(settings.samples, *teacher.latent_shape, generator=sampling)
        if job.arm in TRAINED_ARMS:
            student, curves = distil(teacher, job, progress)
            videos = sample_few_step(student, noise, settings.distill.sigmas, sampling)
        else:
            steps = TEACHER_STEPS if job.arm == "teacher" else len(settings.distill.sigmas)
            videos = sample_euler(teacher, noise, sampling_sigmas(steps, settings.distill.shift))
    scenes, paths = data.project(videos[:KEPT_VIDEOS])
    return Outcome(
        arm=job.arm,
        seed=job.seed,
        metrics={name: measure(videos, real) for name, measure in MEASURES.items()},
        relation=metrics.frame_relations(videos).mean(dim=0).tolist(),
        speeds=metrics.speeds(videos).tolist(),
        scenes=scenes.tolist(),
        paths=paths.tolist(),
        curves=curves,
    )


def distil(
    teacher: ToyDenoiser, job: Job, progress: Callable[[int], None]
) -> tuple[ToyDenoiser, dict[str, list[float]]]:
    """The student of one arm, trained from the teacher's weights, and its loss curves."""
    settings = job.settings
    config = settings.distill if job.arm == "codmd" else replace(settings.distill, relation_weight=0.0)
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    distiller = Distiller(teacher, student, critic, config, seed=job.seed)
    curves: dict[str, list[float]] = {}
    for update in range(1, settings.updates + 1):
        due = update % settings.log_every == 0 or update == settings.updates
        log = distiller.cycle(measure_gradients=due)
        if due:
            for name, value in _scalars(log).items():
                curves.setdefault(name, []).append(value)
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{job.arm}, seed {job.seed}: {name} became {value} at student update {update}; "
                        "try a smaller --lambda or a larger --temperature"
                    )
            curves.setdefault("update", []).append(update)
            progress(update - (update - 1) // settings.log_every * settings.log_every)
    return student, curves


def _scalars(log: CycleLog) -> dict[str, float]:
    scalars = {
        "dmd": log.generator.dmd,
        "relation_batch": log.generator.relation_batch,
        "relation_frame": log.generator.relation_frame,
        "critic": log.critic,
    }
    if log.relation_to_dmd is not None:
        scalars["relation_to_dmd"] = log.relation_to_dmd
    return {name: float(value) for name, value in scalars.items()}
