"""The origin of a student, for its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codmd.files import read_json


@dataclass(frozen=True)
class Provenance:
    """How a student came to be.

    Attributes:
        teacher: the repository, folder or file that its teacher was read from.
        recipe: the section `distill` of its run.
        updates: that it made.
        versions: of the packages it was trained with.
        last: the last entry of its run's log; empty where there is none.
        measures: (measure, value) of `codmd inspect` and `codmd vbench`, as `read_measures`.
    """

    teacher: str
    recipe: Mapping[str, Any]
    updates: int
    versions: Mapping[str, str]
    last: Mapping[str, Any]
    measures: Sequence[tuple[str, str]] = ()


def read_measures(path: Path) -> list[tuple[str, str]]:
    """(measure, value) for a model card: mean ± deviation of an inspection, distances first, or scores of VBench.

    Args:
        path: `results.json` of `codmd inspect`, or what `codmd vbench --json` wrote of one model.

    Raises:
        OSError, ValueError: it cannot be read, is neither of them, or scores several models.
    """
    content = read_json(path)
    try:
        return _inspected(content) if "distances" in content else _scored(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        expected = "results.json of codmd inspect or codmd vbench --json of one model"
        raise ValueError(f"--measures: {path}: expected {expected}: {error!r}") from error


def _inspected(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for group, title in (("distances", "distance to the reference: "), ("measures", "")):
        for name, value in content[group].items():
            if value is not None:
                spread = "" if value["std"] is None else f" ± {value['std']:.3g}"
                found.append((title + name, f"{value['mean']:.4g}{spread} ({value['count']} videos)"))
    return found


def _scored(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    (scores,) = content.values()
    names = ("total", "quality", "semantic", "dynamic_degree")
    return [(f"VBench, {name.replace('_', ' ')}", f"{scores[name]:.2f} %") for name in names]
