"""The model that `codmd sample` runs: a trained student, or weights from a folder or a file."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from codmd.models.wan.network import WanDenoiser
from codmd.models.wan.options import WanOptions
from codmd.trained import Renamed, open_student

FRAME_STRIDE, PIXEL_STRIDE = 4, 8
"""Pixels of Wan2.1's VAE per latent cell: 4 (F - 1) + 1 frames, 8 in height and width."""


@dataclass(frozen=True)
class Source:
    """A model ready to sample, and the steps it was trained with (none for plain weights)."""

    model: WanDenoiser
    sigmas: tuple[float, ...]


def is_training(path: Path) -> bool:
    """Whether `path` is a run or a checkpoint of `codmd train`."""
    return (path / "meta.json").is_file() or (path / "checkpoints").is_dir()


def latent_size(frames: int | None, height: int | None, width: int | None) -> dict[str, int]:
    """Options of `WanOptions` for a video of that many frames and pixels; None leaves one out.

    Raises:
        ValueError: a number that no latents decode to.
    """
    size = {}
    if frames is not None:
        if (frames - 1) % FRAME_STRIDE:
            raise ValueError(f"--frames: got {frames}; expected a multiple of {FRAME_STRIDE}, plus 1")
        size["frames"] = (frames - 1) // FRAME_STRIDE + 1
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None:
            if pixels % (2 * PIXEL_STRIDE):
                raise ValueError(f"--{name}: got {pixels}; expected a multiple of {2 * PIXEL_STRIDE}")
            size[name] = pixels // PIXEL_STRIDE
    return size


def open_source(path: Path, ema: bool, options: Mapping[str, Any], device: torch.device) -> Source:
    """Builds the model on `device`, its weights stored in the dtype that it computes in.

    Args:
        options: of `WanOptions`, over those the student was trained with.

    Raises:
        FileNotFoundError, ValueError: it cannot be read or does not fit.
    """
    if is_training(path):
        with open_student(path, ema) as student:
            settings = student.run.model
            if settings.name != "wan":
                raise ValueError(f"{path}: trained a {settings.name!r} model, which codmd sample has no decoder for")
            trained = replace(
                settings.options, gradient_checkpointing=False, **{k: v for k, v in options.items() if k != "config"}
            )
            with torch.device("meta"):
                model = WanDenoiser(replace(trained, storage=trained.compute))
            model.fill(Renamed(student.weights, "transformer."), device)
            return Source(model.eval().requires_grad_(False), student.run.distill.sigmas)
    if ema:
        raise ValueError("--ema: only for a run or a checkpoint of codmd train")
    plain = WanOptions(weights=str(path), **options)
    with torch.device("meta"):
        model = WanDenoiser(replace(plain, storage=plain.compute))
    model.load_weights(path, device)
    return Source(model.eval().requires_grad_(False), ())


def fingerprint(model: WanDenoiser) -> str:
    """Tells weights apart: a checksum of every weight's name, shape and first numbers."""
    total = 0
    for name, value in sorted(model.transformer.state_dict().items()):
        head = value.flatten()[:256].float().cpu().numpy().tobytes()
        total = zlib.crc32(f"{name} {tuple(value.shape)}".encode() + head, total)
    return f"{total:08x}"
