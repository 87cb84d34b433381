"""The model that `codmd sample` runs: a trained student, or weights from a folder or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codmd import models
from codmd.distill.data.textures import Textures
from codmd.distill.run.job import open_source as open_data
from codmd.distill.update.rollout import Transition
from codmd.files import is_training
from codmd.models import VideoDenoiser
from codmd.trained import open_student

SMALLEST = 128
"""Pixels across, to which the tiny videos of a run's own data are enlarged for the eye."""


@dataclass(frozen=True)
class Source:
    """A model ready to sample.

    Attributes:
        model, options: the model and its options.
        sigmas, transition: the steps it was trained with; none for plain weights.
        data: of its training, where that has captions and pixels of its own; no text encoder and no VAE then.
        preview_fps: of the videos of its training's previews, which those of such data have too.
    """

    model: VideoDenoiser
    options: Any
    sigmas: tuple[float, ...] = ()
    transition: Transition = "renoise"
    data: Textures | None = None
    preview_fps: int = 8

    @property
    def fps(self) -> int:
        """Frames per second of the videos."""
        return self.model.frames_per_second if self.data is None else self.preview_fps

    @property
    def video_frames(self) -> int:
        """Frames of one video."""
        return self.model.video_frames if self.data is None else self.model.latent_shape[0]

    def load_decoder(self) -> None:
        """Reads the decoder now, so that its errors come early.

        Raises:
            FileNotFoundError, ValueError: there is none, or it cannot be read.
        """
        if self.data is None:
            self.model.load_decoder()

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents [B, F, C, H, W]: [B, T, 3, height, width], float32 in [0, 1]."""
        return self.model.decode(latents) if self.data is None else enlarged(self.data.decode(latents))


def enlarged(pixels: Tensor) -> Tensor:
    """Videos [B, T, 3, H, W] below `SMALLEST` pixels, between whose pixels colours run linearly."""
    scale = max(1, SMALLEST // max(pixels.shape[-2:]))
    larger = F.interpolate(pixels.flatten(0, 1), scale_factor=scale, mode="bilinear")
    return larger.unflatten(0, pixels.shape[:2])


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
            settings = student.model
            changes = {key: value for key, value in options.items() if key != "config"}
            options_now = models.read_options(settings.name, **{**vars(settings.options), **changes})
            chosen = options_now.for_inference().for_video(**given)
            model = models.unread(settings.name, chosen)
            model.fill(student.weights, device)
            data = open_data(student.run, model) if student.run.data.kind == "textures" else None
            assert data is None or isinstance(data, Textures)
            frozen, run = model.eval().requires_grad_(False), student.run
            return Source(frozen, chosen, run.distill.sigmas, run.distill.transition, data, run.log.fps)
    if ema:
        raise ValueError("--ema: only for a run or a checkpoint of codmd train")
    plain = models.read_options(name, weights=str(path), **options).for_inference()
    if video is not None:
        plain = plain.for_video(**{**given, **plain.default_video, **{k: v for k, v in given.items() if v is not None}})
    model = models.unread(name, plain)
    model.load_weights(path, device)
    return Source(model.eval().requires_grad_(False), plain)
