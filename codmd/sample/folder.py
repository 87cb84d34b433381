"""The folder that samples go to, and filling it: what is complete stays, what is missing or partial is made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from codmd.atomic import replacing
from codmd.files import read_json
from codmd.models.base import Condition

from .names import SETTINGS, PromptJob
from .samplers import FewStep, Guided, noise_of
from .sheet import write_sheet
from .source import Source
from .video import latents_are_complete, video_is_complete, write_latents, write_video


@dataclass(frozen=True)
class SampleFolder:
    """`videos/{name}-{seed}.mp4` (or `latents/{name}-{seed}.safetensors`), `sheets/{name}.png`, `sampling.json`.

    Attributes:
        root: the folder.
        latents: keep latents instead of videos.
    """

    root: Path
    latents: bool

    @property
    def kind(self) -> Path:
        """The folder of the files themselves."""
        return self.root / ("latents" if self.latents else "videos")

    def file(self, job: PromptJob, seed: int) -> Path:
        """The file of one video."""
        return self.kind / f"{job.name}-{seed}{'.safetensors' if self.latents else '.mp4'}"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Requires that the videos in the folder, if there are any, were sampled with the same settings.

        Raises:
            ValueError: it was not; the message names the settings that differ.
        """
        if (self.root / SETTINGS).is_file():
            if changed := _changes(self._noted(), settings):
                was = ", ".join(f"{name} {old!r}, now {new!r}" for name, (old, new) in changed.items())
                raise ValueError(f"{self.root}: was sampled with other settings ({was}); give another folder")
        elif self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root}: is a file; give a folder")
        elif self.root.exists() and any(p for p in self.root.iterdir() if not p.name.startswith(".")):
            raise ValueError(f"{self.root}: holds other files and no {SETTINGS}; give a new or empty folder")

    def create(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder and notes the settings in it; tables grow by the entries of this call.

        Raises:
            OSError: it cannot be written.
        """
        self.kind.mkdir(parents=True, exist_ok=True)
        noted = self._noted()
        merged = {name: {**_named(noted.get(name)), **_named(value)} or value for name, value in settings.items()}
        with replacing(self.root / SETTINGS) as partial:
            partial.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def _noted(self) -> dict[str, Any]:
        """The settings of what is in the folder; none when nothing is."""
        path = self.root / SETTINGS
        if not path.is_file() or not self.kind.is_dir() or not any(self.kind.iterdir()):
            return {}
        noted = read_json(path)
        if not isinstance(noted, dict):
            raise ValueError(f"{path}: holds {type(noted).__name__}, no settings; give another folder")
        return noted

    def missing(self, job: PromptJob, frames: int | None, latent_shape: tuple[int, ...]) -> list[int]:
        """The seeds of a job whose files are not there or not complete; `frames` of a video, None for latents."""
        if frames is None:
            return [s for s in job.seeds if not latents_are_complete(self.file(job, s), latent_shape)]
        return [s for s in job.seeds if not video_is_complete(self.file(job, s), frames)]

    def sample(
        self,
        job: PromptJob,
        seeds: Sequence[int],
        source: Source,
        sampler: FewStep | Guided,
        cond: Condition,
        progress: Callable[[int], Any],
        writes: bool = True,
    ) -> None:
        """Makes the files of `seeds`, and the sheet of the prompt where it is not up to date.

        Without `writes` it samples alone, for another process that writes what both have computed.
        """
        for seed in seeds:
            latents = sampler(source.model, noise_of(job.prompt, seed), cond, progress)
            if writes:
                self._write(job, seed, source, latents)
        if not writes:
            return
        sheet = self.root / "sheets" / f"{job.name}.png"
        if not self.latents and (seeds or not sheet.is_file()):
            sheet.parent.mkdir(exist_ok=True)
            write_sheet(sheet, job.prompt, [(seed, self.file(job, seed)) for seed in job.seeds])

    def _write(self, job: PromptJob, seed: int, source: Source, latents: Tensor) -> None:
        if not latents.isfinite().all():
            raise ValueError(f"{job.prompt!r}, seed {seed}: the latents are not finite; the weights are of no use")
        if self.latents:
            write_latents(self.file(job, seed), latents[0], job.prompt, seed)
        else:
            write_video(self.file(job, seed), source.decode(latents)[0], source.fps)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name to (before, now) of the settings that both have, and differ; of tables, the entries that both have."""
    changed: dict[str, tuple[Any, Any]] = {}
    for name, new in json.loads(json.dumps(now)).items():
        old = before.get(name, new)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = _changes(old, new)
            changed |= {f"{name}.{entry}": pair for entry, pair in inner.items()}
        elif old != new:
            changed[name] = (old, new)
    return changed


def _named(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Share:
    """This process among those that torchrun started.

    Attributes:
        rank, world: of all processes; of the groups of them that share their samples.
        local_rank: on this machine; chooses the device.
        writes: whether this process writes what its group makes.
    """

    rank: int
    world: int
    local_rank: int
    writes: bool = True

    @classmethod
    def from_environment(cls, context: int = 1) -> Share:
        """What torchrun says; one process without it. `context` consecutive processes share their samples."""
        names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in names)
        return cls(rank // context, world // context, local_rank, rank % context == 0)

    def of(self, jobs: Sequence[PromptJob]) -> Sequence[PromptJob]:
        """Every world-th job; no two groups write the same file."""
        return jobs[self.rank :: self.world]
