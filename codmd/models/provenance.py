"""What is known of how a student came to be, for its model card."""

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
        measures: (measure, value) of `codmd inspect`.
    """

    teacher: str
    recipe: Mapping[str, Any]
    updates: int
    versions: Mapping[str, str]
    last: Mapping[str, Any]
    measures: Sequence[tuple[str, str]] = ()


def read_measures(path: Path) -> list[tuple[str, str]]:
    """(measure, mean ± deviation) of an inspection's results.json, its distances to the references first.

    Raises:
        OSError, ValueError: it cannot be read, or is no inspection.
    """
    content, found = read_json(path), []
    try:
        for group, title in (("distances", "distance to the reference: "), ("measures", "")):
            for name, value in content[group].items():
                if value is not None:
                    spread = "" if value["std"] is None else f" ± {value['std']:.3g}"
                    found.append((title + name, f"{value['mean']:.4g}{spread} ({value['count']} videos)"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--measures: {path}: not the results.json of codmd inspect: {error!r}") from error
    return found
