"""A contact sheet: the seeds of one prompt as rows, frames over time as columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from codmd.atomic import replacing

from .video import read_video

COLUMNS = 8
WIDTH = 160
LABEL = 34
TITLE = 18


def write_sheet(path: Path, title: str, videos: Sequence[tuple[int, Path]]) -> None:
    """Writes a PNG with one row per (seed, video file) and `COLUMNS` frames evenly spread over its length.

    Raises:
        OSError: a video cannot be read, or the picture not be written.
    """
    rows = [(seed, _thumbnails(read_video(file))) for seed, file in videos]
    height = max(row[0].height for _, row in rows)
    columns = max(len(row) for _, row in rows)
    sheet = Image.new("RGB", (LABEL + columns * WIDTH, TITLE + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), title.encode("latin-1", "replace").decode("latin-1"), fill="black")
    for number, (seed, row) in enumerate(rows):
        top = TITLE + number * height
        draw.text((4, top + height // 2 - 5), str(seed), fill="black")
        for column, frame in enumerate(row):
            sheet.paste(frame, (LABEL + column * WIDTH, top))
    with replacing(path) as partial:
        sheet.save(partial)


def _thumbnails(frames: np.ndarray) -> list[Image.Image]:
    chosen = np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)
    height = max(1, round(WIDTH * frames.shape[1] / frames.shape[2]))
    return [Image.fromarray(frames[i]).resize((WIDTH, height), Image.Resampling.LANCZOS) for i in chosen]
