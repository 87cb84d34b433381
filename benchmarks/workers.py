"""Child processes that report task by task, so that a crash loses one result.

A child says by lines of JSON which task it begins and what it found. It is a process group of its own, killed after
``CHILD_S``; before that it stops by itself between two tasks, and another goes on. So a task that hangs, crashes or
leaves the device useless costs its own result and no other.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILD_S = 120.0
PATIENCE_S = 40.0
"""Before its end a child begins no task any more."""

UNFINISHED = 75
"""Status of a child that has tasks left (EX_TEMPFAIL)."""

Task = str | list[str]
"""What a result belongs to: a name, or a row and its part."""


class Report:
    """The child's side: messages into the pipe that its parent gave it."""

    def __init__(self, descriptor: int) -> None:
        self._stream = os.fdopen(descriptor, "w", buffering=1)

    def __call__(self, **message: Any) -> None:
        self._stream.write(json.dumps(message) + "\n")


def work(
    tasks: Iterable[tuple[Task, Callable[[], dict[str, Any] | None]]],
    report: Callable[..., None],
    usable: Callable[[], object] = lambda: None,
) -> int:
    """Runs ``tasks`` until the time is over or ``usable`` raises; the child's status."""
    end = time.monotonic() + CHILD_S - PATIENCE_S
    for task, call in tasks:
        if time.monotonic() > end:
            return UNFINISHED
        report(begin=task)
        report(task=task, found=call())
        try:
            usable()
        except Exception:
            traceback.print_exc()
            return UNFINISHED
    return 0


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    pipe: int
    log: Path
    end: float
    pending: bytes = b""
    begun: Task | None = None
    reported: bool = False
    killed: bool = False

    def messages(self) -> Iterator[dict[str, Any]]:
        """What has come through the pipe."""
        while True:
            try:
                more = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                return
            if not more:
                return
            *lines, self.pending = (self.pending + more).split(b"\n")
            yield from map(json.loads, lines)

    def kill(self) -> None:
        """Ends the child and what it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # all of the group have ended

    def reason(self) -> str:
        """Why it ended before its task did."""
        if self.killed:
            return f"not finished after {CHILD_S:.0f} s"
        words = self.log.read_text(errors="replace").split()
        return f"the process ended with {self.process.returncode}: {' '.join(words)[-300:]}"


@contextmanager
def _started(commands: Mapping[str, Sequence[str]], logs: Path, deadline: float) -> Iterator[dict[str, _Child]]:
    """Children by name, none of which outlives the block."""
    children: dict[str, _Child] = {}
    try:
        for name, command in commands.items():
            pipe, theirs = os.pipe()
            os.set_blocking(pipe, False)
            log = logs / f"{name}.txt"
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [*command, "--report", str(theirs)],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[theirs], start_new_session=True,
                )  # fmt: skip
            os.close(theirs)
            end = deadline if deadline == math.inf else min(deadline, time.monotonic() + CHILD_S)
            children[name] = _Child(process, pipe, log, end)
        yield children
    finally:
        for child in children.values():
            child.kill()
            child.process.wait()
            os.close(child.pipe)


def once(
    commands: Mapping[str, Sequence[str]], logs: Path, deadline: float, take: Callable[[Task, Any], None]
) -> dict[str, _Child]:
    """Runs the commands at once and hands every result to ``take`` when it comes; the children as they ended."""

    def handle(child: _Child) -> None:
        for message in child.messages():
            if "begin" in message:
                child.begun = message["begin"]
            else:
                child.begun, child.reported = None, True
                take(message["task"], message["found"])

    with _started(commands, logs, deadline) as children, selectors.DefaultSelector() as ready:
        for child in children.values():
            ready.register(child.pipe, selectors.EVENT_READ, child)
        while ready.get_map():
            for key, _ in ready.select(timeout=0.02):
                handle(key.data)
            for child in [key.data for key in ready.get_map().values()]:
                if time.monotonic() > child.end and child.process.poll() is None:
                    child.killed = True
                    child.kill()
                    child.process.wait()
                if child.process.poll() is not None:
                    handle(child)
                    ready.unregister(child.pipe)
        return children


def stage(
    commands: Mapping[str, Sequence[str]],
    logs: Path,
    deadline: float,
    take: Callable[[Task, Any], None],
    failed: Callable[[Task, str], None],
) -> dict[str, int]:
    """Runs the commands, again where tasks are left, until ``deadline`` (``time.monotonic``); their last statuses.

    Args:
        commands: by name; each child skips what was taken before it began.
        logs: where a child's own output goes, ``NAME.txt``.
        take: keeps a task's result.
        failed: keeps why a task has none.
    """
    statuses: dict[str, int] = {}
    while commands and time.monotonic() < deadline:
        again = {}
        for name, child in once(commands, logs, deadline, take).items():
            status = statuses[name] = child.process.returncode
            out_of_time = child.killed and time.monotonic() >= deadline
            if status not in (0, UNFINISHED) and not out_of_time:
                failed(child.begun or name, child.reason())
            if status and (child.reported or child.begun):
                again[name] = commands[name]
        commands = again
    return statuses


def python(module: str, *arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, "-m", module, *arguments]
