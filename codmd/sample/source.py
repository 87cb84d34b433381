"""The model that `codmd sample` runs: a trained student, or weights from a folder or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codmd import models
from codmd.models import VideoDenoiser
from codmd.trained import open_student


@dataclass(frozen=True)
class Source:
    """A model ready to sample, its options, and the steps it was trained with (none for plain weights)."""

    model: VideoDenoiser
    options: Any
    sigmas: tuple[float, ...]


def is_training(path: Path) -> bool:
    """Whether `path` is a run or a checkpoint of `codmd train`."""
    return (path / "meta.json").is_file() or (path / "checkpoints").is_dir()


def open_source(
    path: Path,
    ema: bool,
    options: Mapping[str, Any],
    device: torch.device,
    video: Mapping[str, int | None] | None = None,
    name: str = models.DEFAULT,
) -> Source:
    """Builds the model on `device`, its weights stored in the dtype that it computes in.

    Args:
        options: of the model, over those the student was trained with.
        video: "frames", "height" and "width" in pixels; None is as trained, or the model's default.
        name: the model that plain weights are of.

    Raises:
        FileNotFoundError, ValueError: it cannot be read or does not fit.
    """
    given = {"frames": None, "height": None, "width": None, **(video or {})}
    if is_training(path):
        with open_student(path, ema) as student:
            settings = student.run.model
            changes = {key: value for key, value in options.items() if key != "config"}
            options_now = models.read_options(settings.name, **{**vars(settings.options), **changes})
            chosen = options_now.for_inference().for_video(**given)
            model = models.unread(settings.name, chosen)
            model.fill(student.weights, device)
            return Source(model.eval().requires_grad_(False), chosen, student.run.distill.sigmas)
    if ema:
        raise ValueError("--ema: only for a run or a checkpoint of codmd train")
    plain = models.read_options(name, weights=str(path), **options).for_inference()
    if video is not None:
        plain = plain.for_video(**{**given, **plain.default_video, **{k: v for k, v in given.items() if v is not None}})
    model = models.unread(name, plain)
    model.load_weights(path, device)
    return Source(model.eval().requires_grad_(False), plain, ())
