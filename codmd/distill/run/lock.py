"""The lock of a run's folder against another run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codmd.distill.config.typed import ConfigError

from .parallel import Processes

try:
    import fcntl
except ModuleNotFoundError:  # on Windows a folder is not held
    fcntl = None  # type: ignore[assignment]


@contextmanager
def only_run(folder: Path, team: Processes) -> Iterator[None]:
    """Holds the run's folder, so that no other run writes there; the system lets go of it when the process ends.

    Raises:
        ConfigError: another run holds it.
    """
    held, failure = None, ""
    if team.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
            if fcntl is not None:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            failure = f"out: another run is training in {folder}"
        except OSError as error:
            failure = f"out: {folder} cannot be used: {error.strerror}"
    try:
        if failure := team.share(failure):
            raise ConfigError(failure)
        yield
    finally:
        if held is not None:
            os.close(held)
