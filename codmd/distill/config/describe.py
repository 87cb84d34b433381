"""Every key of a run's configuration on a line of its own: value, type, default and meaning."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .sections import ModelSettings
from .typed import dotted

NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "section"}


def describe(config: Any) -> str:
    """`key: value  # type, default; meaning`, line by line: what `codmd train CONFIG --print` shows."""
    return "\n".join(f"{key}: {value}  # {meaning}" for key, value, meaning in described(config))


def described(section: Any, where: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, value, "type, default; meaning") of a dataclass and the sections in it."""
    if isinstance(section, ModelSettings):
        yield dotted(where, "name"), section.name, "text, required; the adapter, of codmd.models"
        section = section.options
    hints, meanings = get_type_hints(type(section)), _meanings(type(section))
    for field in dataclasses.fields(section):
        key, value = dotted(where, field.name), getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from described(value, key)
            continue
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"default {_shown(field.default)}"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"default {_shown(field.default_factory())}"
        meaning = meanings.get(field.name, "")
        yield key, _shown(value), f"{_type(hints[field.name])}, {default}" + (f"; {meaning}" if meaning else "")


def _shown(value: Any) -> str:
    """As it would stand in YAML, on one line."""
    if dataclasses.is_dataclass(value):
        return "section"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _type(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if member is types.NoneType else _type(member) for member in inner)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    return NAMES.get(origin or kind, "section")


def _meanings(kind: type) -> dict[str, str]:
    """Attribute to what the docstring's `Attributes:` say of it, of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for entry in re.split(r"\n(?=    \S)", text):
            names, colon, meaning = entry.partition(":")
            if colon:
                found |= {name.strip(): " ".join(meaning.split()).rstrip(".") for name in names.split(",")}
    return found
