"""SIGTERM and Ctrl-C as requests to end a run after its update, instead of the end of its process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """The first signal, 0 for none."""

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Inside the block the first SIGTERM or Ctrl-C is noted; a second Ctrl-C is a KeyboardInterrupt at once."""
    stop, seen = Stop(), set[int]()

    def request(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and number in seen:
            raise KeyboardInterrupt
        seen.add(number)
        stop.signal = stop.signal or number

    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
