"""The log of a run: JSON lines, a tracker, and a bar with loss, rate and time left."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from codmd.atomic import replacing

from .parallel import Processes
from .speed import Speed
from .trackers import Tracker, grouped

JSON_LINES = "log.jsonl"
SHOWN = 5


class RunLog:
    """The log of one run; only the first process writes.

    A run that continues from an earlier update drops what was logged after it, so that the log is one curve.

    Args:
        folder: of the run.
        processes: whose scalars are averaged.
        start: updates made before this process began.
        total: updates of the whole run.
        tracker: makes what else is told; called on the first process.
        speed: tells how fast the run is.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        start: int,
        total: int,
        tracker: Callable[[], Tracker | None] = lambda: None,
        speed: Speed | None = None,
    ) -> None:
        self.processes, self.speed, self._file = processes, speed, None
        self.tracker: Tracker | None = None
        self._clock, self._counted = time.perf_counter(), start
        if not processes.first:
            self.bar = tqdm(disable=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSON_LINES
        _drop_after(path, start, lambda message: say(message, processes))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self.tracker = tracker()
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=total, initial=start, unit="update", mininterval=interval, dynamic_ncols=True)

    def scalars(self, update: int, values: Mapping[str, Tensor | float]) -> None:
        """One line: the averages of `values` over all processes, and the rates; called by every process alike."""
        numbers = torch.stack([torch.as_tensor(value, dtype=torch.float64).cpu() for value in values.values()])
        averaged = dict(zip(values, self.processes.mean(numbers).tolist(), strict=True))
        now = time.perf_counter()
        updates = max(1, update - self._counted)
        seconds = (now - self._clock) / updates
        self._clock, self._counted = now, update
        rates = {"seconds_per_update": seconds} if self.speed is None else self.speed.scalars(seconds, updates)
        if self._file is None:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in rates.items()}
        line = {"update": update, **{name: _json(value) for name, value in averaged.items()}, **rounded}
        print(json.dumps(line), file=self._file, flush=True)
        if self.tracker is not None:
            self.tracker.scalars({grouped(name): value for name, value in {**averaged, **rates}.items()}, update)
        self.bar.set_postfix(loss=f"{averaged['loss']:.4g}", refresh=False)

    def event(self, update: int, **values: Any) -> None:
        """One line about something that happened: a skipped update, a checkpoint."""
        if self._file is not None:
            print(json.dumps({"update": update, **values}), file=self._file, flush=True)

    def watched(self, update: int, ratios: Mapping[str, float], left: Sequence[str]) -> None:
        """One line of the fixed samples' ratios to the teacher's; a measure that left its band is marked."""
        entry: dict[str, Any] = {"watch": {name: _json(value) for name, value in ratios.items()}}
        self.event(update, **entry, **({"left_band": list(left)} if left else {}))
        if self.tracker is not None:
            marks = {f"fixed_samples/{name}_left_band": 1.0 for name in left}
            self.tracker.scalars(
                {**{f"fixed_samples/{name}": value for name, value in ratios.items()}, **marks}, update
            )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self._file is not None:
            self._file.close()
        if self.tracker is not None:
            self.tracker.close()


def say(message: str, processes: Processes) -> None:
    """A line for the reader of the terminal, from the first process, above a bar if there is one."""
    if processes.first:
        tqdm.write(message, file=sys.stderr)


def read_log(path: Path, warn: Callable[[str], None] = lambda message: None) -> list[dict[str, Any]]:
    """The entries of a log, whatever stands between them.

    Args:
        warn: called with the numbers of the lines that are no entries; but for the last line, if a killed process
            left it incomplete.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    if rest and not rest.startswith(b"{"):
        lines, rest = [*lines, rest], b""
    entries = [_entry(line) for line in lines]
    if bad := [str(number) for number, entry in enumerate(entries, 1) if entry is None]:
        shown = ", ".join(bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
        warn(f"{path}: {len(bad)} lines are no entries of a log and are left out: {shown}")
    return [entry for entry in (*entries, _entry(rest)) if entry is not None]


def _entry(line: bytes) -> dict[str, Any] | None:
    """An object with the number of an update, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    update = value.get("update") if isinstance(value, dict) else None
    return value if type(update) is int and update >= 0 else None


def _drop_after(path: Path, update: int, warn: Callable[[str], None]) -> None:
    if path.exists():
        kept = [entry for entry in read_log(path, warn) if entry["update"] <= update]
        with replacing(path) as partial:
            partial.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept), "utf-8")


def _json(value: float) -> float | str:
    """JSON has no words for what is not finite."""
    return value if math.isfinite(value) else str(value)
