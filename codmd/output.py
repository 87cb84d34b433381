"""The output folder: built beside its final place under a temporary name, then renamed, so never half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codmd.atomic import replacing_folder

MARKER = "results.json"


class OutputError(ValueError):
    """The output folder cannot be used; the message says why and what to do."""


def check_output(out: Path, maker: str) -> None:
    """Refuses a place that is not free: only an absent or empty folder, or an earlier one of `maker`, may be replaced.

    Args:
        out: the folder asked for with --out.
        maker: what writes it, say "demo"; used in the message.

    Raises:
        OutputError: what is in the way, and what would do.
    """
    expected = f"give a folder that is new, empty, or an earlier {maker}'s"
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; {expected}")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise OutputError(f"--out {out}: holds other files and no {MARKER}; {expected}")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"--out {out}: cannot write in {parent}; give a folder in a place you may write to")


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A new folder to write into that takes the place of `out`; what was there stays until the new one is complete."""
    with replacing_folder(out) as folder:
        yield folder
