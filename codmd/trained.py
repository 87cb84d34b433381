"""The student inside a training checkpoint: its configuration and its whole weights, adapters merged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codmd import models
from codmd.distill.config.run_config import RunConfig
from codmd.distill.config.sections import ModelSettings
from codmd.distill.config.typed import ConfigError, structured
from codmd.distill.run.checkpoint import read_student, resolve
from codmd.distill.run.identity import TEACHER
from codmd.distill.run.integrity import META, CheckpointError, read_meta
from codmd.distill.run.log import JSON_LINES, read_log
from codmd.distill.run.parallel import Processes
from codmd.distill.run.roles import RANDOM
from codmd.models.fingerprint import fingerprint
from codmd.models.lora import LoraOptions
from codmd.models.provenance import Provenance
from codmd.models.tensor_files import Joined, Renamed

ADAPTER_PREFIX = "adapter."
"""Of the names in the `state_dict` of a role over a shared base."""


@dataclass(frozen=True)
class TrainedStudent:
    """A student as it was trained.

    Attributes:
        run: the configuration of its training.
        model: the model that the weights are of: that of the run, or of an expert's run the model of both.
        weights: every weight, by the names of the model's `state_dict`.
        checkpoint: its folder.
        meta: of the checkpoint, as `read_meta`.
    """

    run: RunConfig
    model: ModelSettings
    weights: Mapping[str, Tensor]
    checkpoint: Path
    meta: Mapping[str, Any]

    def provenance(self, measures: Sequence[tuple[str, str]] = ()) -> Provenance:
        """How it came to be, with the last entry of its run's log up to the checkpoint."""
        log = self.checkpoint.parent.parent / JSON_LINES
        entries = read_log(log) if log.is_file() else []
        last = [entry for entry in entries if "loss" in entry and entry["update"] <= self.meta["step"]][-1:]
        recipe = self.run.as_mapping()["distill"]
        return Provenance(
            self.run.frozen.options.weights,
            recipe,
            self.meta["step"],
            self.meta["versions"],
            last[0] if last else {},
            measures,
        )


@contextmanager
def open_student(path: str | os.PathLike[str], ema: bool = False) -> Iterator[TrainedStudent]:
    """The student of a run's newest complete checkpoint, or of a given one; an adapter is merged into its base.

    The student of a run of one expert is the pipeline that it was trained from, with that expert in its place.

    Args:
        ema: its running average instead.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no complete checkpoint, or is damaged, or the base of its adapters cannot be read.
    """
    path, meta, run, weights = _read(Path(path), ema)
    with _merged(path, meta, run, weights) as whole:
        if run.distill.expert is None:
            yield TrainedStudent(run, run.model, whole, path, meta)
            return
        both = run.model.changed({"expert": ""}, "model")
        source = _on_files(both, path, "its expert stands beside")
        with models.unread(both.name, both.options).open_weights(source) as tensors:
            expert = {f"{run.distill.expert}.{name}": name for name in whole}
            yield TrainedStudent(run, both, Joined(Renamed(whole, expert), tensors), path, meta)


@contextmanager
def _merged(
    path: Path, meta: Mapping[str, Any], run: RunConfig, weights: Mapping[str, Tensor]
) -> Iterator[Mapping[str, Tensor]]:
    """The trained network's weights, an adapter merged into its base."""
    if run.lora is None:
        yield weights
        return
    base = run.frozen
    source = _on_files(base, path, "its adapters stand on")
    with models.unread(base.name, base.options).open_weights(source) as tensors:
        _check_base(source, fingerprint(tensors), path, meta.get("identity", {}))
        yield MergedWeights(tensors, weights, run.lora)


def _on_files(settings: ModelSettings, path: Path, standing: str) -> str:
    """Where the weights of a model are.

    Raises:
        ValueError: they are random.
    """
    if settings.options.weights == RANDOM:
        raise ValueError(f"{path}: {standing} random {settings.name} weights, which no file has")
    return settings.options.weights


def read_adapter(path: str | os.PathLike[str], ema: bool = False) -> TrainedStudent:
    """The student's adapter alone, its factors by the names of the base's layers, scaled as if alpha were the rank.

    Raises:
        FileNotFoundError, ValueError: as `open_student`; or the run trained whole networks.
    """
    path, meta, run, weights = _read(Path(path), ema)
    if run.lora is None:
        raise ValueError(f"{path}: was trained without lora; it has no adapter, only a whole network")
    scale = run.lora.alpha / run.lora.rank
    factors = {name.removeprefix(ADAPTER_PREFIX): value for name, value in weights.items()}
    return TrainedStudent(
        run,
        run.model,
        {name: scale * value if ".lora_B." in name else value for name, value in factors.items()},
        path,
        meta,
    )


def _read(path: Path, ema: bool) -> tuple[Path, dict[str, Any], RunConfig, dict[str, Tensor]]:
    """The checkpoint that `path` means, its mark, its run's configuration and the student's tensors."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run or checkpoint")
    try:
        if not (path / META).is_file():
            path = resolve(path, Processes(0, 1, torch.device("cpu"), None, None))
        meta = read_meta(path)
        known = {**meta["config"], "log": _without(meta["config"].get("log", {}), "tensorboard")}
        return path, meta, structured(RunConfig, known), read_student(path, ema)
    except (CheckpointError, ConfigError) as error:
        raise ValueError(str(error)) from error


def _without(section: Mapping[str, Any], removed: str) -> dict[str, Any]:
    """A section without a key that earlier versions wrote."""
    return {name: value for name, value in section.items() if name != removed}


def _check_base(base: str, found: str, path: Path, identity: Mapping[str, list[str]]) -> None:
    _, expected = identity.get(TEACHER, (base, found))
    if found != expected:
        raise ValueError(
            f"{base}: is not the base that the adapters of {path} were trained over: fingerprint {found}, then "
            f"{expected}"
        )


class MergedWeights(Mapping[str, Tensor]):
    """W + (alpha / rank) B A, one weight at a time.

    Args:
        base: W, by the names of its `state_dict`.
        adapter: the factors, by the names of `RoleView.state_dict`.
        options: of the adapter.
    """

    def __init__(self, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], options: LoraOptions) -> None:
        self._base, self._adapter, self._scale = base, adapter, options.alpha / options.rank

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name]
        layer = f"{ADAPTER_PREFIX}{name.removesuffix('.weight')}"
        if name.endswith(".weight") and f"{layer}.lora_B.weight" in self._adapter:
            update = self._adapter[f"{layer}.lora_B.weight"] @ self._adapter[f"{layer}.lora_A.weight"]
            weight = (weight.float() + self._scale * update).to(weight.dtype)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
