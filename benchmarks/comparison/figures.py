"""Quality over training as a picture: a panel a measure, a line an arm."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from codmd.demo.summary import Column

from .arms import ARMS
from .study import by_arm

ACROSS = 3


def training_curves(outcomes: Sequence[dict[str, Any]], columns: dict[str, Column], group: str = "main") -> bytes:
    """PNG bytes: means over seeds at every point of the training; dashed without the relation term.

    A thin horizontal line is the teacher of many steps, a dotted one the best value where that is not 0.
    """
    found = by_arm(outcomes)
    shown = {arm: list(found[arm].values()) for arm in found if arm in ARMS and ARMS[arm].group == group}
    rows = math.ceil(len(columns) / ACROSS)
    figure = Figure(figsize=(11, 2.6 * rows + 0.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, ACROSS, squeeze=False).ravel()
    for panel, (measure, column) in zip(panels, columns.items(), strict=False):
        for place, (arm, runs) in enumerate(shown.items()):
            points = list(zip(*(run["curve"] for run in runs), strict=True))
            means = [sum(point[measure] for point in seeds) / len(seeds) for seeds in points]
            share = [100 * (i + 1) / len(means) for i in range(len(means))]
            style, colour = "-" if "relation_weight" in ARMS[arm].changes else "--", colormaps["tab20"](place % 20)
            panel.set_xticks(share)
            panel.plot(share, means, style, color=colour, lw=1.5, marker=".", label=ARMS[arm].title)
        if "teacher" in found:
            panel.axhline(_mean(found["teacher"], measure), color="#80868b", lw=0.8)
        if column.best:
            panel.axhline(column.best, color="#80868b", lw=0.8, ls=":")
        panel.set_title(column.title, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    figure.supxlabel("% of the updates", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _mean(outcomes: dict[int, dict[str, Any]], measure: str) -> float:
    return sum(o["metrics"][measure] for o in outcomes.values()) / len(outcomes)
