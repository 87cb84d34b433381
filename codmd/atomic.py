"""Files and folders that are complete or absent: made in a private folder beside their place, then renamed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOST = f"{zlib.crc32(platform.node().encode()):08x}"
"""Tells machines on a shared file system apart: only on its own can a process be known to be gone."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place for a file or a folder that takes the place of `path` on success and is removed on any exception.

    The place has the name of `path`, in a folder that is new and this user's alone: no link that somebody planted is
    followed. What was at `path` stays until the new is complete; a link there is replaced, not followed.

    Raises:
        OSError: the folder around `path` is missing or cannot be written.
    """
    path = Path(path)
    remove_abandoned(path)
    # A name may be as long as the file system allows already.
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.partial-{os.getpid()}-{HOST}-", dir=path.parent))
    try:
        yield aside / path.name
        _put(aside / path.name, path, aside / "before" / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to fill that takes the place of `path`, as `replacing` does; missing parents are made."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def creating_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to fill that becomes `path`, which must be free.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        OSError: its parent cannot be created or written.
    """
    path = Path(path)
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: exists already; give a new or empty folder")
    with replacing_folder(path) as partial:
        yield partial


def _put(new: Path, path: Path, before: Path) -> None:
    """Renames `new` to `path`; a folder, which cannot be renamed over, steps aside to `before` first."""
    if not path.is_dir():
        os.replace(new, path)
        return
    before.parent.mkdir()
    os.replace(path, before)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(before, path)
        raise


def remove_abandoned(path: Path) -> None:
    """Removes what a killed process of this machine (it is gone) left beside `path`."""
    pattern = re.compile(re.escape(f".{path.name[:40]}.partial-") + r"(\d+)(?:-([0-9a-f]{8}))?(?!\d)")
    for leftover in path.parent.iterdir() if path.parent.is_dir() else ():
        found = pattern.match(leftover.name)
        if found and found[2] in (None, HOST) and not _alive(int(found[1])):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
