"""Files of the commands: JSON of unknown origin, writes that are whole or not at all, short names."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codmd.atomic import replacing
from codmd.cli import CommandError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that `path` holds all of `content` or what it held before.

    Args:
        path: the file; missing parent folders are made.
        content: text (written as UTF-8) or bytes.

    Raises:
        CommandError: the place cannot be written to, or the disk is full; names the file and the reason.
    """
    if path.is_dir():
        raise CommandError(f"{path}: is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file of unknown origin.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty, not JSON in UTF-8, or nested too deeply to be meant; names the file.
    """
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path}: is empty; expected JSON")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def is_text(value: Any) -> bool:
    """Whether a value of JSON is a string that can be written and shown: no lone surrogate, no NUL."""
    return isinstance(value, str) and "\0" not in value and value == value.encode("utf-8", "ignore").decode()


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of every path, as few as tell all of them apart.

    Raises:
        CommandError: a path is given twice.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise CommandError(f"the same path is given twice: {', '.join(map(str, paths))}")


def is_training(path: Path) -> bool:
    """Whether `path` is a run or a checkpoint of `codmd train`."""
    return (path / "meta.json").is_file() or (path / "checkpoints").is_dir()


def samples_in(folder: Path) -> Path:
    """The folder of the samples themselves in a folder that `codmd sample` wrote; any other path as it is."""
    if (folder / "sampling.json").is_file():
        for kind in ("videos", "latents"):
            if (folder / kind).is_dir():
                return folder / kind
    return folder
