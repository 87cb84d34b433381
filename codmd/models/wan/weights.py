"""Wan's weights from any file that carries them, exactly or not at all; and diffusers folders to write them to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codmd import hub
from codmd.models.tensor_files import TensorFile, open_tensors

from .config import FOLDERS, SHIPPED, parameter_shapes, read_config, transformer_folder
from .keys import diffusers_names, refuse_parts

SHOWN = 3


@contextmanager
def open_wan(
    path: str | os.PathLike[str], config: Mapping[str, Any] | None = None, network: str = "", expert: str = ""
) -> Iterator[TensorFile]:
    """Wan's weights by diffusers' names, read one at a time; names and shapes equal the configuration's.

    Args:
        path: a diffusers folder or repository (of a transformer or a pipeline), a .safetensors or a PyTorch file, in
            diffusers' or in the original naming, with wrapper prefixes or without.
        config: arguments of `WanTransformer3DModel`; None finds the shipped configuration that fits.
        network: the entry of a checkpoint dictionary; "" takes the generator.
        expert: of a pipeline that has two, "high" or "low".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unsafe, truncated, or does not fit; with the first differences.
    """
    path = hub.local(path, FOLDERS.get(expert, "transformer"))
    if expert or path.is_dir():
        path = transformer_folder(path, expert)
    with open_tensors(path, network) as file:
        names = _names(path, file)
        shapes = {name: file.shapes[found] for name, found in names.items()}
        check_fit(path, shapes, config if config is not None else _fitting(path, shapes))
        yield TensorFile(shapes, {name: (lambda found=found: _wide(file[found])) for name, found in names.items()})


def _names(path: Path, file: TensorFile) -> dict[str, str]:
    """Diffusers name to the name in the file."""
    try:
        refuse_parts(file)
        return diffusers_names(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _wide(value: Tensor) -> Tensor:
    """8-bit floats as bfloat16, which holds each of them exactly; anything else as it is."""
    return value.bfloat16() if value.is_floating_point() and value.element_size() == 1 else value


def fitting_config(path: str | os.PathLike[str], network: str = "") -> dict[str, Any]:
    """The shipped configuration whose names and shapes a single file has.

    Raises:
        FileNotFoundError, ValueError: as `open_wan`; or no shipped configuration fits.
    """
    with open_tensors(path, network) as file:
        names = _names(Path(path), file)
        return _fitting(Path(path), {name: file.shapes[found] for name, found in names.items()})


def check_fit(path: Path, shapes: Mapping[str, torch.Size], config: Mapping[str, Any]) -> None:
    """Requires equal names and shapes.

    Raises:
        ValueError: with how many names are missing, unexpected or of another shape, and the first of each.
    """
    expected = parameter_shapes(dict(config))
    differences = _differences(shapes, expected)
    if differences:
        other = next((name for name in SHIPPED if parameter_shapes(read_config(name)) == shapes), None)
        hint = f"; it is a Wan of the shipped configuration {other!r}" if other else ""
        raise ValueError(f"{path}: does not fit the configuration: {differences}{hint}")


def _fitting(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    candidates = {name: read_config(name) for name in SHIPPED}
    for config in candidates.values():
        if parameter_shapes(config) == shapes:
            return config
    nearest = min(candidates, key=lambda name: _distance(shapes, parameter_shapes(candidates[name])))
    differences = _differences(shapes, parameter_shapes(candidates[nearest]))
    raise ValueError(f"{path}: fits no shipped configuration; against the nearest, {nearest!r}: {differences}")


def _distance(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> int:
    return sum(shapes.get(name) != expected.get(name) for name in shapes.keys() | expected.keys())


def _differences(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> str:
    """Missing, unexpected and reshaped weights in words; empty when there are none."""
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected]
    reshaped = [
        f"{name} {tuple(shapes[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds if names)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
