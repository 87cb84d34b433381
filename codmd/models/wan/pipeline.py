"""The whole student as a diffusers pipeline: its transformer beside the VAE, text encoder and tokenizer of its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from codmd import hub
from codmd.files import read_json

PARTS = ("text_encoder", "tokenizer", "vae")
"""Taken from the base as they are."""
SAFE = (".json", ".safetensors", ".model", ".txt")
"""Endings of the files that are copied: none of them carries code."""


def open_base(base: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the index of a pipeline with everything but the transformer.

    Raises:
        FileNotFoundError, ValueError: it lacks a part, or is no pipeline.
    """
    folder = hub.local(base, *PARTS)
    if not (folder / hub.INDEX).is_file():
        raise ValueError(f"--base: {base}: holds no {hub.INDEX}; expected a diffusers pipeline of Wan")
    index = read_json(folder / hub.INDEX)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != "WanPipeline":
        raise ValueError(f"--base: {base} is a {kind}; expected a WanPipeline")
    for name in PARTS:
        needed = "*.json" if name == "tokenizer" else "*.safetensors"
        if not any((folder / name).glob(needed)):
            raise FileNotFoundError(f"--base: {base}: {name} has no {needed}")
    return folder, index


def write_parts(
    folder: Path,
    base: tuple[Path, dict[str, Any]],
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

    source, index = base
    for name in PARTS:
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
