"""The completeness of a checkpoint: `meta.json`, written last, with size and CRC-32 of every other file."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from codmd.distill.config.typed import structured
from codmd.files import read_json

META = "meta.json"
CHUNK = 1 << 24
LARGEST = 2**53


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what is still there."""


@dataclass(frozen=True)
class Meta:
    """The content of `meta.json`.

    Attributes:
        step: updates made.
        files: name to [bytes, CRC-32].
        tensors: name to [dtype, whole shape]; empty in checkpoints that have an index of their own.
        mode, processes, versions, config: of the run.
        position: of the data, in samples of all processes; None without data.
        identity: of what the run was trained against: name to [path, fingerprint].
        nonfinite: network to [updates skipped, of these the last ones in a row].
        watch: of a watched run: how far its fixed samples are from the teacher's (None where nobody looked), and
            which measures had entered and left their bands.
    """

    step: int
    files: dict[str, Any]
    mode: Literal["distill", "teacher"]
    position: int | None
    nonfinite: dict[str, Any]
    processes: int
    versions: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    watch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("step", 0), ("processes", 1), ("position", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value <= LARGEST:
                raise ValueError(f"{name}: got {value}; expected {least} to {LARGEST}")
        if not self.files:
            raise ValueError("files: got none; a checkpoint has at least one")
        for name, entry in self.files.items():
            if Path(name).name != name or not _counts(entry, 2):
                raise ValueError(f"files: got {name!r}: {entry!r}; expected a name and [bytes, CRC-32]")
        for name, entry in self.nonfinite.items():
            if not _counts(entry, 2):
                raise ValueError(f"nonfinite.{name}: got {entry!r}; expected two counts")
        for name, entry in self.identity.items():
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
                raise ValueError(f"identity.{name}: got {entry!r}; expected [path, fingerprint]")
        if self.watch and not _is_watch(self.watch):
            raise ValueError(f"watch: got {self.watch!r}; expected distance, entered and left")
        for name, entry in self.tensors.items():
            if not (isinstance(entry, list) and len(entry) == 2 and _is_dtype(entry[0]) and _counts(entry[1])):
                raise ValueError(f"tensors: got {name!r}: {entry!r}; expected [dtype, shape]")


def _counts(value: Any, length: int | None = None) -> bool:
    if not isinstance(value, list) or len(value) != (len(value) if length is None else length):
        return False
    return all(type(item) is int and 0 <= item <= LARGEST for item in value)


def _is_watch(entry: dict[str, Any]) -> bool:
    distance, entered, left = (entry.get(name, ...) for name in ("distance", "entered", "left"))
    number = distance is None or (isinstance(distance, (int, float)) and 0 <= distance < math.inf)
    names = isinstance(entered, list) and all(isinstance(name, str) for name in entered)
    return number and names and isinstance(left, dict) and _counts(list(left.values()))


def _is_dtype(name: Any) -> bool:
    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def problems(path: Path, share: slice = slice(None)) -> list[str]:
    """The problems of a checkpoint; empty if it is complete.

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
    return found + [f"{name}: is not listed in {META}" for name in _unlisted(path, files)]


def _unlisted(path: Path, files: Mapping[str, Any]) -> list[str]:
    """Shards and indices beside the listed ones, which would be read with them."""
    held = (*path.glob("*.safetensors"), *path.glob(".metadata"))
    return sorted(file.name for file in held if file.name not in files)


def read_meta(path: Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint: the fields of `Meta`.

    Raises:
        CheckpointError: it is missing, damaged, inconsistent, or of another checkpoint.
    """
    try:
        meta = read_json(path / META)
        step = structured(Meta, meta).step
        named = re.fullmatch(r"step_(\d+)", path.name)
        if named and int(named[1]) != step:
            raise ValueError(f"step: got {step}; expected {int(named[1])}, as its folder is called")
    except OSError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {META}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {META} is damaged: {error}") from error
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
