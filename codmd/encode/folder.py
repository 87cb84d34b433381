"""A folder that appears when it is complete; what an interrupted run left is the next one's beginning."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def check_new(out: Path) -> None:
    """Refuses a place where something is.

    Raises:
        ValueError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already; give a new folder")


def partial_of(out: Path) -> Path:
    """The folder beside `out` that is filled first.

    Raises:
        OSError: a link stands in its place.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    if partial.is_symlink():
        raise OSError(f"{partial}: is a link; remove it")
    return partial


def finish(partial: Path, out: Path) -> None:
    """The complete folder, under its name."""
    if out.is_dir():
        out.rmdir()
    os.replace(partial, out)


def check_room(folder: Path, size: int) -> None:
    """Refuses a disk with less than `size` bytes free.

    Raises:
        OSError: it has less.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder.parent}: needs {size / 1e9:.1f} GB more and has {free / 1e9:.1f} GB free")
