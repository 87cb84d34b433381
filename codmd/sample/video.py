"""Video and latent files, and whether one that is there already is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codmd.atomic import replacing
from codmd.distill.data.latents import LATENTS, SAMPLE
from codmd.models.tensor_files import save_tensors


def write_video(path: Path, pixels: Tensor, fps: int) -> None:
    """Writes pixels [T, 3, height, width] in [0, 1] as H.264 mp4, all or nothing."""
    import imageio.v2 as imageio

    frames = pixels.mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    with replacing(path) as partial:
        writer: Any = imageio.get_writer(partial, fps=fps, codec="libx264", quality=8, macro_block_size=2)
        with writer:
            for frame in frames:
                writer.append_data(frame)


def read_video(path: Path) -> np.ndarray:
    """Frames [T, height, width, 3], uint8.

    Raises:
        OSError: the file is no readable video.
    """
    import imageio.v2 as imageio

    try:
        reader: Any = imageio.get_reader(path)
        with reader:
            frames = list(reader.iter_data())  # of unknown length
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise OSError(f"{path}: no readable video: {error}") from error
    if not frames:
        raise OSError(f"{path}: has no frames")
    return np.stack(frames)


def video_is_complete(path: Path, frames: int) -> bool:
    """Whether `path` is a video that decodes to that many frames."""
    try:
        return len(read_video(path)) == frames
    except OSError:
        return False


def write_latents(path: Path, latents: Tensor, prompt: str, seed: int) -> None:
    """Writes normalised latents [F, C, H, W] as safetensors, all or nothing; the metadata's "sample" is JSON."""
    sample = json.dumps({"prompt": prompt, "seed": seed}, ensure_ascii=False)
    save_tensors(path, {LATENTS: latents}, {SAMPLE: sample})


def latents_are_complete(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether `path` holds latents of that shape."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(LATENTS).get_shape()) == shape
    except (SafetensorError, OSError):
        return False
