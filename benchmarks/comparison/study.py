"""From outcomes to what is shown: mean and spread of every arm, and paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from codmd.demo.summary import Column
from codmd.metrics import bootstrap_interval, paired_difference

from .arms import ARMS, UNTRAINED


@dataclass(frozen=True)
class Difference:
    """One arm against another over the seeds that both finished; negative is better.

    Attributes:
        mean: of the paired differences; for a measure with a best value, of the distances from it.
        relative: mean over the other arm's mean; NaN where that is 0.
        low, high: bootstrap interval of the mean, 95 %; NaN for one pair.
        better, pairs: seeds on which the arm is better, of all.
    """

    mean: float
    relative: float
    low: float
    high: float
    better: int
    pairs: int


def by_arm(outcomes: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """arm -> seed -> outcome, arms in the order of their definition."""
    arms = {arm: {o["seed"]: o for o in outcomes if o["arm"] == arm} for arm in (*UNTRAINED, *ARMS)}
    return {arm: found for arm, found in arms.items() if found}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, sample standard deviation); NaN for one value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def difference(
    arm: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], measure: str, best: float | None
) -> Difference | None:
    """`arm` against `other` in one measure, near to `best` or else low; None without a common seed."""
    seeds = sorted(set(arm) & set(other))
    if not seeds:
        return None
    a, b = ([_distance(found[seed]["metrics"][measure], best) for seed in seeds] for found in (other, arm))
    pair = paired_difference(a, b)
    changes = [y - x for x, y in zip(a, b, strict=True)]
    low, high = bootstrap_interval(changes) if len(seeds) > 1 else (math.nan, math.nan)
    mean = sum(a) / len(a)
    return Difference(pair.mean, pair.mean / mean if mean else math.nan, low, high, pair.lower, pair.pairs)


def differences(outcomes: Sequence[dict[str, Any]], columns: dict[str, Column]) -> dict[str, dict[str, dict[str, Any]]]:
    """arm -> measure -> its difference to the arm that it is paired with, as plain numbers."""
    found = by_arm(outcomes)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, seeds in found.items():
        if arm in ("dmd", *UNTRAINED) or (against := ARMS[arm].against) not in found or against == arm:
            continue
        pairs = {name: difference(seeds, found[against], name, column.best) for name, column in columns.items()}
        table[arm] = {measure: asdict(pair) for measure, pair in pairs.items() if pair is not None}
    return table


def _distance(value: float, best: float | None) -> float:
    return value if best is None else abs(value - best)
