"""Previews of a student: few-step samples of fixed prompts as video, and the relations between their frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codmd import ops
from codmd.atomic import replacing

from .trackers import Tracker, caption_of

COLUMNS = 4


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


def heatmap(relation: Tensor, title: str, unit: str) -> np.ndarray:
    """A relation matrix [n, n] of cosines from -1 to 1 as a picture with axes and a scale, [H, W, 3] of uint8.

    Args:
        unit: what rows and columns count, from 1: "frame", "sample".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count = len(relation)
    figure = Figure(figsize=(4.6, 3.8), dpi=100, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = (0.5, count + 0.5, count + 0.5, 0.5)
    image = axes.imshow(relation.float().cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, extent=edges)
    axes.set(title=title, xlabel=unit, ylabel=unit)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="cosine")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_preview(
    folder: Path,
    tracker: Tracker | None,
    update: int,
    latents: Tensor,
    pixels: Tensor,
    fps: int,
    prompts: Sequence[str] = (),
) -> None:
    """The tiled video as MP4 (width and height rounded up to even) and, with its prompts, in the tracker; there also
    the mean relation of frames and the relation of samples as heat maps.

    Args:
        tracker: of the run, or None.
        latents: [B, F, C, H, W].
        pixels: [B, T, 3, height, width] in [0, 1].
        prompts: of the samples; none for an unconditional model.
    """
    import imageio.v3 as imageio

    video = tile(pixels)
    scale = max(1, 128 // max(pixels.shape[-2:]))
    video = video.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    video = torch.nn.functional.pad(video, (0, video.shape[3] % 2, 0, video.shape[2] % 2))
    frames = (video.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step_{update:08d}.mp4"
    with replacing(file) as partial:
        imageio.imwrite(partial, frames, fps=fps, codec="libx264", macro_block_size=2)
    if tracker is None:
        return
    tracker.video("preview/samples", file, frames, fps, caption_of(prompts, min(COLUMNS, len(pixels))), update)
    frame_relation = ops.relation_matrix(latents, "frame").mean(0)
    tracker.picture("preview/frame_relation", heatmap(frame_relation, "mean relation of frames", "frame"), update)
    if len(latents) > 1:
        relation = ops.relation_matrix(latents, "batch")
        tracker.picture("preview/sample_relation", heatmap(relation, "relation of samples", "sample"), update)
