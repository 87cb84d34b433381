"""The check of a run without training: files, sizes, and one forward pass on shapes alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call

from codmd import models
from codmd.distill.config.recipe import split_batch
from codmd.distill.config.run_config import MISSING, RunConfig, not_given
from codmd.distill.config.sections import ModelSettings
from codmd.distill.config.typed import ConfigError, leaves
from codmd.distill.run.job import check_paths, open_source, preview_numbers
from codmd.distill.run.parallel import check_processes
from codmd.distill.run.roles import of_recipe
from codmd.models.base import Condition, VideoDenoiser, cat_cond
from codmd.private import fake_tensors


def dry_run(config: RunConfig) -> str:
    """Validates `config` and describes the run.

    A process by itself stands for as many as `parallel.shard_size` and `context` ask for; torchrun says how many there
    are. Networks are built on the meta device, without memory for weights, and evaluated there once.

    Raises:
        ConfigError: all that would stop the run at its start.
    """
    found = Problems([not_given(key) for key, value in leaves(config.as_mapping()) if value == MISSING])
    size = int(os.environ.get("WORLD_SIZE", 1))
    assumed = size == 1 and math.lcm(config.parallel.shard_size or 1, config.parallel.context)
    size = max(size, assumed)
    teaching = config.mode == "teacher"
    settings = config.model.changed({"weights": config.teacher.weights}, "model") if teaching else config.model
    batch = config.teacher if teaching else config.distill
    found.of(lambda: check_processes(config.parallel, size))
    split = found.of(lambda: split_batch(batch.batch_size, batch.micro_batch, size // config.parallel.context))
    found.of(lambda: check_paths(settings))
    found.of(lambda: _check_writable(config.folder))
    model = found.of(lambda: build_meta(settings, config))
    items, trained = 0, 0
    if model is not None:
        trained = found.of(lambda: sum(weight.numel() for weight in model.trainable_parameters()))
        items = _check_data(config, model, split[0] if split else 1, found)
    if found.problems:
        raise ConfigError(*found.problems)
    micro_batch, accumulate = split
    updates = config.teacher.updates if teaching else config.updates
    lines = [
        f"{config.mode}: {updates} updates of {batch.batch_size} samples, {size} x {micro_batch} x {accumulate} "
        "(processes x micro-batch x accumulated)",
        f"model: {settings.name}, {trained:,} weights, latents {' x '.join(map(str, model.latent_shape))}",
        *([] if teaching else [f"recipe: {config.distill.summary}"]),
        *([f"watch: every {config.watch.every}, then {config.watch.stop_on}"] if config.watch.every else []),
        f"data: {config.data.kind}" + (f", {items} items" if items else ""),
        f"folder: {config.folder}",
    ]
    if assumed > 1:
        lines.append(f"checked for {size} processes, the fewest for its parallel settings; start them with torchrun")
    return "\n".join(lines)


class Problems:
    """The problems that checks found; none keeps the others from running.

    Attributes:
        problems: sentences, each once.
    """

    def __init__(self, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)

    def of(self, check: Callable[[], Any]) -> Any:
        """The result of `check`; None when it found a problem, which is noted unless it is that of a missing value."""
        try:
            return check()
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            new = error.problems if isinstance(error, ConfigError) else (str(error),)
            self.problems += [text for text in new if text not in self.problems and MISSING not in text]
            return None


def build_meta(settings: ModelSettings, config: RunConfig) -> VideoDenoiser:
    """The network without memory for its weights; its tables, and so its prompts' embeddings, are on the CPU."""
    with torch.device("meta"):
        model = of_recipe(models.build(settings.name, **dataclasses.asdict(settings.options)), config)
    for module in model.modules():
        for name, table in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(table, device="cpu"))
    return model


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"out: {folder} cannot be made: {existing} is no folder that can be written to")


def _check_data(config: RunConfig, model: VideoDenoiser, micro_batch: int, found: Problems) -> int:
    """Number of items, after one forward of the network with the condition of the first ones."""
    guided = config.mode == "distill" and config.distill.guidance is not None
    null = found.of(lambda: model.null_cond(micro_batch)) if guided else None
    if config.data.path == MISSING:
        return 0
    source = found.of(lambda: open_source(config, model))
    if source is None and config.data.kind != "none":
        return 0
    found.of(lambda: preview_numbers(config, source))

    def forward() -> None:
        cond = None
        if source is not None:
            cond = source.condition([number % len(source) for number in range(micro_batch)])
            if null is not None:
                cat_cond((cond, model.without_prompt(cond, micro_batch)))
        with fake_tensors():  # of the CPU, because autocast knows no meta device
            state = itertools.chain(model.named_parameters(), model.named_buffers())
            weights = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in state}
            x_t, sigma = torch.empty(micro_batch, *model.latent_shape), torch.empty(micro_batch)
            functional_call(model, weights, (x_t, sigma, _fake(cond)))

    found.of(forward)
    return 0 if source is None else len(source)


def _fake(cond: Condition) -> Condition:
    """Without numbers, on the CPU whatever device it is on; inside `fake_tensors`."""
    if isinstance(cond, Mapping):
        return {name: _fake(value) for name, value in cond.items()}
    return None if cond is None else torch.empty(cond.shape, dtype=cond.dtype)
