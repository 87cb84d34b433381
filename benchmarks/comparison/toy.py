"""One arm of the comparison at one seed on arc video: trained in parts that a later call continues, and measured."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from codmd import metrics
from codmd.atomic import replacing
from codmd.demo.arc import ArcVideo
from codmd.demo.experiment import TEACHER_STEPS
from codmd.demo.summary import Column
from codmd.demo.teacher import TeacherConfig
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.update.methods import RegularisedDistiller, Videos
from codmd.distill.update.rollout import sample_euler, sample_few_step
from codmd.distill.update.schedule import sampling_sigmas
from codmd.distill.update.trainer import Distiller
from codmd.models.toy import ToyDenoiser

from .arms import ARMS, updates_of

COLUMNS = {
    "relation_energy": Column("relation, cosine", "energy distance between the frame-by-frame cosine matrices"),
    "spearman": Column(
        "relation, Spearman", "root mean square difference of Spearman's correlations of all coordinates"
    ),
    "normal_scores": Column("relation, normal scores", "the same with van der Waerden's normal scores"),
    "sample_relation": Column("between samples", "Wasserstein distance between the cosines of pairs of videos"),
    "video_energy": Column("videos", "energy distance between the videos themselves"),
    "speed": Column("speed", "Wasserstein distance between the distributions of speed"),
    "static": Column("static", "share of videos slower than a tenth of the data's median speed"),
    "order": Column(
        "temporal order", "mean Spearman correlation of lag and dissimilarity of frames, less the data's", best=0.0
    ),
    "std_ratio": Column("std ratio", "standard deviation over the data's", best=1.0),
    "diversity": Column("diversity", "mean distance between two samples over the data's", best=1.0),
}
BASE = DistillConfig()
KEPT = 24
"""Videos whose paths an outcome keeps for the page."""
VIDEOS = 2000
"""Of the teacher, which rCM learns from, as its authors do."""
PARTS = 4
"""Points of the quality over training, evenly spaced; after each a run can be continued."""


@dataclass(frozen=True)
class Run:
    """One arm at one seed, in a folder that keeps what is finished."""

    arm: str
    seed: int
    work: Path
    updates: int
    """Of 4-step DMD; other arms make as many as cost the same."""
    samples: int

    @property
    def total(self) -> int:
        """Updates that this run makes."""
        return updates_of(ARMS[self.arm], BASE, self.updates) if self.arm in ARMS else 0

    @property
    def outcome_path(self) -> Path:
        return self.work / f"{self.arm}-{self.seed}.json"

    @property
    def state_path(self) -> Path:
        return self.work / f"{self.arm}-{self.seed}.safetensors"


def measured(videos: Tensor, real: Tensor) -> dict[str, float]:
    """Distances and moments of `videos` beside fresh data; every number is one that the page explains."""
    return {
        "relation_energy": metrics.relation_energy_distance(videos, real),
        "spearman": metrics.rank_relation_distance(videos, real),
        "normal_scores": metrics.rank_relation_distance(videos, real, "normal"),
        "sample_relation": metrics.sample_relation_distance(videos, real),
        "video_energy": metrics.energy_distance(videos, real),
        "speed": metrics.speed_distance(videos, real),
        "static": metrics.static_share(videos, real),
        "order": metrics.temporal_order(videos) - metrics.temporal_order(real),
        "std_ratio": metrics.std_ratio(videos, real),
        "diversity": metrics.diversity_ratio(videos, real),
    }


def run(task: Run, progress: Callable[[int], None]) -> dict[str, Any]:
    """The outcome of one run, from its file where it is finished; equal tasks give equal digits, whatever ran before.

    Args:
        progress: called with the updates made since the last call, those of earlier calls first.
    """
    if task.outcome_path.exists():
        progress(task.total)
        return json.loads(task.outcome_path.read_text("utf-8"))
    torch.set_num_threads(1)
    data = ArcVideo(TeacherConfig().arc)
    real = data.sample(task.samples, torch.Generator().manual_seed(2 * task.seed))
    teacher = ToyDenoiser.load(task.work / "teacher.safetensors").requires_grad_(False)
    curve: list[dict[str, float]] = []
    if task.arm in ARMS:
        student, curve = _train(task, teacher, real, progress)
        videos = sampled(task, student)
    elif task.arm == "data":
        videos = data.sample(task.samples, _sampling(task))
    else:
        noise = torch.randn(task.samples, *teacher.latent_shape, generator=_sampling(task))
        steps = TEACHER_STEPS if task.arm == "teacher" else len(BASE.sigmas)
        videos = sample_euler(teacher, noise, sampling_sigmas(steps, BASE.shift))
    scenes, paths = data.project(videos[:KEPT])
    outcome = {
        "arm": task.arm,
        "seed": task.seed,
        "updates": task.total,
        "metrics": measured(videos, real),
        "curve": curve,
        "scenes": scenes.tolist(),
        "paths": [[[round(x, 3) for x in point] for point in path] for path in paths.tolist()],
    }
    write_outcome(task.outcome_path, outcome)
    task.state_path.unlink(missing_ok=True)
    return outcome


def _train(
    task: Run, teacher: ToyDenoiser, real: Tensor, progress: Callable[[int], None]
) -> tuple[ToyDenoiser, list[dict[str, float]]]:
    """The student, and its measures at `PARTS` points of the training; begins where the state file ends."""
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    recipe = ARMS[task.arm].recipe(BASE)
    distiller = (
        Distiller(teacher, student, critic, recipe, task.seed)
        if recipe.method == "dmd"
        else RegularisedDistiller(teacher, student, critic, recipe, task.seed, None, iter(()))
    )
    curve: list[dict[str, float]] = []
    if task.state_path.exists():
        curve = restore(distiller, task.state_path)
        progress(distiller.update)
    if isinstance(distiller, RegularisedDistiller):
        distiller.videos = _videos(task, teacher, recipe.batch_size, distiller.update)
    stops = [math.ceil(task.total * part / PARTS) for part in range(1, PARTS + 1)]
    while distiller.update < task.total:
        log = distiller.cycle(measure_gradients=distiller.update + 1 in stops)
        progress(1)
        if distiller.update in stops:
            ratio = {name: float(v) for name, v in log.scalars().items() if name == "relation_to_dmd"}
            curve.append({"update": distiller.update, **measured(sampled(task, student), real), **ratio})
            store(distiller, curve, task.state_path)
    return student, curve


def _videos(task: Run, teacher: ToyDenoiser, batch: int, update: int) -> Videos:
    """Batches of the teacher's own videos from an update on; sampled once for all runs."""
    path = task.work / "teacher_videos.safetensors"
    if not path.exists():
        noise = torch.randn(VIDEOS, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        videos = sample_euler(teacher, noise, sampling_sigmas(TEACHER_STEPS, BASE.shift))
        with replacing(path) as partial:
            save_file({"videos": videos}, partial)
    videos = load_file(path)["videos"]
    for number in itertools.count(update):
        generator = torch.Generator().manual_seed(task.seed * 65_537 + number)
        yield videos[torch.randint(VIDEOS, (batch,), generator=generator)], None


def sampled(task: Run, student: ToyDenoiser) -> Tensor:
    """Few-step samples; of one seed all arms start from the same noise."""
    generator = _sampling(task)
    noise = torch.randn(task.samples, *student.latent_shape, generator=generator)
    return sample_few_step(student, noise, ARMS[task.arm].recipe(BASE).sigmas, generator)


def _sampling(task: Run) -> torch.Generator:
    return torch.Generator().manual_seed(2 * task.seed + 1)


def store(distiller: Distiller, curve: list[dict[str, float]], path: Path) -> None:
    """All that training depends on, as safetensors: whole or not at all."""
    random = {f"random.{name}": generator.get_state() for name, generator in distiller.generators().items()}
    tensors = {name: tensor.clone() for name, tensor in distiller.tensors().items()}
    metadata = {"update": str(distiller.update), "curve": json.dumps(curve)}
    with replacing(path) as partial:
        save_file({**tensors, **random}, partial, metadata=metadata)


def restore(distiller: Distiller, path: Path) -> list[dict[str, float]]:
    """Continues from what `store` wrote; returns the curve until there."""
    saved = load_file(path)
    with torch.no_grad():
        for name, tensor in distiller.tensors().items():
            tensor.copy_(saved[name])
    for name, generator in distiller.generators().items():
        generator.set_state(saved[f"random.{name}"])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    distiller.update = int(metadata["update"])
    return json.loads(metadata["curve"])


def write_outcome(path: Path, outcome: dict[str, Any]) -> None:
    """One finished run, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(outcome) + "\n", "utf-8")
