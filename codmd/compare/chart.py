"""The tally as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .tally import WinRate

WINS, SAME, LOSSES = "#d1495b", "#dadce0", "#3b75af"


def chart(rates: Mapping[str, WinRate | None], names: tuple[str, str], title: str) -> bytes:
    """PNG bytes: a bar a question split into wins, no difference and losses, and the win rate with its interval."""
    answered = {question: rate for question, rate in rates.items() if rate is not None}
    figure = Figure(figsize=(8.5, 1.5 + 0.75 * len(answered)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for row, rate in enumerate(answered.values()):
        total, start = rate.wins + rate.same + rate.losses, 0.0
        for count, colour in ((rate.wins, WINS), (rate.same, SAME), (rate.losses, LOSSES)):
            share = 100 * count / total
            axis.barh(row, share, left=start, color=colour, height=0.56)
            if count:
                text = "black" if colour == SAME else "white"
                axis.text(start + share / 2, row, str(count), ha="center", va="center", color=text, fontsize=9)
            start += share
        reach = [[100 * (rate.rate - rate.low)], [100 * (rate.high - rate.rate)]]
        axis.errorbar(
            100 * rate.rate, row + 0.4, xerr=reach, fmt="D", color="#202124", ms=4, capsize=3, lw=1.2, clip_on=False
        )
        label = f"{100 * rate.rate:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
        axis.text(101.5, row, label, va="center", fontsize=9)
    axis.axvline(50, color="#5f6368", lw=0.8, ls=":")
    axis.set_yticks(range(len(answered)), list(answered))
    axis.set_ylim(len(answered) - 0.3, -0.5)
    axis.set_xlim(0, 100)
    measure = f"% of votes; diamond: win rate of {names[0]} (no difference counts half), 95 % interval"
    axis.set_xlabel(measure, parse_math=False)  # a $ in the name of a folder is no formula
    axis.set_title(title, fontsize=10, parse_math=False)
    axis.spines[["top", "right"]].set_visible(False)
    labels = (names[0], "no difference", names[1])
    handles = [Patch(color=colour, label=text) for colour, text in zip((WINS, SAME, LOSSES), labels, strict=True)]
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()
