"""Video models behind one contract, `codmd.models.base.VideoDenoiser`, and their registry."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Collection
from typing import Any

from .base import VideoDenoiser

REGISTRY = {
    "toy": ("codmd.models.toy", "ToyDenoiser", "ToyOptions"),
    "wan": ("codmd.models.wan.network", "WanDenoiser", "WanOptions"),
}
"""Name to (module, adapter, options dataclass); modules are imported when they are asked for."""

__all__ = ["REGISTRY", "VideoDenoiser", "build", "options_class"]


def options_class(name: str) -> type:
    """The frozen dataclass of an adapter's options: the `model:` section of a configuration, without `name`.

    Raises:
        ValueError: there is no such adapter.
    """
    module, _, options = _entry(name)
    return getattr(importlib.import_module(module), options)


def build(name: str, **options: Any) -> VideoDenoiser:
    """A model by registry name.

    Under `torch.device("meta")` the weights stay unread: shard the model, then call `load_weights`.

    Raises:
        ValueError: an unknown adapter, option or value.
    """
    module, adapter, _ = _entry(name)
    options_type = options_class(name)
    known = [field.name for field in dataclasses.fields(options_type)]
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: no option of model {name!r}; {_nearest(option, known)}")
    return getattr(importlib.import_module(module), adapter).from_options(options_type(**options))


def _entry(name: str) -> tuple[str, str, str]:
    if name not in REGISTRY:
        raise ValueError(f"model name: got {name!r}; {_nearest(name, REGISTRY)}")
    return REGISTRY[name]


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(known))}"
