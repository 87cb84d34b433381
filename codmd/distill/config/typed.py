"""Plain mappings as typed dataclasses: every unknown key, wrong type and wrong value is refused by its full name."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the key, what came and what is allowed.

    Args:
        problems: each a sentence of its own; several are listed below each other.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n  ".join((f"{len(self.problems)} problems:", *self.problems))


def structured(kind: type, values: object, where: str = "") -> Any:
    """An instance of the dataclass `kind` from nested mappings, lists and scalars.

    Integers serve as floats, and lists as tuples; nothing else is converted. A dataclass with a classmethod
    `from_mapping(values, where)` reads its own section.

    Args:
        where: the dotted name of this section, for messages.

    Raises:
        ConfigError: keys or values are not allowed; names every one of them.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'configuration'}: got {values!r}; expected a section with keys")
    types_by_name = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    arguments: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        if name not in known:
            homes = [] if where else list(_homes(kind, str(name)))
            advice = f"did you mean {' or '.join(homes)}?" if homes else nearest(str(name), known, where)
            problems.append(f"{dotted(where, name)}: unknown; {advice}")
            continue
        try:
            arguments[name] = convert(types_by_name[name], value, dotted(where, name))
        except ConfigError as error:
            problems += error.problems
    required = [f.name for f in dataclasses.fields(kind) if f.init and _required(f)]
    problems += [f"{dotted(where, n)}: not given, and it has no default" for n in required if n not in values]
    if all(name in arguments for name in required):
        made, impossible = _made(kind, arguments, where)
        if not (problems or impossible):
            return made
        problems += impossible
    raise ConfigError(*problems)


def _made(kind: type, arguments: dict[str, Any], where: str) -> tuple[Any, list[str]]:
    """The dataclass, and what it refuses: values that it names are left out in turn, to find the others."""
    problems: list[str] = []
    rest = dict(arguments)
    while True:
        try:
            return kind(**rest), problems
        except ConfigError as error:
            return None, [*problems, *error.problems]
        except ValueError as error:
            name = re.split(r"\W", str(error), maxsplit=1)[0]
            if name in rest or name not in arguments:
                problems.append(f"{where}.{error}" if where else str(error))
            if name not in rest:
                return None, problems
            del rest[name]
        except TypeError:
            if not problems:
                raise
            return None, problems


def _homes(kind: type, name: str, where: str = "") -> Iterator[str]:
    """Dotted names of the sections' fields that are called `name`."""
    for field, annotation in get_type_hints(kind).items():
        if where and field == name:
            yield dotted(where, field)
        if dataclasses.is_dataclass(annotation):
            yield from _homes(annotation, name, dotted(where, field))  # type: ignore[arg-type]


def convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as a value of the annotation `kind`."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        options = get_args(kind)
        if value is None and types.NoneType in options:
            return None
        (inner,) = (option for option in options if option is not types.NoneType)
        return convert(inner, value, where)
    if origin is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            raise ConfigError(
                f"{where}: got {value!r}; expected one of {', '.join(str(a) or repr(a) for a in allowed)}"
            )
        return value
    if origin is tuple:
        return _tuple(get_args(kind), value, where)
    if kind is dict or origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: got {value!r}; expected a section with keys")
        return dict(value)
    if dataclasses.is_dataclass(kind):
        reader = getattr(kind, "from_mapping", None)
        return reader(value, where) if reader else structured(kind, value, where)  # type: ignore[arg-type]
    return _scalar(kind, value, where)


def _tuple(members: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: got {value!r}; expected a list")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(value) != len(members):
        raise ConfigError(f"{where}: got {len(value)} values; expected {len(members)}")
    return tuple(
        convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(members, value, strict=True))
    )


def _scalar(kind: type, value: Any, where: str) -> Any:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    fits = isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not fits:
        raise ConfigError(f"{where}: got {value!r}; expected {names[kind]}")
    return value


def nearest(name: str, known: Collection[str], where: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        return f"did you mean {dotted(where, close[0])}?"
    return f"expected one of {', '.join(known)}"


def dotted(where: str, name: object) -> str:
    """The full name of a key."""
    return f"{where}.{name}" if where else str(name)


def leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, dotted(where, name))
        else:
            yield dotted(where, name), value


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
