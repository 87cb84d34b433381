"""Means, spreads and paired differences of the outcomes, and their tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from codmd.metrics import PairedDifference, paired_difference

from .experiment import ARMS, MEASURES, TEACHER_STEPS, Outcome

TOO_SHORT = "A --quick run shows that everything works; it is too short to judge the term by."
"""The verdict of a quick run."""


@dataclass(frozen=True)
class Column:
    """One measure as a reader meets it."""

    title: str
    explanation: str
    best: float | None = None
    """The value to be near to; None where lower is better."""


COLUMNS = {
    "relation_energy": Column(
        "relation energy distance",
        "energy distance between the frame-by-frame cosine matrices of generated and real videos",
    ),
    "video_energy": Column("video energy distance", "energy distance between the videos themselves"),
    "rank_relation": Column(
        "Spearman relation distance",
        "root mean square difference of Spearman's rank correlations between all coordinates of a video: "
        "the copula alone, whatever the marginals",
    ),
    "sample_relation": Column(
        "sample relation distance",
        "Wasserstein distance between the cosines of pairs of videos (time-averaged), which the batch term relates",
    ),
    "speed": Column("speed distance", "Wasserstein distance between the distributions of speed"),
    "std_ratio": Column("std ratio", "standard deviation of all values, divided by the data's; 1 is right", best=1.0),
}
assert COLUMNS.keys() == MEASURES.keys()


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation over seeds; no deviation for a single seed."""

    mean: float
    std: float | None

    def text(self) -> str:
        mean = f"{round(self.mean, 3) + 0.0:.3f}"  # + 0.0 turns -0.000 into 0.000
        return mean if self.std is None else f"{mean} ± {self.std:.3f}"


@dataclass(frozen=True)
class Summary:
    """All numbers of one demo.

    Attributes:
        statistics: [arm][measure].
        differences: [measure], CoDMD minus DMD at the same seed; for a measure with a best value, of the
            distances from it.
        evaluations: network evaluations per sample of each arm; 0 for data.
        milliseconds: sampling time per sample of each arm, None for data.
    """

    student_steps: int
    seeds: tuple[int, ...]
    statistics: dict[str, dict[str, Statistic]]
    differences: dict[str, PairedDifference]
    evaluations: dict[str, int]
    milliseconds: dict[str, float | None]

    def name(self, arm: str) -> str:
        """The arm as a reader meets it."""
        steps = f"{self.student_steps} step{'s' if self.student_steps > 1 else ''}"
        return {
            "data": "fresh data (floor)",
            "teacher": f"teacher, {TEACHER_STEPS} steps",
            "teacher_few": f"teacher, {steps}",
            "dmd": f"DMD, {steps}",
            "codmd": f"CoDMD, {steps}",
        }[arm]

    def relative_change(self, measure: str) -> float:
        """Change of the mean from DMD to CoDMD, as a fraction of DMD's."""
        before = self.statistics["dmd"][measure].mean
        return (self.statistics["codmd"][measure].mean - before) / before if before else math.nan


def summarize(outcomes: Sequence[Outcome], student_steps: int, milliseconds: dict[str, float | None]) -> Summary:
    """Aggregates the outcomes of every arm at every seed."""
    values = {
        arm: {measure: [o.metrics[measure] for o in outcomes if o.arm == arm] for measure in MEASURES} for arm in ARMS
    }
    differences = {}
    for measure, column in COLUMNS.items():
        pair = values["dmd"][measure], values["codmd"][measure]
        if (best := column.best) is not None:
            pair = [abs(x - best) for x in pair[0]], [abs(x - best) for x in pair[1]]
        differences[measure] = paired_difference(*pair)
    few = student_steps
    return Summary(
        student_steps=student_steps,
        seeds=tuple(o.seed for o in outcomes if o.arm == "dmd"),
        statistics={arm: {m: _statistic(v) for m, v in measured.items()} for arm, measured in values.items()},
        differences=differences,
        evaluations={"data": 0, "teacher": TEACHER_STEPS, "teacher_few": few, "dmd": few, "codmd": few},
        milliseconds=milliseconds,
    )


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the main table, as text."""
    header = ["", *(c.title for c in COLUMNS.values()), "network evaluations", "ms / sample"]
    rows = []
    for arm in ARMS:
        milliseconds = summary.milliseconds[arm]
        rows.append(
            [
                summary.name(arm),
                *(summary.statistics[arm][measure].text() for measure in COLUMNS),
                str(summary.evaluations[arm] or "–"),
                "–" if milliseconds is None else f"{milliseconds:.3f}",
            ]
        )
    return header, rows


def difference_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the paired comparison of CoDMD with DMD, as text."""
    header = ["CoDMD − DMD, same seed", "mean difference", "relative to DMD", "CoDMD better on"]
    rows = []
    for measure, column in COLUMNS.items():
        difference = summary.differences[measure]
        error = "" if math.isnan(difference.standard_error) else f" ± {difference.standard_error:.3f}"
        title = column.title if column.best is None else f"distance of the {column.title} from {column.best:g}"
        relative = "" if column.best is not None else f"{summary.relative_change(measure):+.0%}"
        wins = f"{difference.lower} of {difference.pairs} seeds"
        rows.append([title, f"{difference.mean:+.3f}{error}", relative or "–", wins])
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: columns aligned with spaces."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *rows]
    )


def console_summary(summary: Summary) -> str:
    """The summary for a terminal: the most important columns, and the verdict."""
    header, rows = table(summary)
    shown = ("", "relation energy distance", "video energy distance", "std ratio", "network evaluations", "ms / sample")
    columns = [header.index(title) for title in shown]
    short, *lines = ([line[i] for i in columns] for line in (header, *rows))
    return f"{plain(short, lines)}\n\n{verdict(summary)}"


def verdict(summary: Summary) -> str:
    """The outcome in words, in either direction, with the distances that grew on average."""
    change = summary.relative_change("relation_energy")
    wins = summary.differences["relation_energy"]
    ratio = summary.statistics["codmd"]["std_ratio"].mean
    direction = "lowers" if change < 0 else "does not lower"
    return (
        f"The relation term {direction} the relation energy distance of the {summary.student_steps}-step student: "
        f"{change:+.0%} on average, lower on {wins.lower} of {wins.pairs} seeds, at a standard deviation "
        f"{abs(ratio - 1):.0%} {'above' if ratio >= 1 else 'below'} the data's. {_costs(summary)}"
    )


def _costs(summary: Summary) -> str:
    worse = [
        f"{COLUMNS[measure].title} ({summary.relative_change(measure):+.0%}, better on {d.lower} of {d.pairs} seeds)"
        for measure, d in summary.differences.items()
        if measure != "relation_energy" and COLUMNS[measure].best is None and d.mean > 0
    ]
    return f"On average it does not help: {', '.join(worse)}." if worse else "No other distance grew on average."


def _statistic(values: Sequence[float]) -> Statistic:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Statistic(mean, None)
    return Statistic(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))
