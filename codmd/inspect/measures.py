"""The measures of one clip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from codmd import metrics, reference
from codmd.reference.relation import Pool

from .blockiness import blockiness
from .clips import Clip
from .motion import is_static, measure_motion

PIXEL_GRID = (8, 8)
STRIP_ROWS, STRIP_COLUMNS, STRIP_WIDTH = 2, 4, 200


@dataclass(frozen=True)
class Column:
    """One measure as a reader meets it."""

    title: str
    digits: int
    explanation: str


COLUMNS = {
    "cosine": Column("cosine", 4, "mean cosine between the features of two different frames"),
    "spearman": Column("Spearman", 4, "mean rank correlation between the features of two different frames"),
    "order": Column(
        "temporal order",
        3,
        "Spearman's correlation between the time from frame to frame and their dissimilarity (1 - cosine): "
        "near 1 for steady motion, near 0 for frames in random order",
    ),
    "motion": Column("motion, px/frame", 2, "mean length of the optical flow (OpenCV's DIS, medium preset)"),
    "speed": Column(
        "motion, %/s", 1, "the same in percent of the frame's short side per second, for any size and rate"
    ),
    "static": Column(
        "static",
        2,
        "1 when fewer than a quarter of the steps have a mean of the largest 5 % of the flow above 18.75 % of the "
        "short side per second (the rule of VBench's dynamic degree, with DIS for RAFT); the mean is the share",
    ),
    "flicker": Column("flicker, %", 2, "mean grey difference to the next frame after motion compensation"),
    "blockiness": Column(
        "blockiness",
        2,
        "grey difference over the lines of an 8 x 8 grid over that of other neighbours, each plus one level of 255: "
        "1 without a grid, above about 1.3 visible blocks",
    ),
    "saturation": Column("saturation, %", 1, "mean difference of the largest and smallest of R, G, B"),
    "clipped": Column("clipped, %", 1, "share of colour values below 3 or above 252 of 255"),
    "step": Column("step", 4, "root mean square change of features from frame to frame; latents have this alone"),
}
"""Every measure; the means of cosine and Spearman leave the diagonal out."""


@dataclass(frozen=True)
class Measurement:
    """What was found in one clip; F frames of K features."""

    path: Path
    kind: str
    size: tuple[int, int]
    """Width and height."""
    fps: float
    features: Tensor
    """[F, K] float32."""
    cosine: Tensor
    """[F, F] float32, the paper's frame relation."""
    spearman: Tensor
    """[F, F] float32."""
    values: dict[str, float]
    """By the names of COLUMNS; motion and colour are absent for latents."""
    curves: dict[str, list[float]]
    """Motion (px/frame) and flicker (%) of every step."""
    strip: bytes | None
    """Eight frames evenly spaced in time, in two rows, as JPEG."""

    @property
    def frames(self) -> int:
        return len(self.features)


def measure(path: Path, clip: Clip, pool: Pool | None = None) -> Measurement:
    """Measures one clip.

    Args:
        path: where it came from.
        clip: its frames.
        pool: regions that features are averaged over; by default the paper's "mean" for latents and an 8 x 8 grid
            for pixels, whose three channel means alone would say little.
    """
    features = frame_features(clip, pool)
    cosine, spearman = reference.relation(features.double()), metrics.frame_rank_relations(features)
    values = {
        "cosine": _mean_off_diagonal(cosine),
        "spearman": _mean_off_diagonal(spearman),
        "order": temporal_order(cosine),
        "step": float(features.double().diff(dim=0).square().mean(dim=1).sqrt().mean()),
    }
    curves: dict[str, list[float]] = {}
    strip: bytes | None = None
    if clip.pixels is None:
        assert clip.latents is not None
        height, width = clip.latents.shape[2:]
    else:
        height, width = clip.pixels.shape[1:3]
        motion = measure_motion(clip.pixels)
        curves = {"motion": motion.speed, "flicker": [100 * r for r in motion.residual]}
        mean_motion = float(np.mean(motion.speed))
        saturation, clipped = colour(clip.pixels)
        values |= {
            "motion": mean_motion,
            "speed": 100 * mean_motion * clip.fps / min(height, width),
            "static": float(is_static(motion.fastest, clip.fps, min(height, width))),
            "flicker": float(np.mean(curves["flicker"])),
            "blockiness": blockiness(clip.pixels),
            "saturation": 100 * saturation,
            "clipped": 100 * clipped,
        }
        strip = _strip(clip.pixels)
    return Measurement(
        path,
        "latents" if clip.pixels is None else "pixels",
        (width, height),
        clip.fps,
        features,
        cosine.float(),
        spearman.float(),
        values,
        curves,
        strip,
    )


def frame_features(clip: Clip, pool: Pool | None = None) -> Tensor:
    """Frame features [F, K] float32 of latents as they are, or of pixels scaled to [-1, 1]."""
    if clip.pixels is None:
        assert clip.latents is not None
        return reference.frame_features(clip.latents[None], pool=_fitting(pool or "mean", clip.latents.shape[2:]))[0]
    rows = []
    for image in clip.pixels:
        frame = torch.from_numpy(image).permute(2, 0, 1).float().div(127.5).sub(1)
        rows.append(reference.frame_features(frame[None, None], pool=_fitting(pool or PIXEL_GRID, image.shape))[0])
    return torch.cat(rows)


def temporal_order(cosine: Tensor) -> float:
    """Spearman's correlation between |i - j| and 1 - S_ij over pairs of frames; 0 for two frames or a constant S."""
    row, column = torch.triu_indices(len(cosine), len(cosine), offset=1)
    lag, dissimilarity = (column - row).double(), 1 - cosine[row, column]
    return float(metrics.frame_rank_relations(torch.stack((lag, dissimilarity)))[0, 1])


def colour(pixels: np.ndarray) -> tuple[float, float]:
    """(saturation, clipped share) of [F, H, W, 3] uint8: mean max - min over R, G, B, and values at the ends."""
    chroma = math.fsum(float(np.ptp(image, axis=-1).mean()) for image in pixels) / len(pixels)
    clipped = math.fsum(float(((image < 3) | (image > 252)).mean()) for image in pixels) / len(pixels)
    return chroma / 255, clipped


def _fitting(pool: Pool, shape: tuple[int, ...]) -> Pool:
    return (min(pool[0], shape[0]), min(pool[1], shape[1])) if isinstance(pool, tuple) else pool


def _mean_off_diagonal(matrix: Tensor) -> float:
    count = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1)))


def _strip(pixels: np.ndarray) -> bytes:
    chosen = pixels[np.linspace(0, len(pixels) - 1, STRIP_ROWS * STRIP_COLUMNS).round().astype(int)]
    height = max(1, round(STRIP_WIDTH * pixels.shape[1] / pixels.shape[2]))
    small = [cv2.resize(image, (STRIP_WIDTH, height), interpolation=cv2.INTER_AREA) for image in chosen]
    strip = np.vstack([np.hstack(small[i : i + STRIP_COLUMNS]) for i in range(0, len(small), STRIP_COLUMNS)])
    return cv2.imencode(".jpg", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR))[1].tobytes()
