"""What can be known of a run without training: files, sizes, and one forward pass without numbers."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from codmd import models
from codmd.distill.config.recipe import split_batch
from codmd.distill.config.run_config import RunConfig
from codmd.distill.config.sections import ModelSettings
from codmd.distill.config.typed import ConfigError
from codmd.distill.run.job import check_paths, open_source, preview_numbers
from codmd.distill.run.parallel import check_processes
from codmd.models.base import Condition, VideoDenoiser, cat_cond


def dry_run(config: RunConfig) -> str:
    """Validates `config` for the number of processes at hand and describes the run.

    Networks are built on the meta device, without memory for weights, and evaluated there once.

    Raises:
        ConfigError: what would stop the run at its start.
    """
    try:
        return _described(config)
    except (ValueError, TypeError, RuntimeError, FileNotFoundError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def _described(config: RunConfig) -> str:
    size = int(os.environ.get("WORLD_SIZE", 1))
    teaching = config.mode == "teacher"
    settings = config.model.changed({"weights": config.teacher.weights}, "model") if teaching else config.model
    check_processes(config.parallel, size)
    batch = config.teacher if teaching else config.distill
    micro_batch, accumulate = split_batch(batch.batch_size, batch.micro_batch, size // config.parallel.context)
    check_paths(settings)
    _check_writable(config.folder)
    model = build_meta(settings)
    trained = sum(weight.numel() for weight in model.trainable_parameters())
    items = _check_data(config, model, micro_batch)
    updates = config.teacher.updates if teaching else config.updates
    lines = [
        f"{config.mode}: {updates} updates of {batch.batch_size} samples, {size} x {micro_batch} x {accumulate} "
        "(processes x micro-batch x accumulated)",
        f"model: {settings.name}, {trained:,} weights, latents {' x '.join(map(str, model.latent_shape))}",
        f"data: {config.data.kind}" + (f", {items} items" if items else ""),
        f"folder: {config.folder}",
    ]
    return "\n".join(lines)


def build_meta(settings: ModelSettings) -> VideoDenoiser:
    """The network without memory for its weights; its tables, and so its prompts' embeddings, are on the CPU."""
    with torch.device("meta"):
        model = models.build(settings.name, **dataclasses.asdict(settings.options))
    for module in model.modules():
        for name, table in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(table, device="cpu"))
    return model


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"out: {folder} cannot be made: {existing} is no folder that can be written to")


def _check_data(config: RunConfig, model: VideoDenoiser, micro_batch: int) -> int:
    """Number of items, after one forward of the network with the condition of the first ones."""
    source = open_source(config, model)
    preview_numbers(config, source)
    cond = None
    if source is not None:
        cond = source.condition([number % len(source) for number in range(micro_batch)])
        if config.mode == "distill" and config.distill.guidance is not None:
            cat_cond((cond, model.null_cond(micro_batch)))
    with FakeTensorMode():  # of the CPU, because autocast knows no meta device
        state = itertools.chain(model.named_parameters(), model.named_buffers())
        weights = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in state}
        x_t, sigma = torch.empty(micro_batch, *model.latent_shape), torch.empty(micro_batch)
        functional_call(model, weights, (x_t, sigma, _fake(cond)))
    return 0 if source is None else len(source)


def _fake(cond: Condition) -> Condition:
    """Without numbers, on the CPU whatever device it is on; inside a `FakeTensorMode`."""
    if isinstance(cond, Mapping):
        return {name: _fake(value) for name, value in cond.items()}
    return None if cond is None else torch.empty(cond.shape, dtype=cond.dtype)
