"""The convergence study as a page and a picture; every sentence follows from the numbers, in either direction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import whole_network as network
from benchmarks.convergence_measures import ARMS, COLUMNS
from codmd.demo.figures import COLORS
from codmd.demo.summary import markdown as markdown_table
from codmd.metrics import PairedDifference, paired_difference

NEGLIGIBLE = 0.01
SHOWN = ("relation_energy", "spearman_energy", "std_ratio")
NAMES = {"data": "data", "teacher": "teacher\n50", "teacher_few": "teacher\n4", "dmd": "DMD\n4", "codmd": "CoDMD\n4"}


def values(found: dict[str, Any], arm: str, measure: str) -> list[float]:
    """One value a seed, in the order of seeds."""
    return [outcome["metrics"][measure] for outcome in found["outcomes"] if outcome["arm"] == arm]


def differences(found: dict[str, Any]) -> dict[str, PairedDifference]:
    """CoDMD minus DMD at the same seed, by measure; for a measure with a best value, of the distances from it."""
    compared = {}
    for measure, column in COLUMNS.items():
        pair = (values(found, arm, measure) for arm in ("dmd", "codmd"))
        best = column.best
        compared[measure] = paired_difference(
            *(side if best is None else [abs(v - best) for v in side] for side in pair)
        )
    return compared


def judge(difference: PairedDifference, scale: float) -> str:
    """Where all seeds agree "nearer" or "further"; else, and below NEGLIGIBLE of `scale`, "mixed"."""
    if abs(difference.mean) < NEGLIGIBLE * abs(scale):
        return "mixed"
    if difference.lower == difference.pairs:
        return "nearer"
    return "further" if difference.lower == 0 and difference.mean > 0 else "mixed"


def judgements(found: dict[str, Any]) -> dict[str, tuple[PairedDifference, str]]:
    """CoDMD minus DMD and what to call it, by measure; the scale is DMD's value, or 1 where some value is best."""
    judged = {}
    for measure, difference in differences(found).items():
        scale = statistics.fmean(values(found, "dmd", measure)) if COLUMNS[measure].best is None else 1.0
        judged[measure] = difference, judge(difference, scale)
    return judged


def verdict(found: dict[str, Any]) -> str:
    """Where the relation term brings the student nearer to the teacher, where not, and what that is worth."""
    groups: dict[str, list[str]] = {"nearer": [], "further": [], "mixed": []}
    for measure, (difference, group) in judgements(found).items():
        column, before = COLUMNS[measure], statistics.fmean(values(found, "dmd", measure))
        title = column.title if column.best is None else f"{column.title} (from {column.best:g})"
        change = f" {difference.mean / before:+.0%}" if column.best is None and before > 0 else ""
        groups[group].append(title + change)
    seeds = len(found["seeds"])
    chance = f"By chance alone {seeds} seeds agree on a measure once in {2 ** (seeds - 1)} times" if seeds > 1 else ""
    spread = [statistics.fmean(values(found, arm, "std_ratio")) for arm in ("dmd", "codmd")]
    even = "alike" if abs(spread[0] - spread[1]) < 0.03 else "unlike, so that distances are not quite comparable"
    return "\n".join(
        [
            f"With the relation term, against DMD at the same seed, {seeds} seed{'s' * (seeds > 1)}:",
            "",
            f"* nearer to the teacher on every seed: {'; '.join(groups['nearer']) or 'nothing'}.",
            f"* further from it on every seed: {'; '.join(groups['further']) or 'nothing'}.",
            f"* less than {NEGLIGIBLE:.0%} apart, or seeds that disagree: {'; '.join(groups['mixed']) or 'nothing'}.",
            f"* {chance or 'One seed cannot tell an effect from chance'}.",
            f"* Standard deviations over the teacher's are {even}: DMD {spread[0]:.3f}, CoDMD {spread[1]:.3f}.",
        ]
    )


def markdown(found: dict[str, Any]) -> str:
    """The record as a page."""
    shape, many, few = " x ".join(map(str, found["latents"])), *found["milliseconds"].values()
    rows = []
    for arm, title in ARMS.items():
        cells = [
            _spread(values(found, arm, measure)) for measure in ("static", *COLUMNS) if measure != "static_difference"
        ]
        rows.append([title, *cells])
    header = ["", "static", *(c.title for m, c in COLUMNS.items() if m != "static_difference")]
    paired = []
    for measure, (difference, group) in judgements(found).items():
        error = "" if math.isnan(difference.standard_error) else f" ± {difference.standard_error:.2g}"
        title = COLUMNS[measure].title + (" (distance from best)" if COLUMNS[measure].best is not None else "")
        wins = f"{difference.lower} of {difference.pairs}"
        paired.append([title, f"{difference.mean:+.3g}{error}", wins, group])
    lines = [
        *network.heading("A Wan on moving real textures: DMD and CoDMD students", found, found["tiny"]),
        "",
        f"{found['parameters'] / 1e6:.1f} million parameters, latents {shape}, {found['videos']} videos of every arm "
        f"at each of the seeds {', '.join(map(str, found['seeds']))}. Distances to as many of the teacher's videos, 50 "
        "steps with guidance; mean ± standard deviation over seeds; lower is better, and 1 is best for ratios. All "
        "sets have the captions equally often, which makes the energy distance of equal distributions slightly "
        "negative: read distances beside the floor.",
        "",
        markdown_table(header, rows),
        "",
        verdict(found),
        "",
        markdown_table(["CoDMD − DMD, same seed", "mean ± standard error", "lower on seeds", "with the term"], paired),
        "",
        f"A video takes {many:.2f} ms with the teacher ({found['evaluations']['teacher']} evaluations) and "
        f"{few:.2f} ms with a student ({found['evaluations']['student']}): {many / few:.1f} times less, in batches, "
        "sampling alone.",
        "",
        *(f"* {column.title}: {column.explanation}." for column in COLUMNS.values()),
        "* static: share of videos that fail VBench's rule for its dynamic degree (`codmd inspect`).",
    ]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], pictures: dict[str, Tensor]) -> Callable[[Any], Any]:
    """Film strips of every arm over distances, the distribution of motion, static videos and spread."""

    def picture(pyplot: Any) -> Any:
        figure = pyplot.figure(figsize=(14, 8), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.35, 1))
        strips = next(iter(pictures.values())).shape[0]
        grid = top.subplots(len(ARMS), strips, squeeze=False)
        for row, arm in enumerate(ARMS):
            for column in range(strips):
                axis = grid[row, column]
                axis.imshow(np.concatenate(list(pictures[arm][column].numpy()), axis=1), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
            grid[row, 0].set_ylabel(NAMES[arm], rotation=0, ha="right", va="center", color=COLORS[arm])
        panels = bottom.subplots(1, 5)
        for axis, measure in zip(panels, (*SHOWN, "static"), strict=False):
            _dots(axis, found, measure)
        titles = ("cosine distance ↓", "Spearman distance ↓", "std over the teacher's", "share of static videos")
        for axis, title in zip(panels, titles, strict=False):
            axis.set_title(title, loc="left")
        _motion(panels[-1], found)
        return figure

    return picture


def _dots(axis: Any, found: dict[str, Any], measure: str) -> None:
    """A dot a seed over the mean's bar; lines join DMD and CoDMD of one seed."""
    arms = list(ARMS)
    for pair in zip(values(found, "dmd", measure), values(found, "codmd", measure), strict=True):
        axis.plot((arms.index("dmd"), arms.index("codmd")), pair, color="#bdc1c6", linewidth=1, zorder=1)
    for place, arm in enumerate(arms):
        own = values(found, arm, measure)
        axis.bar(place, statistics.fmean(own), 0.65, color=COLORS[arm], alpha=0.25, zorder=0)
        axis.scatter([place] * len(own), own, s=16, color=COLORS[arm], zorder=2)
    axis.set_xticks(range(len(arms)), [NAMES[arm] for arm in arms], fontsize=7)


def _motion(axis: Any, found: dict[str, Any]) -> None:
    """Optical flow of every video, all seeds together; the last bin holds the rest."""
    pooled = {arm: [v for o in found["outcomes"] if o["arm"] == arm for v in o["motion"]] for arm in ARMS}
    top = max(1e-3, 1.5 * float(np.quantile(pooled["teacher"], 0.98)))
    bins = np.linspace(0, top, 31)
    axis.hist(np.minimum(pooled["teacher"], top), bins, density=True, color="#dadce0", label="teacher")
    for arm in ("dmd", "codmd"):
        label = ARMS[arm].split(",")[0]
        axis.hist(np.minimum(pooled[arm], top), bins, density=True, histtype="step", color=COLORS[arm], label=label)
    axis.set_title("motion, pixels a frame", loc="left")
    axis.legend(frameon=False, fontsize=8)


def _spread(numbers: list[float]) -> str:
    deviation = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.3f}{deviation}"
