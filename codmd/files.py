"""Files as the commands meet them: written whole or not at all, and named by as few parts as tell them apart."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from codmd.cli import CommandError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes to a temporary sibling and renames it, so that `path` holds all of `content` or what it held before.

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
        handle, partial = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from error


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
