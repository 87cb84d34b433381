"""Video models behind one contract, `codmd.models.base.VideoDenoiser`, and their registry."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Collection
from typing import Any

import torch

from .base import VideoDenoiser

REGISTRY = {
    "toy": ("codmd.models.toy", "ToyDenoiser", "ToyOptions"),
    "wan": ("codmd.models.wan", "WanDenoiser", "WanOptions"),
}
"""Name to (module, adapter, options dataclass); modules are imported when they are asked for."""

DEFAULT = "wan"
"""What weights are taken for that do not say which model they are of."""

__all__ = ["DEFAULT", "REGISTRY", "VideoDenoiser", "adapter", "build", "options_class", "read_options", "unread"]


def adapter(name: str) -> type[VideoDenoiser]:
    """The class of a model by registry name.

    Raises:
        ValueError: there is no such model.
    """
    module, adapter, _ = _entry(name)
    return getattr(importlib.import_module(module), adapter)


def options_class(name: str) -> type[Any]:
    """The frozen dataclass of an adapter's options: the `model:` section of a configuration, without `name`.

    Raises:
        ValueError: there is no such adapter.
    """
    module, _, options = _entry(name)
    return getattr(importlib.import_module(module), options)


def read_options(name: str, **options: Any) -> Any:
    """A model's options, checked.

    Raises:
        ValueError: an unknown adapter, option or value.
    """
    options_type = options_class(name)
    known = [field.name for field in dataclasses.fields(options_type)]
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: no option of model {name!r}; {_nearest(option, known)}")
    return options_type(**options)


def build(name: str, **options: Any) -> VideoDenoiser:
    """A model by registry name.

    Under `torch.device("meta")` the weights stay unread: shard the model, then call `load_weights`.

    Raises:
        ValueError: an unknown adapter, option or value.
    """
    return adapter(name).from_options(read_options(name, **options))


def unread(name: str, options: Any) -> VideoDenoiser:
    """A model on the meta device, without weights.

    Raises:
        FileNotFoundError, ValueError: as `build`.
    """
    with torch.device("meta"):
        return adapter(name).from_options(options)


def _entry(name: str) -> tuple[str, str, str]:
    if name not in REGISTRY:
        raise ValueError(f"model name: got {name!r}; {_nearest(name, REGISTRY)}")
    return REGISTRY[name]


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(known))}"
