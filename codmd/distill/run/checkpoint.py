"""Checkpoints that are complete or absent: written under a temporary name, with check sums; damaged ones are skipped.

A run's folder `checkpoints` holds `step_00000100` and so on: safetensors, one file a process, and `meta.json`,
written last, with the size and CRC-32 of each of them and the dtype and whole shape of every tensor. Tensors are named
`student.*`, `critic.*`, `ema.*`, `student_optimizer.*`, `critic_optimizer.*` (a teacher's run has `student.*` for the
teacher) and `random.*`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from .integrity import META, CheckpointError, problems, read_meta, sums
from .parallel import Processes
from .shards import READING, Stored, described, own_shards, read_shards, stored, write_shards

PREFIX = "step_"
PARTIAL = ".partial"
ASIDE = "aside_"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `checkpoints` of the run; on a file system that all processes share.
        processes: that save and load together; every method is called by all of them.
        keep_last: how many stay; older ones are removed once a newer one is complete. While updates are not finite,
            the newest one from before stays too; of a watched run, so does the best.
        warn: called on the first process with what was found damaged.
    """

    def __init__(self, folder: Path, processes: Processes, keep_last: int, warn: Callable[[str], None]) -> None:
        self.folder, self.processes, self.keep_last, self.warn = folder, processes, keep_last, warn

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
        """Writes one checkpoint: all of it under its name, or nothing.

        Args:
            step: names the checkpoint.
            tensors: of this process; sharded ones are written by all, equal ones once.
            record: what `meta.json` keeps beside the sums; JSON.

        Raises:
            CheckpointError: on every process; earlier checkpoints are untouched.
        """
        path = self.folder / f"{PREFIX}{step:08d}"
        partial = path.with_name(f".{path.name}{PARTIAL}")
        self._each("prepare", lambda: self._prepare(partial) if self.processes.first else None)
        self._each("write", lambda: write_shards(partial, tensors, self.processes))
        own = self._each("check", lambda: (sums(own_shards(partial, self.processes)), described(tensors)))
        index: dict[str, Any] = {"files": {}, "tensors": {}}
        for files, entries in own:
            index["files"].update(files)
            index["tensors"].update(entries)
        record = {"step": step, **record, **index}
        self._each("finish", lambda: self._finish(partial, path, record) if self.processes.first else None)
        return path

    def newest(self) -> Path | None:
        """The newest checkpoint that is complete and undamaged, the same on every process; None when there is none."""
        for path in self.processes.share(self.paths()):
            found = self._problems(path)
            if not found:
                return path
            if self.processes.first:
                self.warn(f"checkpoint {path} is damaged and will be skipped: {found[0]}")
        return None

    def paths(self) -> list[Path]:
        """Checkpoints by name, the newest first, damaged ones included."""
        found = self.folder.glob(f"{PREFIX}*") if self.folder.is_dir() else ()
        return sorted((path for path in found if path.name[len(PREFIX) :].isdigit()), reverse=True)

    def sound(self) -> Path | None:
        """The newest checkpoint that was saved while all updates were finite."""
        return next(filter(is_sound, self.paths()), None)

    def best(self) -> Path | None:
        """The checkpoint whose fixed samples were nearest to the teacher's, the newest of equals; None unwatched."""
        rated = [(distance, path) for path in self.paths() if (distance := watched_distance(path)) is not None]
        return min(rated, key=lambda entry: entry[0])[1] if rated else None

    def roll_back(self, path: Path) -> None:
        """Makes `path` the newest: later checkpoints get names that nobody continues from."""
        if self.processes.first:
            for later in self.paths():
                if later > path:
                    os.rename(later, later.with_name(f"{ASIDE}{later.name}"))
        self.processes.share(None)

    def verify(self, path: Path) -> None:
        """Raises `CheckpointError` on every process unless `path` is a complete and undamaged checkpoint."""
        if found := self._problems(path):
            raise CheckpointError(f"checkpoint {path} cannot be used: {found[0]}")

    def _problems(self, path: Path) -> list[str]:
        """The problems of a checkpoint, alike on all processes, each of which reads its share of the files."""
        share = slice(self.processes.rank, None, self.processes.size)
        return [problem for part in self.processes.gather(problems(path, share)) for problem in part]

    def _prepare(self, partial: Path) -> None:
        """Clears what killed runs left; only the first process of a run that owns the folder comes here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for abandoned in self.folder.glob(f".*{PARTIAL}"):
            shutil.rmtree(abandoned)
        partial.mkdir()

    def _finish(self, partial: Path, path: Path, record: Mapping[str, Any]) -> None:
        with open(partial / META, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        for damaged in self.paths():
            if damaged >= path:  # or this run would have begun after it
                shutil.rmtree(damaged)
        os.rename(partial, path)
        _flush_folder(self.folder)
        sound = None if any(map(is_sound, self.paths()[: self.keep_last])) else self.sound()
        best = self.best()
        for old in self.paths()[self.keep_last :]:
            if old in (sound, best):
                continue
            gone = old.with_name(f".{old.name}{PARTIAL}")
            os.rename(old, gone)
            shutil.rmtree(gone)

    def _each(self, what: str, action: Callable[[], Any]) -> list[Any]:
        """Every process's result of `action`; raises on all when it failed on one."""
        result, failure = None, ""
        try:
            result = action()
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            failure = _root(error)
        outcomes = self.processes.gather((result, failure))
        failures = [failure for _, failure in outcomes if failure]
        if failures:
            if self.processes.first:
                for partial in self.folder.glob(f".*{PARTIAL}"):
                    shutil.rmtree(partial, ignore_errors=True)
            last = self.paths()
            raise CheckpointError(
                f"could not {what} a checkpoint in {self.folder}: {failures[0]}; "
                + (f"the newest one there, {last[0].name}, is untouched" if last else "there is no earlier one")
            )
        return [result for result, _ in outcomes]


def is_sound(path: Path) -> bool:
    """Whether a checkpoint was saved while all updates were finite; not so if it cannot be told."""
    try:
        return not any(in_a_row for _, in_a_row in read_meta(path)["nonfinite"].values())
    except CheckpointError:
        return False


def watched_distance(path: Path) -> float | None:
    """The distance of a checkpoint's fixed samples from the teacher's; None where not measured or not finite."""
    try:
        return read_meta(path).get("watch", {}).get("distance")
    except CheckpointError:
        return None


def load(path: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Fills `tensors` in place; sharding and number of processes may differ from those that saved.

    Raises:
        CheckpointError: the checkpoint has not all of them, or with other shapes.
    """
    present = tensors_of(path)
    for name, tensor in tensors.items():
        if name not in present and name.startswith("ema."):
            raise CheckpointError(
                f"checkpoint {path} has no running average, for it was saved without ema_decay; set ema_decay to null "
                "to continue it, or give another out to start anew"
            )
        if name not in present:
            raise CheckpointError(f"checkpoint {path} has no tensor {name}: it is of another model or recipe")
        if present[name].shape != tensor.shape:
            raise CheckpointError(
                f"checkpoint {path}: {name} has shape {tuple(present[name].shape)}; the model here has "
                f"{tuple(tensor.shape)}"
            )
    try:
        read_shards(path, tensors, processes)
    except (*READING, dcp.CheckpointException) as error:
        raise CheckpointError(f"checkpoint {path} is not what its index says: {_root(error)}") from error


def tensors_of(path: Path) -> dict[str, Stored]:
    """Name to whole shape and dtype of a checkpoint's tensors.

    Raises:
        CheckpointError: its index is damaged, or would run code.
    """
    try:
        return stored(path, read_meta(path).get("tensors", {}))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def read_student(path: str | os.PathLike[str], ema: bool = False) -> dict[str, Tensor]:
    """The student's trained weights of a checkpoint, whole, on the CPU; by the names of its `state_dict`.

    Args:
        path: a checkpoint, a folder `checkpoints`, or a run's folder, of which the newest complete one is read.
        ema: the running average instead.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it has no running average.
    """
    alone = Processes(0, 1, torch.device("cpu"), None, None)
    path = resolve(Path(path), alone)
    prefix = "ema." if ema else "student."
    weights = {
        name: torch.empty(entry.shape, dtype=entry.dtype)
        for name, entry in tensors_of(path).items()
        if name.startswith(prefix)
    }
    if not weights:
        raise CheckpointError(f"checkpoint {path} has no {'running average (ema_decay)' if ema else 'student'}")
    load(path, weights, alone)
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


def resolve(path: Path, processes: Processes) -> Path:
    """The checkpoint that a path means: itself, or the newest complete one of a run; verified.

    Raises:
        CheckpointError: there is none.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    damaged: list[str] = []
    store = CheckpointStore(folder, processes, 1, damaged.append)
    if not store.paths():
        store.verify(path)
        return path
    newest = store.newest()
    if newest is None:
        raise CheckpointError(f"{path} has no usable checkpoint: {'; '.join(damaged)}")
    return newest


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _root(error: BaseException) -> str:
    """The first cause of a failure: distributed checkpoints wrap what the system said."""
    if isinstance(error, dcp.CheckpointException):
        cause, _ = next(iter(error.failures.values()))
        return _root(cause)
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
