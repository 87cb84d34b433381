"""Configurations of Wan's transformer: the shipped ones, files, and the parameters each one has."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from codmd import hub
from codmd.files import read_json

FOLDERS = {"high": "transformer", "low": "transformer_2"}
"""Expert to its subfolder of a pipeline that has two, as Wan2.2-A14B's."""
SHIPPED = ("1.3b", "14b", "i2v_14b", "ti2v_5b", "tiny")
"""Wan2.1-T2V in its two sizes, Wan2.1-I2V-14B, Wan2.2-TI2V-5B, and a tiny one for tests and examples."""


def read_config(name: str | os.PathLike[str], expert: str = "") -> dict[str, Any]:
    """Arguments of `WanTransformer3DModel`.

    Args:
        name: one of `SHIPPED`, a JSON file, or a diffusers folder or repository (of a transformer or a pipeline).
        expert: of a pipeline that has two, "high" or "low".

    Raises:
        ValueError: an unknown name, or a file that is no configuration of Wan's transformer.
    """
    if name in SHIPPED:
        path = Path(str(resources.files(__package__) / "configs" / f"wan_{name}.json"))
    else:
        path = hub.local(name, FOLDERS.get(expert, "transformer"))
        if path.is_dir():
            path = transformer_folder(path, expert) / "config.json"
        if not path.is_file():
            raise ValueError(f"config: {name} is no file; expected one of {', '.join(SHIPPED)}, or a config.json")
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"config: {error}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "WanTransformer3DModel":
        raise ValueError(f"config: {path} describes {kind!r}; expected a WanTransformer3DModel")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def latent_channels(config: Mapping[str, Any]) -> int:
    """Of the latents that the network denoises; its input may have channels of a first frame beside them."""
    return config["out_channels"] or config["in_channels"]


def transformer_folder(path: Path, expert: str = "") -> Path:
    """The folder with the transformer's config.json: `path` itself, or its `transformer` subfolder.

    Args:
        expert: "high" or "low" for one of the two of the pipeline `path`.

    Raises:
        ValueError: the pipeline has two of them, each for a part of the noise levels, and none is named; or the other
            way round.
    """
    if expert:
        if not (path / FOLDERS[expert] / "config.json").is_file():
            raise ValueError(f"expert: {path} has no {FOLDERS[expert]}; expected a pipeline of two experts")
        return path / FOLDERS[expert]
    nested = path / "transformer"
    found = nested if (nested / "config.json").is_file() else path
    names = tuple(FOLDERS.values())
    if found.name in names and all((found.parent / name).is_dir() for name in names):
        raise ValueError(
            f"{found.parent}: holds two experts, {names[0]} for high noise and {names[1]} for low, as Wan2.2-A14B "
            "does; expected the folder of both, or one network for all levels"
        )
    return found


def has_experts(source: str | os.PathLike[str]) -> bool:
    """Whether a folder or repository is a pipeline of two experts."""
    return set(FOLDERS.values()) <= hub.components(source)


def boundary_of(source: str | os.PathLike[str]) -> float:
    """The lowest noise level of the high-noise expert, in (0, 1), from the pipeline's index.

    Raises:
        ValueError: it does not say.
    """
    path = hub.local(source) / hub.INDEX
    index = read_json(path) if path.is_file() else None
    boundary = index.get("boundary_ratio") if isinstance(index, dict) else None
    if not isinstance(boundary, float) or not 0 < boundary < 1:
        raise ValueError(f"{path}: boundary_ratio: got {boundary}; expected the level between two experts, in (0, 1)")
    return boundary


def build_transformer(config: dict[str, Any], device: str | None = None) -> Any:
    """A `WanTransformer3DModel` on `device`, or else on the default one, random.

    Raises:
        ValueError: an argument is unknown or does not fit.
    """
    # Before the device: under one, torch 2.8 cannot import its own compiler, which diffusers does.
    from diffusers import WanTransformer3DModel

    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    try:
        with contextlib.nullcontext() if device is None else torch.device(device):
            return WanTransformer3DModel(**arguments)
    except (TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"config: WanTransformer3DModel refuses it: {error}") from error


def parameter_shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Name to shape of every weight, from the meta device."""
    return dict(_parameter_shapes(json.dumps(config, sort_keys=True)))


@cache
def _parameter_shapes(config: str) -> tuple[tuple[str, torch.Size], ...]:
    model = build_transformer(json.loads(config), "meta")
    return tuple((name, value.shape) for name, value in model.state_dict().items())
