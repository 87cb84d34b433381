"""Captioned videos to a VAE's latents, in the files of `codmd sample --latents`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from codmd.atomic import replacing
from codmd.distill.data.latents import LATENTS, SAMPLE
from codmd.files import is_text, samples_in
from codmd.inspect.clips import VIDEOS, Clip, UnreadableClip, read_clip
from codmd.models.base import VideoEncoder
from codmd.models.safetensors_stream import DTYPES
from codmd.models.tensor_files import save_tensors
from codmd.sample.names import recorded_prompts, without_seed

from .folder import check_room, finish, partial_of

SHOWN = 5
"""Bad videos that an error names."""


@dataclass(frozen=True)
class Captioned:
    """A video file, and what it shows in words."""

    path: Path
    prompt: str


def captioned_videos(folder: Path) -> list[Captioned]:
    """The videos of a folder, or of one that `codmd sample` wrote, each with its caption.

    Raises:
        ValueError: there are none, one has no caption, or two have one name; names the file.
        OSError: a caption cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one of videos")
    recorded, folder = recorded_prompts(folder), samples_in(folder)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS and path.name[0] != ".")
    if not paths:
        raise ValueError(f"{folder}: has no videos; expected {', '.join(sorted(VIDEOS))}")
    found: dict[str, Captioned] = {}
    for path in paths:
        if path.stem in found:
            raise ValueError(f"{path}: has the name of {found[path.stem].path.name}, and their latents would have one")
        found[path.stem] = Captioned(path, _caption(path, recorded))
    return list(found.values())


def _caption(path: Path, recorded: dict[str, str]) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            caption = " ".join(beside.read_text("utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{beside}: is not UTF-8; save the file in that encoding") from error
        if not caption or not is_text(caption):
            raise ValueError(f"{beside}: holds no caption; expected the video's in words")
        return caption
    if (name := without_seed(path.stem)) in recorded:
        return recorded[name]
    raise ValueError(f"{path}: has no caption; expected it in {beside.name} beside it")


def encode_videos(
    encoder: VideoEncoder, videos: Sequence[Captioned], out: Path, frames: int, height: int, width: int
) -> None:
    """Fills a folder beside `out`, a file a video, then renames it to `out`.

    Args:
        frames, height, width: of every video.

    Raises:
        ValueError: the encoder takes no videos of that size; or some videos cannot be used, and are named once the
            others are done.
        OSError: the folder cannot be written, or there is not enough room. Complete files stay for the next run.
    """
    shape = encoder.latent_shape(frames, height, width)
    partial = partial_of(out)
    (partial / LATENTS).mkdir(parents=True, exist_ok=True)
    made = {video.path: partial / LATENTS / f"{video.path.stem}.safetensors" for video in videos}
    for stale in set((partial / LATENTS).iterdir()) - set(made.values()):
        stale.unlink()
    samples = {video.path: _sample(video, encoder, (frames, height, width)) for video in videos}
    missing = [v for v in videos if not _complete(made[v.path], shape, encoder.dtype, samples[v.path])]
    check_room(partial, len(missing) * torch.Size(shape).numel() * encoder.dtype.itemsize)
    problems = []
    with tqdm(total=len(videos), initial=len(videos) - len(missing), unit="video", desc="encoding") as bar:
        for video in missing:
            try:
                pixels = fitted(read_clip(video.path), encoder.frames_per_second, frames, height, width)
            except UnreadableClip as error:
                problems.append(f"{video.path.name} {error}")
                continue
            latents = encoder(pixels)[0]
            if not latents.isfinite().all():
                raise ValueError(f"{video.path}: its latents are not finite; the VAE is of no use in {encoder.dtype}")
            save_tensors(made[video.path], {LATENTS: latents}, {SAMPLE: json.dumps(samples[video.path])})
            bar.update()
    if problems:
        more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{len(problems)} of {len(videos)} videos cannot be used: {'; '.join(problems[:SHOWN])}{more}. The others "
            "are encoded; take these away, and the same command ends with those"
        )
    with replacing(partial / "prompts.json") as path:
        prompts = list(dict.fromkeys(video.prompt for video in videos))
        path.write_text(json.dumps(prompts, indent=0, ensure_ascii=False) + "\n", "utf-8")
    finish(partial, out)


def fitted(clip: Clip, frames_per_second: float, frames: int, height: int, width: int) -> Tensor:
    """The beginning of a clip as pixels [1, frames, 3, height, width] in [0, 1].

    Frames are the nearest ones at that rate; pictures are scaled until they cover the size, and cut in the middle.

    Raises:
        UnreadableClip: it is too short.
    """
    assert clip.pixels is not None, "a video's"
    places = (torch.arange(frames, dtype=torch.float64) * clip.fps / frames_per_second).round().long()
    if places[-1] >= len(clip.pixels):
        lasts = int((len(clip.pixels) - 1) * frames_per_second / clip.fps) + 1
        raise UnreadableClip(f"has {lasts} frames at {frames_per_second:g} a second; expected {frames}")
    pixels = torch.from_numpy(clip.pixels[places.numpy()]).permute(0, 3, 1, 2).float() / 255
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    covering = [
        max(wanted, round(scale * side)) for wanted, side in zip((height, width), pixels.shape[2:], strict=True)
    ]
    if covering != list(pixels.shape[2:]):
        pixels = F.interpolate(pixels, covering, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return pixels[None, ..., top : top + height, left : left + width]


def _sample(video: Captioned, encoder: VideoEncoder, size: tuple[int, int, int]) -> dict[str, Any]:
    """What a file of latents depends on."""
    return {
        "prompt": video.prompt,
        "video": video.path.name,
        "bytes": video.path.stat().st_size,
        "size": list(size),
        "vae": encoder.fingerprint,
    }


def _complete(path: Path, shape: tuple[int, ...], dtype: torch.dtype, sample: dict[str, Any]) -> bool:
    """Whether a file has the latents of that sample; a damaged one is not complete."""
    try:
        with safe_open(path, framework="pt") as file:
            entry = file.get_slice(LATENTS)
            same = tuple(entry.get_shape()) == shape and entry.get_dtype() == DTYPES[dtype]
            return same and json.loads((file.metadata() or {}).get(SAMPLE, "null")) == sample
    except (SafetensorError, OSError, ValueError, RecursionError):
        return False
