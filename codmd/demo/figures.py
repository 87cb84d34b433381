"""The demo's pictures, drawn from outcomes; each function returns a matplotlib figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .arc import ArcConfig
from .experiment import Outcome
from .summary import COLUMNS, Summary

COLORS = {
    "data": "#9aa0a6",
    "teacher": "#3c4043",
    "teacher_few": "#b8860b",
    "dmd": "#3b75af",
    "codmd": "#d1495b",
}
SHOWN = ("teacher", "teacher_few", "dmd", "codmd")
PATHS_PER_SCENE = 5

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#80868b",
        "axes.labelcolor": "#3c4043",
        "xtick.color": "#5f6368",
        "ytick.color": "#5f6368",
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "legend.frameon": False,
    }
)


class Outcomes:
    """Outcomes by arm, in the order of seeds."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.all = list(outcomes)

    def of(self, arm: str) -> list[Outcome]:
        return [outcome for outcome in self.all if outcome.arm == arm]

    def relation(self, arm: str) -> list[list[float]]:
        """Mean frame relation over samples and seeds, F x F."""
        matrices = [outcome.relation for outcome in self.of(arm)]
        return [[statistics.fmean(cell) for cell in zip(*row, strict=True)] for row in zip(*matrices, strict=True)]

    def relation_error(self, arm: str) -> list[list[float]]:
        """Mean frame relation minus the data's, F x F."""
        pairs = zip(self.relation(arm), self.relation("data"), strict=True)
        return [[x - y for x, y in zip(row, real, strict=True)] for row, real in pairs]


def headline(outcomes: Outcomes, summary: Summary, arc: ArcConfig) -> Figure:
    """Trajectories over relation errors for each arm, with the relation energy distance beside them."""
    figure = plt.figure(figsize=(12.5, 4.4), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(2.6, 1))
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = left.subplots(2, len(SHOWN))
    for column, arm in enumerate(SHOWN):
        _trajectories(axes[0, column], outcomes.of(arm)[0], arc)
        axes[0, column].set_title(summary.name(arm), color=COLORS[arm], fontweight="bold")
    limit = _limit(outcomes)
    for column, arm in enumerate(SHOWN):
        image = _heatmap(axes[1, column], outcomes.relation_error(arm), -limit, limit, "RdBu_r")
    axes[0, 0].set_ylabel("sample videos as paths\nin their scene's plane")
    axes[1, 0].set_ylabel("frame relation\nminus the data's")
    left.colorbar(image, ax=axes[1, :].tolist(), shrink=0.75, pad=0.01)
    dots = right.subplots()
    _dots(dots, outcomes, summary, "relation_energy")
    dots.set_title("relation energy distance to data ↓", fontweight="bold")
    return figure


def relations(outcomes: Outcomes, summary: Summary) -> Figure:
    """Mean frame relation matrices of data and every arm, and what each differs from the data by."""
    arms = ("data", *SHOWN)
    figure, axes = plt.subplots(2, len(arms), figsize=(12.5, 5.2), layout="constrained")
    limit = _limit(outcomes)
    lowest = min(cell for arm in arms for row in outcomes.relation(arm) for cell in row)
    for column, arm in enumerate(arms):
        top = _heatmap(axes[0, column], outcomes.relation(arm), lowest, 1.0, "viridis")
        axes[0, column].set_title("data" if arm == "data" else summary.name(arm), color=COLORS[arm], fontweight="bold")
        if arm != "data":
            bottom = _heatmap(axes[1, column], outcomes.relation_error(arm), -limit, limit, "RdBu_r")
    codmd, dmd = outcomes.relation("codmd"), outcomes.relation("dmd")
    change = [[x - y for x, y in zip(*rows, strict=True)] for rows in zip(codmd, dmd, strict=True)]
    _heatmap(axes[1, 0], change, -limit, limit, "RdBu_r")
    axes[1, 0].set_title("CoDMD minus DMD")
    for column in range(1, len(arms)):
        axes[1, column].set_title("minus data")
    figure.colorbar(top, ax=axes[0].tolist(), shrink=0.8, pad=0.01, label="mean cosine")
    figure.colorbar(bottom, ax=axes[1].tolist(), shrink=0.8, pad=0.01, label="difference")
    return figure


def trajectories(outcomes: Outcomes, summary: Summary, arc: ArcConfig) -> Figure:
    """Sample videos of data and every arm at the first seed, as paths in the plane of the nearest scene."""
    arms = ("data", *SHOWN)
    figure, axes = plt.subplots(1, len(arms), figsize=(12.5, 2.9), layout="constrained")
    for axis, arm in zip(axes, arms, strict=True):
        _trajectories(axis, outcomes.of(arm)[0], arc)
        axis.set_title("data" if arm == "data" else summary.name(arm), color=COLORS[arm], fontweight="bold")
    return figure


def curves(outcomes: Outcomes) -> Figure:
    """Loss curves of both arms at every seed, and the relation term's share of the gradient."""
    figure, axes = plt.subplots(1, 4, figsize=(12.5, 3.0), layout="constrained")
    for axis, name, title in (
        (axes[0], "dmd", "DMD loss"),
        (axes[1], "critic", "critic loss (flow matching)"),
    ):
        for arm in ("dmd", "codmd"):
            _curves(axis, outcomes.of(arm), name, COLORS[arm], "DMD" if arm == "dmd" else "CoDMD")
        axis.set_title(title)
        axis.legend()
    codmd = outcomes.of("codmd")
    for name, color, label in (
        ("relation_frame", COLORS["codmd"], "frames"),
        ("relation_batch", "#e9a23b", "samples"),
    ):
        if any(any(outcome.curves.get(name, ())) for outcome in codmd):  # a term that is off is 0 throughout
            _curves(axes[2], codmd, name, color, label)
    axes[2].set_title("relation loss of CoDMD")
    axes[2].legend()
    _curves(axes[3], codmd, "relation_to_dmd", COLORS["codmd"], "")
    axes[3].set_title("‖λ ∇relation‖ / ‖∇DMD‖")
    for axis in axes:
        axis.set_xlabel("student update")
        axis.set_ylim(bottom=0)
    return figure


def speeds(outcomes: Outcomes, summary: Summary) -> Figure:
    """Distribution of speed: data in grey, every arm as a line, all seeds together; the last bin holds the rest."""
    figure, axis = plt.subplots(figsize=(12.5, 3.4), layout="constrained")
    top = 1.4 * max(s for o in outcomes.of("data") for s in o.speeds)
    pooled = {arm: [min(s, top) for o in outcomes.of(arm) for s in o.speeds] for arm in ("data", *SHOWN)}
    bins = [top * i / 80 for i in range(81)]
    axis.hist(pooled["data"], bins, density=True, color="#dadce0", label="data")
    for arm in SHOWN:
        axis.hist(pooled[arm], bins, density=True, histtype="step", lw=1.5, color=COLORS[arm], label=summary.name(arm))
    axis.set_xlabel("speed (latent units per frame)")
    axis.set_ylabel("density")
    axis.legend()
    return figure


def measures(outcomes: Outcomes, summary: Summary) -> Figure:
    """Every measure, one panel each: dots are seeds, and lines join the same seed."""
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 5.4), layout="constrained")
    for axis, (measure, column) in zip(axes.flat, COLUMNS.items(), strict=True):
        _dots(axis, outcomes, summary, measure)
        axis.set_title(column.title + (" ↓" if column.best is None else f" (best {column.best:g})"))
    return figure


def _limit(outcomes: Outcomes) -> float:
    """Symmetric colour limit shared by all relation differences."""
    return max(abs(cell) for arm in SHOWN for row in outcomes.relation_error(arm) for cell in row)


def _heatmap(axis: Axes, matrix: list[list[float]], low: float, high: float, colors: str) -> AxesImage:
    count = len(matrix)
    image = axis.imshow(matrix, cmap=colors, vmin=low, vmax=high, extent=(0.5, count + 0.5, count + 0.5, 0.5))
    axis.set_xticks((1, count))
    axis.set_yticks((1, count))
    axis.tick_params(length=2, labelsize=7)
    axis.set_xlabel("frame", fontsize=7, labelpad=-6)
    axis.spines[:].set_visible(False)
    return image


def _trajectories(axis: Axes, outcome: Outcome, arc: ArcConfig) -> None:
    palette = plt.get_cmap("Dark2").colors
    radius = arc.radius
    axis.add_patch(plt.Circle((0, 0), radius, fill=False, color="#bdc1c6", lw=1))
    for scene in range(arc.scenes):
        chosen = [p for s, p in zip(outcome.scenes, outcome.paths, strict=True) if s == scene][:PATHS_PER_SCENE]
        for path in chosen:
            x, y = zip(*path, strict=True)
            axis.plot(x, y, color=palette[scene % len(palette)], lw=0.9, alpha=0.75, marker=".", ms=2.5)
    axis.set_xlim(-1.45 * radius, 1.45 * radius)
    axis.set_ylim(-1.45 * radius, 1.45 * radius)
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _curves(axis: Axes, outcomes: Sequence[Outcome], name: str, color: str, label: str) -> None:
    """Faint lines for seeds and a strong one for a running mean of their mean."""
    if not outcomes or name not in outcomes[0].curves:
        return
    for outcome in outcomes:
        axis.plot(outcome.curves["update"], outcome.curves[name], color=color, lw=0.5, alpha=0.25)
    mean = [statistics.fmean(values) for values in zip(*(o.curves[name] for o in outcomes), strict=True)]
    reach = max(1, len(mean) // 20)
    smooth = [statistics.fmean(mean[max(0, i - reach) : i + reach + 1]) for i in range(len(mean))]
    axis.plot(outcomes[0].curves["update"], smooth, color=color, lw=1.8, label=label)


def _dots(axis: Axes, outcomes: Outcomes, summary: Summary, measure: str) -> None:
    pairs = zip(outcomes.of("dmd"), outcomes.of("codmd"), strict=True)
    ends = SHOWN.index("dmd"), SHOWN.index("codmd")
    for dmd, codmd in pairs:
        axis.plot(ends, (dmd.metrics[measure], codmd.metrics[measure]), color="#dadce0", lw=1, zorder=1)
    for position, arm in enumerate(SHOWN):
        values = [outcome.metrics[measure] for outcome in outcomes.of(arm)]
        mean = summary.statistics[arm][measure].mean
        axis.bar(position, mean, width=0.62, color=COLORS[arm], alpha=0.22, zorder=0)
        axis.scatter([position] * len(values), values, color=COLORS[arm], s=16, zorder=3)
        axis.annotate(
            f"{mean:.3f}",
            (position, max([mean, *values])),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            color=COLORS[arm],
        )
    axis.axhline(summary.statistics["data"][measure].mean, color=COLORS["data"], lw=1, ls=":")
    axis.set_xticks(range(len(SHOWN)), [summary.name(arm).replace(", ", "\n") for arm in SHOWN], fontsize=8)
    axis.margins(y=0.15)
    axis.set_ylim(bottom=min(0.0, *(o.metrics[measure] for arm in SHOWN for o in outcomes.of(arm))))
