"""Motion by dense optical flow (DIS, Kroeger et al., ECCV 2016), and what motion does not explain."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

LONG_SIDE, SHORT_SIDE = 832, 64
"""Flow is computed on frames scaled into these bounds, and given in pixels of the frame itself."""

MIN_SIDE = 16
"""Smaller frames hold too little for the flow's patches."""

FASTEST_SHARE = 0.05
DYNAMIC_SPEED = 6 * 8 / 256
"""Short sides per second: VBench's dynamic degree asks for 6 of 256 pixels between frames at 8 a second."""
DYNAMIC_STEPS = 1 / 4


@dataclass(frozen=True)
class Motion:
    """One value for each step from a frame to the next."""

    speed: list[float]
    """Mean length of the flow, pixels."""
    fastest: list[float]
    """Mean length of the largest 5 % of the flow, pixels."""
    residual: list[float]
    """Mean absolute difference to the next frame after motion compensation, as a share of the grey range."""


def measure_motion(pixels: np.ndarray) -> Motion:
    """Optical flow between all neighbouring frames.

    Args:
        pixels: [F, H, W, 3] uint8 RGB, two or more frames.
    """
    flow_of = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    scale = _scale(*pixels.shape[1:3])
    speed: list[float] = []
    fastest: list[float] = []
    residual: list[float] = []
    for frame, following in itertools.pairwise(_grey(image, scale) for image in pixels):
        flow = flow_of.calc(frame, following, None)
        length = np.linalg.norm(flow, axis=-1).ravel() / scale
        cut = length.size - max(1, round(FASTEST_SHARE * length.size))
        speed.append(float(length.mean()))
        fastest.append(float(np.partition(length, cut)[cut:].mean()))
        residual.append(_residual(frame, following, flow))
    return Motion(speed, fastest, residual)


def is_static(fastest: list[float], fps: float, short_side: int) -> bool:
    """VBench's rule for its dynamic degree, with DIS for RAFT: too few steps have a fast enough fastest 5 %."""
    dynamic = [speed * fps / short_side > DYNAMIC_SPEED for speed in fastest]
    return sum(dynamic) < DYNAMIC_STEPS * len(dynamic)


def _residual(frame: np.ndarray, following: np.ndarray, flow: np.ndarray) -> float:
    """Differences count where the flow stays inside the picture; 0 where it never does."""
    height, width = frame.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x + flow[..., 0], y + flow[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    moved = cv2.remap(following, x, y, cv2.INTER_LINEAR)
    difference = cv2.absdiff(frame, moved)[inside]
    return float(difference.mean()) / 255 if difference.size else 0.0


def _scale(height: int, width: int) -> float:
    if max(height, width) > LONG_SIDE:
        return min(1.0, max(LONG_SIDE / max(height, width), MIN_SIDE / min(height, width)))
    return max(1.0, SHORT_SIDE / min(height, width))


def _grey(image: np.ndarray, scale: float) -> np.ndarray:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if scale == 1:
        return grey
    return cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
