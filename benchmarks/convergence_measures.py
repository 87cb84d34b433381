"""Samples of students and of the teacher, and how far each set is from the teacher's fifty guided steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import whole_network as network
from codmd import conventions, metrics, reference
from codmd.demo.experiment import MEASURES, TEACHER_STEPS
from codmd.demo.summary import Column
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.config.run_config import RunConfig
from codmd.distill.data.textures import Textures
from codmd.distill.update.rollout import sample_euler, sample_few_step
from codmd.distill.update.schedule import sampling_sigmas
from codmd.inspect.clips import Clip
from codmd.inspect.measures import Measurement
from codmd.inspect.measures import measure as inspect_clip
from codmd.models.base import Condition, VideoDenoiser, cat_cond
from codmd.sample.source import open_source

ARMS = {
    "data": "real textures",
    "teacher": "teacher, 50 steps, other noise (floor)",
    "teacher_few": "teacher, 4 steps",
    "dmd": "DMD, 4 steps",
    "codmd": "CoDMD, 4 steps",
}
COLUMNS = {
    "relation_energy": Column("cosine", "energy distance between the frame-by-frame cosine matrices"),
    "spearman_energy": Column(
        "Spearman", "energy distance between the frame-by-frame rank correlations, over an 8 x 8 grid of pixels"
    ),
    "rank_relation": Column(
        "Spearman over videos", "root mean square difference of the rank correlations of all frame features"
    ),
    "sample_relation": Column("between videos", "Wasserstein distance between the cosines of pairs of videos"),
    "video_energy": Column("videos", "energy distance between the videos themselves"),
    "speed": Column("speed", "Wasserstein distance between the distributions of latent change from frame to frame"),
    "motion": Column("motion", "Wasserstein distance between the distributions of optical flow, pixels a frame"),
    "static_difference": Column("static, difference", "share of static videos minus the teacher's", best=0.0),
    "std_ratio": Column("std ratio", "standard deviation of all values over the teacher's", best=1.0),
    "saturation_ratio": Column("saturation ratio", "mean saturation over the teacher's", best=1.0),
}
"""Distances to the teacher's samples; with a `best` value, that value is the teacher's."""

BATCH = 64
FPS = 8
STRIPS = 3
DATA_POSITIONS = 1 << 40
"""Where in the data the real videos are taken from: behind everything that training has seen."""


@dataclass(frozen=True)
class Videos:
    """Samples of one arm: latents [N, F, C, H, W] and what `codmd inspect` measures of each as pixels."""

    latents: Tensor
    clips: list[Measurement]

    def values(self, name: str) -> Tensor:
        return torch.tensor([clip.values[name] for clip in self.clips], dtype=torch.float64)

    def spearman(self) -> Tensor:
        return torch.stack([clip.spearman for clip in self.clips]).double()


class GuidedTeacher:
    """The teacher with the guidance that students were distilled from, for `sample_euler`."""

    def __init__(self, teacher: VideoDenoiser, recipe: DistillConfig) -> None:
        self.teacher, self.scale = teacher, recipe.guidance
        self.form = conventions.resolve(recipe.convention).guidance_form

    def predict_x0(self, x_t: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        if self.scale is None:
            return self.teacher.predict_x0(x_t, sigma, cond)
        condition = cat_cond((cond, self.teacher.null_cond(len(x_t))))
        both = self.teacher.predict_x0(torch.cat((x_t, x_t)), torch.cat((sigma, sigma)), condition)
        return reference.guided(*both.chunk(2), self.scale, self.form)


Sampler = Callable[[Tensor, torch.Generator, Condition], Tensor]


class Study:
    """Networks and data of the finished runs, on one device."""

    def __init__(self, teacher: RunConfig, students: dict[tuple[str, int], RunConfig], device: torch.device) -> None:
        self.device, self.recipe = device, teacher.distill
        options = {name: value for name, value in vars(teacher.model.options).items() if name != "weights"}
        self.teacher = open_source(teacher.folder / "model", False, options, device).model
        self.data = Textures(self.teacher.latent_shape, self.teacher.null_cond(1).shape[2], teacher.data.zoom)
        self.samplers: dict[tuple[str, int], Sampler] = {}
        guided: Any = GuidedTeacher(self.teacher, self.recipe)
        shift, few = self.recipe.shift, len(self.recipe.sigmas)
        self.many: Sampler = lambda noise, _, cond: sample_euler(
            guided, noise, sampling_sigmas(TEACHER_STEPS, shift), cond
        )
        self.plain: Sampler = lambda noise, _, cond: sample_euler(guided, noise, sampling_sigmas(few, shift), cond)
        for key, run in students.items():
            ema = run.distill.ema_decay is not None
            self.samplers[key] = self._few(open_source(run.folder, ema, {}, device).model)

    def _few(self, student: VideoDenoiser) -> Sampler:
        return lambda noise, generator, cond: sample_few_step(student, noise, self.recipe.sigmas, generator, cond)

    def numbers(self, count: int) -> list[int]:
        """Captions of `count` videos: all in turn."""
        return [number % len(self.data) for number in range(count)]

    def draw(self, sampler: Sampler, count: int, seed: int) -> Videos:
        """`count` videos; equal seeds give equal noise."""
        generator = torch.Generator(self.device).manual_seed(seed)
        parts = []
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            noise = torch.randn(size, *self.teacher.latent_shape, device=self.device, generator=generator)
            cond = self.data.condition(self.numbers(count)[start : start + size]).to(self.device)
            with torch.no_grad():
                parts.append(sampler(noise, generator, cond))
        return inspected(torch.cat(parts), self.data)

    def real(self, count: int, seed: int) -> Videos:
        """Videos of the data that nothing was trained on."""
        first = DATA_POSITIONS * (1 + seed)
        latents = self.data.videos(self.numbers(count), range(first, first + count))
        return inspected(latents.to(self.device), self.data)

    def pixels(self, videos: Videos) -> Tensor:
        """A few videos of different photographs and motions, [STRIPS, F, height, width, 3] in [0, 1], on the CPU."""
        chosen = [9 * number % len(videos.latents) for number in range(1, 1 + STRIPS)]
        return self.data.decode(videos.latents[chosen]).permute(0, 1, 3, 4, 2).cpu()

    def milliseconds(self, sampler: Sampler, count: int) -> float:
        """Of one video in a batch, median of three."""
        size = min(BATCH, count)
        generator = torch.Generator(self.device).manual_seed(0)
        noise = torch.randn(size, *self.teacher.latent_shape, device=self.device, generator=generator)
        cond = self.data.condition(self.numbers(size)).to(self.device)

        def call() -> None:
            with torch.no_grad():
                sampler(noise, generator, cond)

        return 1e3 * statistics.median(network.seconds(call, self.device, repeats=3)) / size


def inspected(latents: Tensor, data: Textures) -> Videos:
    """Videos with the measures of their pixels."""
    frames = data.decode(latents).mul(255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
    clips = [inspect_clip(Path(str(number)), Clip(video, None, FPS)) for number, video in enumerate(frames)]
    return Videos(latents, clips)


def distances(videos: Videos, teacher: Videos) -> dict[str, float]:
    """By the names of COLUMNS, and the share of static videos itself."""
    found = {name: measure(videos.latents, teacher.latents) for name, measure in MEASURES.items()}
    static, its_static = (float(side.values("static").mean()) for side in (videos, teacher))
    return found | {
        "spearman_energy": metrics.energy_distance(videos.spearman(), teacher.spearman()),
        "motion": metrics.wasserstein(videos.values("motion"), teacher.values("motion")),
        "static": static,
        "static_difference": static - its_static,
        "saturation_ratio": float(videos.values("saturation").mean() / teacher.values("saturation").mean()),
    }


def draw_arm(study: Study, arm: str, seed: int, count: int) -> Videos:
    """Samples of one arm; within a seed all of them start from the same noise, which is not the target's."""
    if arm == "data":
        return study.real(count, seed)
    teacher = {"teacher": study.many, "teacher_few": study.plain}
    return study.draw(teacher.get(arm) or study.samplers[arm, seed], count, 2 * seed + 1)


def outcomes(study: Study, seeds: Sequence[int], count: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Measures and the motion of every video, for every arm and seed; and a few videos of the first seed."""
    found, pictures = [], {}
    for seed in seeds:
        target = study.draw(study.many, count, 2 * seed)
        for arm in ARMS:
            videos = draw_arm(study, arm, seed, count)
            motion = [round(value, 4) for value in videos.values("motion").tolist()]
            found.append({"arm": arm, "seed": seed, "metrics": distances(videos, target), "motion": motion})
            pictures.setdefault(arm, study.pixels(videos))
    return found, pictures


def measure(
    teacher: RunConfig,
    students: dict[tuple[str, int], RunConfig],
    seeds: Sequence[int],
    count: int,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record of finished runs, and a few videos of every arm.

    Args:
        students: by arm ("dmd", "codmd") and seed.
        count: videos of every arm and seed.
    """
    study = Study(teacher, students, device)
    found, pictures = outcomes(study, seeds, count)
    few = len(study.recipe.sigmas)
    return {
        "configuration": {section: teacher.as_mapping()[section] for section in ("teacher", "data", "distill")},
        "student_updates": teacher.updates,
        "parameters": sum(weight.numel() for weight in study.teacher.parameters()),
        "latents": list(study.teacher.latent_shape),
        "seeds": list(seeds),
        "videos": count,
        "outcomes": found,
        "milliseconds": {
            "teacher": study.milliseconds(study.many, count),
            "student": study.milliseconds(study.samplers["codmd", seeds[0]], count),
        },
        "evaluations": {"teacher": TEACHER_STEPS * (1 + (study.recipe.guidance is not None)), "student": few},
    }, pictures
