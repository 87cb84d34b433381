"""The whole demo as a function: options in, every outcome and its summary out; nothing is written but the cache."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from codmd import __version__
from codmd.distill.config.recipe import DistillConfig
from codmd.models.toy import ToyDenoiser

from .arc import ArcConfig
from .experiment import ARMS, TRAINED_ARMS, Job, Outcome, Settings
from .pool import run_jobs
from .summary import Summary, summarize
from .teacher import TeacherConfig, load_cached, store, train_teacher
from .timing import one_thread, sampling_milliseconds


@dataclass(frozen=True)
class Options:
    """The options of a demo."""

    seeds: Sequence[int]
    updates: int
    samples: int
    distill: DistillConfig
    teacher: TeacherConfig
    """The teacher to train when no better one is cached."""
    threads: int
    use_cache: bool
    quick: bool
    """Whether the sizes are those of a check rather than of a result; the report says so."""


@dataclass(frozen=True)
class Study:
    """The results of a demo; `settings` records options and versions for the report."""

    outcomes: list[Outcome]
    summary: Summary
    arc: ArcConfig
    settings: dict[str, Any]


def run_study(options: Options) -> Study:
    """Teacher, then every arm at every seed in parallel processes, then the sampling times.

    Raises:
        JobFailed: a run failed; see `run_jobs`.
    """
    start, busy = time.perf_counter(), sum(os.times()[:4])
    teacher, config, origin = obtain_teacher(options)
    with tempfile.TemporaryDirectory(prefix="codmd-demo-") as scratch:
        path = Path(scratch) / "teacher.safetensors"
        teacher.save(path)
        settings = Settings(str(path), config.arc, options.distill, options.updates, options.samples)
        arms = (*TRAINED_ARMS, *(arm for arm in ARMS if arm not in TRAINED_ARMS))  # the long jobs first
        jobs = [Job(arm, seed, settings) for arm in arms for seed in options.seeds]
        print(f"Distilling DMD and CoDMD students, {len(options.seeds)} seed(s), {options.updates} updates each")
        with progress_bar(sum(job.updates for job in jobs), "students") as bar:
            outcomes = run_jobs(jobs, options.threads, bar.update)
    steps = len(options.distill.sigmas)
    summary = summarize(outcomes, steps, sampling_milliseconds(teacher, options.distill))
    record = {
        "codmd": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "quick": options.quick,
        "seeds": list(options.seeds),
        "student updates": options.updates,
        "evaluation samples": options.samples,
        "teacher": f"{config.steps} training steps, {origin}",
        "processes": min(options.threads, len(jobs)),
        "wall seconds": round(time.perf_counter() - start),
        "CPU seconds": round(sum(os.times()[:4]) - busy),
        **asdict(options.distill),
        **{f"arc {name}": value for name, value in asdict(config.arc).items()},
    }
    return Study(outcomes, summary, config.arc, record)


def obtain_teacher(options: Options) -> tuple[ToyDenoiser, TeacherConfig, str]:
    """(teacher, its configuration, "cached" or "trained"): the full teacher when cached, else the one asked for."""
    for candidate in dict.fromkeys((TeacherConfig(), options.teacher)) if options.use_cache else ():
        if (cached := load_cached(candidate, _warn)) is not None:
            return cached, candidate, "cached"
    config = options.teacher
    later = " (later runs take it from the cache)" if options.use_cache else ""
    print(f"Training the teacher, {config.steps} steps{later}")
    with one_thread(), progress_bar(config.steps, "teacher") as bar:
        teacher = train_teacher(config, bar.update)
    if options.use_cache:
        store(teacher, config, _warn)
    return teacher, config, "trained"


def progress_bar(total: int, name: str) -> tqdm:
    """A bar on stderr; a line every ten seconds when that is no terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=name, unit="step", mininterval=interval, dynamic_ncols=True)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
