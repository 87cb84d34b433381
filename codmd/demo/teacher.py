"""The demo's teacher: trained once by flow matching on arc video, then kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from codmd.distill.update.rollout import noise_like
from codmd.distill.update.schedule import shift_sigma
from codmd.models.toy import ToyConfig, ToyDenoiser

from .arc import ArcConfig, ArcVideo

SHARDS = 2


@dataclass(frozen=True)
class TeacherConfig:
    """Everything the teacher's weights depend on; its hash names the cache file."""

    steps: int = 6000
    batch_size: int = 512
    lr: float = 2e-3
    warmup: int = 200
    shift: float = 3.0
    seed: int = 0
    arc: ArcConfig = field(default_factory=ArcConfig)
    model: ToyConfig = field(default_factory=ToyConfig)


def cache_path(config: TeacherConfig) -> Path:
    """The file of the teacher of that configuration: in $XDG_CACHE_HOME/codmd, or ~/.cache/codmd."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:16]
    return Path(root) / "codmd" / f"arc-teacher-{key}.safetensors"


def train_teacher(config: TeacherConfig, progress: Callable[[], None]) -> ToyDenoiser:
    """Flow matching on fresh arc video, Adam with a linear warm-up and a cosine decay to 0.

    Each batch is split over `SHARDS` Python threads, each with one torch thread of its own: on two cores nearly
    twice as fast as one, without the spinning barriers that make torch's own threads crawl on a busy machine. The
    result does not depend on how many cores there are.

    Args:
        progress: called after every step.
    """
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ToyDenoiser(config.model)
    data = ArcVideo(config.arc)
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, fused=True)

    def gradient(x0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        error = model(model.add_noise(x0, noise, sigma), sigma) - (noise - x0)
        return torch.autograd.grad(error.square().mean() / SHARDS, weights)

    with ThreadPoolExecutor(SHARDS, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for step in range(config.steps):
            warm = min(1.0, (step + 1) / config.warmup)
            lr = config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            x0 = data.sample(config.batch_size, generator)
            noise = noise_like(x0, generator)
            sigma = shift_sigma(torch.rand(config.batch_size, generator=generator), config.shift)
            shards = threads.map(gradient, x0.chunk(SHARDS), noise.chunk(SHARDS), sigma.chunk(SHARDS))
            for weight, *parts in zip(weights, *shards, strict=True):
                weight.grad = sum(parts[1:], start=parts[0])
            optimizer.step()
            progress()
    return model


def load_cached(config: TeacherConfig, warn: Callable[[str], None]) -> ToyDenoiser | None:
    """The cached teacher, or None; a damaged cache file is reported through `warn` and treated as absent."""
    path = cache_path(config)
    try:
        return ToyDenoiser.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn(f"the cached teacher cannot be used and will be trained again: {error}")
        return None


def store(model: ToyDenoiser, config: TeacherConfig, warn: Callable[[str], None]) -> None:
    """Writes the teacher to the cache; a cache that cannot be written is reported and does not end the run."""
    path = cache_path(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    except OSError as error:
        warn(f"the teacher could not be cached, the next run will train it again: {error}")
