"""Clips read from video files, GIFs, folders of frames, and latents in safetensors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read when OpenCV opens its first video

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codmd.files import is_text, samples_in
from codmd.mp4 import BadMovie, read_movie
from codmd.reference import to_bfchw

from .motion import MIN_SIDE

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what cannot be read is reported by name, once

VIDEOS = {".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif"}
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
LATENTS = {".safetensors"}
DEFAULT_FPS = 16.0


class UnreadableClip(ValueError):
    """The clip cannot be read; the message says why, without the path."""


@dataclass(frozen=True)
class Clip:
    """One video: pixels [F, H, W, 3] uint8 RGB or latents [F, C, H, W], and frames per second."""

    pixels: np.ndarray | None
    latents: Tensor | None
    fps: float


def find_clips(paths: Iterable[Path]) -> list[Path]:
    """One path a clip: files and folders of frames as given, other folders replaced by the clips they hold, sorted.

    A folder that `codmd sample` wrote stands for its videos or latents. A path that holds no clip stays in the list;
    :func:`read_clip` says what is wrong with it.
    """
    found: list[Path] = []
    for path in map(samples_in, paths):
        children = [p for p in sorted(path.iterdir(), key=_by_number) if _is_clip(p)] if path.is_dir() else []
        found.extend([path] if not children or _frame_files(path) else children)
    return found


def clip_name(path: Path) -> str:
    """The name by which a clip and its reference belong together: a file's without the suffix, a folder's own."""
    return path.name if path.is_dir() else path.stem


def read_clip(path: Path, fps: float | None = None) -> Clip:
    """Reads a clip of two or more frames.

    Images with an alpha channel are composited on black. What lies under it in a video cannot be told apart once the
    video is decoded, so such a video is refused; a GIF is white where nothing was painted.

    Args:
        path: a video file, a folder of equally large images (in the order of the numbers in their names), or a
            safetensors file with one tensor [F, C, H, W] or [1, F, C, H, W] (or one named "latents"); metadata
            {"layout": "bcfhw"} marks [C, F, H, W].
        fps: frames per second, instead of what a video file says; 16 where nothing says it.

    Raises:
        UnreadableClip: missing, damaged, truncated, not a clip, of fewer than two frames, or too small.
    """
    if not path.exists():
        raise UnreadableClip("no such file or folder")
    if path.is_file() and not is_text(str(path.resolve())):  # OpenCV crashes on it
        raise UnreadableClip("has a name that is not UTF-8; rename it")
    try:
        if path.is_dir():
            clip = Clip(_read_frames(path), None, fps or DEFAULT_FPS)
        elif path.suffix.lower() in LATENTS:
            clip = Clip(None, _read_latents(path), fps or DEFAULT_FPS)
        elif path.suffix.lower() in VIDEOS:
            pixels, own_fps = _read_video(path)
            clip = Clip(pixels, None, fps or own_fps)
        else:
            raise UnreadableClip(f"unknown kind of file; expected {', '.join(sorted(VIDEOS | LATENTS))} or a folder")
    except OSError as error:
        raise UnreadableClip(f"cannot be read: {error.strerror or error}") from error
    frames = clip.pixels if clip.pixels is not None else clip.latents
    assert frames is not None
    if clip.pixels is not None and min(clip.pixels.shape[1:3]) < MIN_SIDE:
        height, width = clip.pixels.shape[1:3]
        raise UnreadableClip(f"has {width}x{height} pixels; expected {MIN_SIDE} or more on each side")
    if len(frames) < 2:
        raise UnreadableClip("has one frame; a video needs two")
    return clip


def _read_video(path: Path) -> tuple[np.ndarray, float]:
    if path.stat().st_size == 0:
        raise UnreadableClip("is empty")
    capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)  # a relative name with % would be a pattern
    try:
        if not capture.isOpened():
            raise UnreadableClip("is not a video, or its index is missing (truncated)")
        if path.suffix.lower() != ".gif" and _has_alpha(round(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT))):
            raise UnreadableClip("has an alpha channel; encode it without one, or give its frames as PNG")
        expected, fps = round(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
        frames = []
        while True:
            there, frame = capture.read()
            if not there:
                break
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    if not frames:
        raise UnreadableClip("holds no frame that can be decoded")
    if path.suffix.lower() == ".mp4" and len(frames) < expected:  # counted without the edit list
        try:
            expected = read_movie(path).shown
        except BadMovie as error:
            raise UnreadableClip(str(error)) from error
        if len(frames) < expected:
            raise UnreadableClip(f"is damaged or truncated: {len(frames)} of {expected} frames can be decoded")
    return np.stack(frames), fps if 0 < fps < 1000 else DEFAULT_FPS


def _read_frames(folder: Path) -> np.ndarray:
    files = _frame_files(folder)
    if not files:
        raise UnreadableClip("holds no clips and no images")
    frames: list[np.ndarray] = []
    for file in files:
        image = _decoded(np.frombuffer(file.read_bytes() or b"\0", np.uint8))
        if image is None:
            raise UnreadableClip(f"{file.name} is not an image, or is damaged")
        if frames and image.shape != frames[0].shape:
            sizes = ["x".join(map(str, shape[1::-1])) for shape in (image.shape, frames[0].shape)]
            raise UnreadableClip(f"{file.name} has {sizes[0]} pixels, {files[0].name} {sizes[1]}; expected one size")
        frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def _decoded(content: np.ndarray) -> np.ndarray | None:
    """An image [H, W, 3] uint8 BGR, on black where it is transparent; None for what is no image."""
    stored = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if stored is None or stored.shape[2:] != (4,):
        return cv2.imdecode(content, cv2.IMREAD_COLOR)
    full = 255 if stored.dtype == np.uint8 else 65535
    colour, alpha = np.split(stored / full, (3,), axis=-1)
    return (255 * colour * alpha).round().astype(np.uint8)


def _has_alpha(tag: int) -> bool:
    """Whether FFmpeg's tag of a pixel format is one with alpha: an order of R, G, B, A, or YUVA ("Y4" and depths)."""
    letters = tag.to_bytes(4, "little", signed=tag < 0)
    return sorted(letters) == sorted(b"RGBA") or (letters[:2] == b"Y4" and letters[2] < 32)


def _read_latents(path: Path) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            names, layout = list(file.keys()), (file.metadata() or {}).get("layout", "bfchw")
            if len(names) != 1 and "latents" not in names:
                raise UnreadableClip(f"holds {len(names)} tensors, none named 'latents'; expected one clip a file")
            latents = file.get_tensor("latents" if "latents" in names else names[0])
    except SafetensorError as error:
        raise UnreadableClip(f"is not a complete safetensors file: {error}") from error
    shape = tuple(latents.shape)
    latents = latents[None] if latents.ndim == 4 else latents
    if latents.ndim != 5 or len(latents) != 1 or 0 in shape or not latents.is_floating_point():
        raise UnreadableClip(f"holds {latents.dtype} {shape}; expected floating-point latents [F, C, H, W] of one clip")
    if layout not in ("bfchw", "bcfhw"):
        raise UnreadableClip(f"has the layout {layout!r}; expected 'bfchw' or 'bcfhw'")
    latents = to_bfchw(latents, layout)[0].float()
    if not torch.isfinite(latents).all():
        raise UnreadableClip("holds values that are not finite")
    return latents


def _is_clip(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return bool(_frame_files(path)) if path.is_dir() else path.suffix.lower() in VIDEOS | LATENTS


def _frame_files(folder: Path) -> list[Path]:
    images = (p for p in folder.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith("."))
    return sorted(images, key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sorts frame_2 before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
