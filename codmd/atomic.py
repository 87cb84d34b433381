"""Files and folders that are complete or absent: written beside their place under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; renamed over it on success, removed on any exception.

    The temporary name keeps the suffix, which encoders choose their format by.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    path = Path(path)
    remove_abandoned(path)
    partial = partial_sibling(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def creating_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; renamed to `path` on success, removed on any exception.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        OSError: its parent cannot be created or written.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: exists already; give a new or empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    partial = partial_sibling(path)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_sibling(path: Path) -> Path:
    """Where this process builds what will be `path`; the name keeps the suffix."""
    # A name may be as long as the file system allows already.
    return path.with_name(f".{path.name[:40]}.partial-{os.getpid()}{path.suffix}")


def remove_abandoned(path: Path) -> None:
    """Removes what a killed process (it is gone) left beside `path`."""
    prefix = f".{path.name[:40]}.partial-"
    for leftover in path.parent.iterdir() if path.parent.is_dir() else ():
        pid = leftover.name.removeprefix(prefix).removesuffix(path.suffix)
        if leftover.name.startswith(prefix) and pid.isdigit() and not _alive(int(pid)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
