"""Pictures of the report, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .measures import COLUMNS, Measurement

OURS, THEIRS, GREY = "#d1495b", "#3c4043", "#bdc1c6"
OVERVIEW = ("order", "speed", "flicker", "blockiness", "saturation", "cosine", "spearman")


def overview(clips: Sequence[Measurement], references: Sequence[Measurement | None]) -> bytes:
    """Every measure, one panel each: a dot a clip, with a line to its reference."""
    names = [name for name in OVERVIEW if any(name in clip.values for clip in clips)]
    figure = _figure(12.5, 2.9)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        pairs = [(c, r) for c, r in zip(clips, references, strict=True) if name in c.values]
        for clip, reference in pairs:
            if reference is not None and name in reference.values:
                axis.plot((0, 1), (reference.values[name], clip.values[name]), color=GREY, lw=0.8, zorder=1)
                axis.plot(0, reference.values[name], ".", color=THEIRS, ms=6, zorder=2)
            axis.plot(1, clip.values[name], ".", color=OURS, ms=6, zorder=2)
        paired = any(r is not None for _, r in pairs)
        axis.set_xticks((0, 1) if paired else (1,), ("reference", "clips") if paired else ("clips",), fontsize=8)
        axis.set_xlim(-0.4 if paired else 0.4, 1.4 if paired else 1.6)
        axis.set_title(COLUMNS[name].title, fontsize=9)
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(y=0.12)
        from_zero_or_cut(axis)
    return _png(figure)


def clip_card(clip: Measurement, reference: Measurement | None) -> bytes:
    """A clip's frames, relation matrices and motion over time, over those of its reference and their difference."""
    rows = [(clip, OURS)] if reference is None else [(clip, OURS), (reference, THEIRS)]
    comparable = reference is not None and reference.frames == clip.frames
    figure = _figure(12.5, 2.1 * len(rows) + (1.7 if comparable else 0))
    parts = figure.subfigures(len(rows) + comparable, 1, squeeze=False)[:, 0]
    lowest = {
        kind: min(float(getattr(m, kind).min()) for m, _ in rows if m is not None) for kind in ("cosine", "spearman")
    }
    fastest = max((max(m.curves["motion"]) for m, _ in rows if m.curves), default=0.0)
    for part, (measured, colour) in zip(parts, rows, strict=False):
        strip, cosine, spearman, motion = part.subplots(1, 4, width_ratios=(4.2, 1, 1, 1.6))
        strip.set_title("clip" if measured is clip else "reference", color=colour, fontsize=9, loc="left")
        _strip(strip, measured)
        for axis, kind in ((cosine, "cosine"), (spearman, "spearman")):
            image = _heatmap(axis, getattr(measured, kind), lowest[kind], 1.0, "viridis")
            axis.set_title(COLUMNS[kind].title, fontsize=9)
            part.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=6)
        _motion(motion, measured, colour, fastest)
    if comparable:
        assert reference is not None
        empty, cosine, spearman, blank = parts[-1].subplots(1, 4, width_ratios=(4.2, 1, 1, 1.6))
        for axis in (empty, blank):
            axis.set_axis_off()
        empty.text(1, 0.5, "clip minus reference", ha="right", va="center", fontsize=9, transform=empty.transAxes)
        for axis, kind in ((cosine, "cosine"), (spearman, "spearman")):
            difference = getattr(clip, kind) - getattr(reference, kind)
            limit = max(float(difference.abs().max()), 1e-3)
            image = _heatmap(axis, difference, -limit, limit, "RdBu_r")
            parts[-1].colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=6)
    return _png(figure)


def from_zero_or_cut(axis: Axes) -> None:
    """Lets the vertical axis begin at zero; where that would hide what differs, marks its lower end as cut."""
    low, high = axis.get_ylim()
    if low < 0 < high:
        axis.axhline(0, color=GREY, lw=0.8, zorder=0)
    elif low >= 0 and high - low > 0.25 * high:
        axis.set_ylim(0, high)
    elif low > 0:
        axis.plot((0, 0), (0.02, 0.06), marker=[(-1, -0.6), (1, 0.6)], ms=7, ls="", color=THEIRS, clip_on=False,
                  transform=axis.transAxes)  # fmt: skip
        axis.text(0.03, 0.02, "cut", fontsize=7, color=THEIRS, transform=axis.transAxes)


def _strip(axis: Axes, measured: Measurement) -> None:
    axis.set_axis_off()
    if measured.strip is not None:
        encoded = np.frombuffer(measured.strip, np.uint8)
        axis.imshow(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))[..., ::-1])
        return
    width, height = measured.size
    axis.text(0, 0.5, f"latents, {measured.frames} frames of {width}x{height}", fontsize=9, transform=axis.transAxes)


def _motion(axis: Axes, measured: Measurement, colour: str, fastest: float) -> None:
    if not measured.curves:
        axis.set_axis_off()
        return
    axis.plot(range(1, measured.frames), measured.curves["motion"], color=colour, lw=1.5)
    axis.set_ylim(0, max(1.15 * fastest, 0.5))
    axis.set_title(COLUMNS["motion"].title, fontsize=9)
    axis.set_xlabel("frame", fontsize=7, labelpad=1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=7)


def _heatmap(axis: Axes, matrix: Tensor, low: float, high: float, colours: str) -> AxesImage:
    count = len(matrix)
    edges = (0.5, count + 0.5, count + 0.5, 0.5)
    image = axis.imshow(matrix.numpy(), cmap=colours, vmin=min(low, high - 1e-3), vmax=high, extent=edges)
    axis.set_xticks((1, count))
    axis.set_yticks((1, count))
    axis.tick_params(labelsize=6, length=2)
    axis.set_xlabel("frame", fontsize=7, labelpad=-6)
    axis.set_ylabel("frame", fontsize=7, labelpad=-4)
    axis.spines[:].set_visible(False)
    return image


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
