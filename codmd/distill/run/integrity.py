"""What makes a checkpoint complete: its mark `meta.json`, written last, with size and CRC-32 of every other file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

META = "meta.json"
CHUNK = 1 << 24


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what is still there."""


def problems(path: Path, share: slice = slice(None)) -> list[str]:
    """What is wrong with a checkpoint, nothing if it is whole.

    Args:
        share: which of its files to read, by their place in the order of names.
    """
    try:
        files = read_meta(path)["files"]
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, (size, total) in sorted(files.items())[share]:
        try:
            now = size_and_sum(path / name)
        except OSError as error:
            found.append(f"{name}: {error.strerror}")
            continue
        if now != [size, total]:
            found.append(f"{name}: {f'{now[0]} bytes, not {size}' if now[0] != size else 'its content has changed'}")
    return found


def read_meta(path: Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing, truncated, or not what `save` writes.
    """
    try:
        meta = json.loads((path / META).read_text("utf-8"))
        if not isinstance(meta["files"], dict) or not isinstance(meta["step"], int):
            raise TypeError("files, step")
    except OSError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {META}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {META} is damaged") from error
    return meta


def sums(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and CRC-32 of files, by name, as `meta.json` lists them."""
    return {file.name: size_and_sum(file) for file in files}


def size_and_sum(file: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size = total = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            size, total = size + len(chunk), zlib.crc32(chunk, total)
    return [size, total]
