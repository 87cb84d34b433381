"""SIGTERM as a request to end a run, instead of the end of its process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.set = False

    def is_set(self) -> bool:
        return self.set


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Inside the block SIGTERM asks for an end instead of ending the process."""
    stop = Stop()

    def request(_signal: int, _frame: Any) -> None:
        stop.set = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
