"""The comparison on real pixels: a tiny Wan on moving photographs, trained by `codmd train`, one thread a run.

`codmd train textures_tiny` makes the teacher and every student, each a process whose checkpoints a later call
continues; a finished student is measured at every quarter of its training against the guided teacher's fifty steps.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import torch
from torch import Tensor

from benchmarks.convergence import check_end, children
from benchmarks.convergence_measures import COLUMNS as DISTANCES
from benchmarks.convergence_measures import FPS, GuidedTeacher, Videos, distances, inspected
from codmd import metrics
from codmd.demo.summary import Column
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.config.run_config import RunConfig, read_config
from codmd.distill.data.textures import Textures
from codmd.distill.run.integrity import CheckpointError, read_meta
from codmd.distill.run.log import read_log
from codmd.distill.update.rollout import sample_euler, sample_few_step
from codmd.distill.update.schedule import sampling_sigmas
from codmd.sample.source import open_source

from .arms import ARMS, updates_of
from .toy import KEPT, PARTS, write_outcome

QUIET = ("log.tracker=none", "log.preview_every=0")
CLIPS = 6
BATCH = 32
FEWEST = 84
"""Samples: two of each of the data's 42 captions, whose distance is their diversity."""
DATA_POSITIONS = 1 << 40
"""Real videos for the floor come from behind everything that training has seen."""
COLUMNS = {
    **DISTANCES,
    "order": Column("temporal order", "mean of the videos' temporal order, less the teacher's", best=0.0),
    "diversity": Column("diversity", "mean distance of two samples of one caption over the teacher's", best=1.0),
}


@lru_cache
def recipe_of(changes: tuple[str, ...]) -> DistillConfig:
    """What arms change; read once, as the progress of every run asks for it."""
    return read_config("textures_tiny", changes).distill


@dataclass(frozen=True)
class Run:
    """One arm at one seed; `arm` may be one that is not trained."""

    arm: str
    seed: int
    work: Path
    updates: int
    samples: int
    changes: tuple[str, ...] = ()
    """Overrides of the packaged configuration, alike for the teacher and all students."""

    @property
    def total(self) -> int:
        return updates_of(ARMS[self.arm], recipe_of(self.changes), self.updates) if self.arm in ARMS else 0

    @property
    def folder(self) -> Path:
        """Of its training."""
        return (self.work / f"{self.arm}-{self.seed}").resolve()

    @property
    def outcome_path(self) -> Path:
        return self.work / f"{self.arm}-{self.seed}.json"

    @property
    def overrides(self) -> tuple[str, ...]:
        """What `codmd train textures_tiny` gets, after the teacher's `model.weights`."""
        arm, total = ARMS[self.arm], self.total
        recipe = {"relation_weight": 0.0, "batch_weight": 0.0, **arm.changes}
        if arm.steps != 4:
            recipe["sigmas"] = list(sampling_sigmas(arm.steps, 3.0))
        every = -(-total // PARTS)
        return (
            *self.changes, f"out={self.folder}", f"seed={self.seed}",
            f"updates={total}", f"model.weights={(self.work / 'teacher' / 'model').resolve()}",
            f"checkpoint.every={every}", f"checkpoint.keep_last={PARTS}", *QUIET,
            *(f"distill.{name}={_value(value)}" for name, value in recipe.items()),
        )  # fmt: skip

    @property
    def config(self) -> RunConfig:
        return read_config("textures_tiny", self.overrides)

    def made(self) -> int:
        """Updates in its log, for the progress."""
        path = self.folder / "log.jsonl"
        return max((entry["update"] for entry in read_log(path)), default=0) if path.exists() else 0

    def trained(self) -> bool:
        try:
            read_meta(self.folder / "checkpoints" / f"step_{self.total:08d}")
        except CheckpointError:
            return False
        return True


def teacher_overrides(work: Path, changes: Sequence[str]) -> tuple[str, ...]:
    return (*changes, f"out={work.resolve()}", "mode=teacher", *QUIET)


def train_teacher(work: Path, changes: Sequence[str]) -> None:
    """The teacher in `work`/teacher, continued where it was left."""
    if not (work / "teacher" / "model" / "config.json").is_file():
        train_all({"teacher": teacher_overrides(work, changes)}, work, 1, lambda: None)


def train_all(runs: dict[str, tuple[str, ...]], work: Path, jobs: int, look: Callable[[], None]) -> None:
    """`codmd train` for each of `runs`, `jobs` at a time; all save and end when this process is interrupted.

    Args:
        runs: name to overrides.
        look: called every second.

    Raises:
        SystemExit: a run failed; the message has the end of its log.
    """
    waiting = list(runs.items())
    with children() as active:
        while waiting or active:
            while waiting and len(active) < jobs:
                name, overrides = waiting.pop(0)
                with open(work / f"{name}.txt", "ab") as log:
                    command = [sys.executable, "-m", "codmd", "train", "textures_tiny", *overrides]
                    active[name] = subprocess.Popen(command, stdout=log, stderr=log)
            for name, process in list(active.items()):
                if process.poll() is not None:
                    del active[name]
                    check_end(name, process.returncode, work, allowed=(0,))
            look()
            time.sleep(1)


def measure(task: Run) -> dict[str, Any]:
    """The outcome of one run that is trained, or needs no training; kept in its file."""
    if task.outcome_path.exists():
        return json.loads(task.outcome_path.read_text("utf-8"))
    study = study_of(task.work, task.seed, task.samples, task.changes)
    curve = []
    if task.arm in ARMS:
        for step in sorted((task.folder / "checkpoints").glob("step_*")):
            curve.append({"update": int(step.name[5:]), **study.measured(study.student(step))})
        videos = study.student(step)
    else:
        videos = study.untrained(task.arm)
    outcome = {
        "arm": task.arm, "seed": task.seed, "updates": task.total, "metrics": study.measured(videos), "curve": curve,
        "clips": [_gif(video) for video in study.data.decode(videos.latents[: 7 * CLIPS : 7])],
    }  # fmt: skip
    write_outcome(task.outcome_path, outcome)
    return outcome


class Study:
    """Teacher, data and noise of one seed; every arm of that seed starts from the same noise."""

    def __init__(self, work: Path, seed: int, samples: int, changes: tuple[str, ...]) -> None:
        run = read_config("textures_tiny", teacher_overrides(work, changes))
        self.seed, self.samples = seed, samples
        self.recipe: DistillConfig = run.distill
        options = {name: value for name, value in vars(run.model.options).items() if name != "weights"}
        self.teacher = open_source(work / "teacher" / "model", False, options, torch.device("cpu")).model
        self.data = Textures(self.teacher.latent_shape, self.teacher.null_cond(1).shape[2], run.data.zoom)
        self.guided: Any = GuidedTeacher(self.teacher, self.recipe)
        self.target = self._sampled(2 * seed, lambda noise, _, cond: self._euler(noise, 50, cond))

    def student(self, checkpoint: Path) -> Videos:
        source = open_source(checkpoint, True, {}, torch.device("cpu"))
        return self._sampled(
            2 * self.seed + 1,
            lambda noise, generator, cond: sample_few_step(source.model, noise, source.sigmas, generator, cond),
        )

    def untrained(self, arm: str) -> Videos:
        if arm == "data":
            first, count = DATA_POSITIONS * (1 + self.seed), self.samples
            return inspected(self.data.videos(self.numbers, range(first, first + count)), self.data)
        steps = 50 if arm == "teacher" else len(self.recipe.sigmas)
        return self._sampled(2 * self.seed + 1, lambda noise, _, cond: self._euler(noise, steps, cond))

    def measured(self, videos: Videos) -> dict[str, float]:
        found = distances(videos, self.target)
        captions = torch.tensor(self.numbers)
        same = (captions[:, None] == captions[None]) & ~torch.eye(len(captions), dtype=torch.bool)
        within = [
            float(torch.cdist(x.latents.flatten(1), x.latents.flatten(1))[same].mean()) for x in (videos, self.target)
        ]
        order = metrics.temporal_order(videos.latents) - metrics.temporal_order(self.target.latents)
        return {**found, "order": order, "diversity": within[0] / within[1]}

    @property
    def numbers(self) -> list[int]:
        """Captions of the videos: all in turn."""
        return [number % len(self.data) for number in range(self.samples)]

    def _euler(self, noise: Tensor, steps: int, cond: Tensor) -> Tensor:
        return sample_euler(self.guided, noise, sampling_sigmas(steps, self.recipe.shift), cond)

    def _sampled(self, seed: int, sampler: Callable[[Tensor, torch.Generator, Tensor], Tensor]) -> Videos:
        generator, parts = torch.Generator().manual_seed(seed), []
        for start in range(0, self.samples, BATCH):
            numbers = self.numbers[start : start + BATCH]
            noise = torch.randn(len(numbers), *self.teacher.latent_shape, generator=generator)
            with torch.no_grad():
                parts.append(sampler(noise, generator, self.data.condition(numbers)))
        return inspected(torch.cat(parts), self.data)


study_of = lru_cache(maxsize=1)(Study)


def _gif(video: Tensor) -> str:
    """[F, 3, H, W] in [0, 1] as a GIF in base64."""
    frames = video.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return base64.b64encode(imageio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / FPS, loop=0)).decode()


def _value(value: Any) -> str:
    return json.dumps(asdict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value)


assert KEPT >= CLIPS
