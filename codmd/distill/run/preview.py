"""Previews of a student: few-step samples of fixed prompts as video, and the relations between their frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codmd import ops
from codmd.atomic import replacing

COLUMNS = 4
HEATMAP_SCALE = 16


def to_pixels(latents: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, T, 3, height, width] in [0, 1], on the CPU; latents that cannot be decoded show three channels as they are.

    Args:
        decode: of the model or of the data; raises TypeError or ValueError where there is none.
    """
    try:
        return decode(latents).float().cpu()
    except (TypeError, ValueError):
        channels = latents[:, :, torch.arange(3) % latents.shape[2]].float().cpu()
        low, high = channels.amin((1, 3, 4), keepdim=True), channels.amax((1, 3, 4), keepdim=True)
        return (channels - low) / (high - low).clamp(min=1e-12)


def tile(videos: Tensor) -> Tensor:
    """[B, T, 3, H, W] as one video [T, 3, rows * H, COLUMNS * W], padded with black."""
    count, frames, channels, height, width = videos.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    padded = torch.zeros(rows * columns, frames, channels, height, width)
    padded[:count] = videos
    grid = padded.view(rows, columns, frames, channels, height, width).permute(2, 3, 0, 4, 1, 5)
    return grid.reshape(frames, channels, rows * height, columns * width)


def heatmap(relation: Tensor) -> Tensor:
    """A relation matrix [n, n] of cosines from -1 to 1 in colours, [3, H, W] in [0, 1]."""
    import matplotlib

    colours = np.asarray(matplotlib.colormaps["RdBu_r"](((relation.float().cpu().clamp(-1, 1) + 1) / 2).numpy()))
    image = torch.from_numpy(colours[..., :3].copy()).permute(2, 0, 1)
    return image.repeat_interleave(HEATMAP_SCALE, 1).repeat_interleave(HEATMAP_SCALE, 2)


def write_preview(folder: Path, writer: Any, update: int, latents: Tensor, pixels: Tensor, fps: int) -> None:
    """The tiled video as MP4 (width and height rounded up to even) and as a moving picture in TensorBoard, the mean
    frame relation and the relation of the samples as heat maps.

    Args:
        writer: a `SummaryWriter`, or None.
        latents: [B, F, C, H, W].
        pixels: [B, T, 3, height, width] in [0, 1].
    """
    import imageio.v3 as imageio

    video = tile(pixels)
    scale = max(1, 128 // max(pixels.shape[-2:]))
    video = video.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    video = torch.nn.functional.pad(video, (0, video.shape[3] % 2, 0, video.shape[2] % 2))
    frames = (video.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"step_{update:08d}.mp4") as partial:
        imageio.imwrite(partial, frames, fps=fps, codec="libx264", macro_block_size=2)
    if writer is None:
        return
    gif = imageio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
    _add_gif(writer, "preview/samples", gif, update, frames.shape[1], frames.shape[2])
    writer.add_image("preview/frame_relation", heatmap(ops.relation_matrix(latents, "frame").mean(0)), update)
    if len(latents) > 1:
        writer.add_image("preview/sample_relation", heatmap(ops.relation_matrix(latents, "batch")), update)


def _add_gif(writer: Any, tag: str, gif: bytes, update: int, height: int, width: int) -> None:
    """TensorBoard plays an image summary that holds a GIF; its own add_video needs a package more."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), update)
