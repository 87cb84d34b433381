"""The picture of speed-ups: one group of bars a case, one bar a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

COLORS = ("#2a6f97", "#a9c9dd", "#6c757d")


class Speed(NamedTuple):
    """One case: milliseconds of codmd and of every baseline."""

    label: str
    codmd_ms: float
    baselines_ms: Mapping[str, float]


def plot(cases: Sequence[Speed], path: Path, threads: int) -> None:
    """Bars of baseline over codmd, labelled with codmd's own time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for case in cases for name in case.baselines_ms))
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.55 * len(cases)), layout="constrained")
    longest = 0.0
    for number, name in enumerate(names):
        shown = [(y, case) for y, case in enumerate(cases) if name in case.baselines_ms]
        ratios = [case.baselines_ms[name] / case.codmd_ms for _, case in shown]
        rows = [y - 0.4 + (number + 0.5) * height for y, _ in shown]
        axes.barh(rows, ratios, 0.95 * height, label=f"over {name}", color=COLORS[number % len(COLORS)])
        for row, ratio, (_, case) in zip(rows, ratios, shown, strict=True):
            own = f"  ({case.codmd_ms:.2f} ms)" if number == 0 else ""
            axes.text(ratio, row, f" {ratio:.1f}x{own}", va="center", fontsize=8)
        longest = max([longest, *ratios])
    axes.set_yticks(range(len(cases)), [case.label for case in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"speed-up of forward + backward, {threads} CPU threads")
    axes.set_xlim(0, 1.25 * longest)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=len(names))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
