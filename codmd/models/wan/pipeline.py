"""The whole student as a diffusers pipeline: its transformer beside the VAE and the encoders of its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from codmd import hub
from codmd.files import read_json

from .image import IMAGE_PARTS

PARTS = ("text_encoder", "tokenizer", "vae")
"""Taken from the base as they are, with `IMAGE_PARTS` where it has them."""
FROM_TEXT, FROM_IMAGE = "WanPipeline", "WanImageToVideoPipeline"
SAFE = (".json", ".safetensors", ".model", ".txt")
"""Endings of the files that are copied: none of them carries code."""


class Base(NamedTuple):
    """A pipeline with everything but the transformer: its folder, the content of its index, its parts."""

    folder: Path
    content: dict[str, Any]
    parts: list[str]


def open_base(base: str, from_image: bool = False) -> Base:
    """The folder, the index and the parts of a pipeline.

    Args:
        from_image: of a student that starts from an image; Wan2.2-TI2V-5B's own is a `WanPipeline` nevertheless.

    Raises:
        FileNotFoundError, ValueError: it lacks a part, or is no such pipeline.
    """
    folder = hub.local(base, *PARTS, *(IMAGE_PARTS if from_image else ()))
    if not (folder / hub.INDEX).is_file():
        raise ValueError(f"--base: {base}: holds no {hub.INDEX}; expected a diffusers pipeline of Wan")
    index = read_json(folder / hub.INDEX)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    kinds = (FROM_TEXT, FROM_IMAGE) if from_image else (FROM_TEXT,)
    if kind not in kinds:
        raise ValueError(f"--base: {base} is a {kind}; expected a {' or a '.join(kinds)}")
    parts = [*PARTS, *(name for name in IMAGE_PARTS if None not in (index.get(name) or [None]))]
    for name in parts:
        needed = "*.json" if name in ("tokenizer", "image_processor") else "*.safetensors"
        if not any((folder / name).glob(needed)):
            raise FileNotFoundError(f"--base: {base}: {name} has no {needed}")
    return Base(folder, index, parts)


def write_parts(
    folder: Path,
    base: Base,
    sigmas: Sequence[float],
    transition: Literal["renoise", "euler"],
    progress: Callable[[int], Any],
) -> tuple[dict[str, Any], float]:
    """Writes all but the transformer into `folder`: the base's parts, both schedulers, the index.

    Args:
        base: of `open_base`.
        sigmas, transition: the student's step list, and how it goes from one level to the next.
        progress: called with the bytes of every file copied.

    Returns:
        The index, and the largest error in sigma of the stock scheduler.
    """
    from codmd.scheduler import FOLDER, FewStepScheduler, nearest_stock

    source, index, parts = base
    for name in parts:
        (folder / name).mkdir()
        for path in sorted((source / name).iterdir()):
            if path.suffix in SAFE:
                shutil.copyfile(path, folder / name / path.name)
                progress(path.stat().st_size)
    stock, error = nearest_stock(sigmas, transition)
    stock.save_pretrained(folder / "scheduler")
    FewStepScheduler(tuple(sigmas), transition=transition).save_pretrained(folder / FOLDER)
    content = {
        **index,
        "scheduler": ["diffusers", type(stock).__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
    (folder / hub.INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return content, error
