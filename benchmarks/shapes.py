"""The latents that people train on, ``[batch, frames, channels, height, width]``."""

from __future__ import annotations

SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "wan-480p": (1, 21, 16, 60, 104),
    "wan-480p-b2": (2, 21, 16, 60, 104),
    "wan-480p-b4": (4, 21, 16, 60, 104),
    "wan-480p-b8": (8, 21, 16, 60, 104),
    "wan-720p": (1, 21, 16, 90, 160),
    "wan-480p-161-frames": (1, 41, 16, 60, 104),
    "long-video-240": (1, 240, 16, 60, 104),
    "images-b64": (64, 1, 16, 128, 128),
}
