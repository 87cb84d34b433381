"""The comparison as pages: Markdown for the repository, and HTML with the clips side by side, complete in itself."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from codmd import page
from codmd.demo.arc import ArcVideo
from codmd.demo.summary import Column, markdown

from .arms import ARMS, UNTRAINED
from .study import by_arm, differences, spread

Outcomes = Sequence[dict[str, Any]]
Columns = dict[str, Column]


@dataclass(frozen=True)
class Subject:
    """What a size is about, in words for its page."""

    title: str
    name: str
    """Of its files."""
    target: str
    """What samples are measured against."""
    clips: str
    absent: str


CURVES = (
    "Means over seeds, at every quarter of the training. Dashed: without the relation term; grey: the teacher of fifty "
    "steps; dotted: the best value, where that is not 0."
)
SPACE = "\N{NO-BREAK SPACE}"
CLIPS = 6
SIZE = 96
ENOUGH = 5
"""Seeds from which a page says better or worse: five of one sign come by chance once in sixteen measures."""
SECONDS = 1.6
"""Of one round of a clip of eight frames."""


def title_of(arm: str) -> str:
    return UNTRAINED[arm] if arm in UNTRAINED else ARMS[arm].title


def group_of(arm: str) -> str:
    return "main" if arm in UNTRAINED else ARMS[arm].group


def levels(outcomes: Outcomes, columns: Columns, group: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows): mean ± standard deviation over seeds of every measure."""
    header = ["", "seeds", "updates", *(column.title for column in columns.values())]
    rows = []
    for arm, found in by_arm(outcomes).items():
        if group_of(arm) == group:
            updates = next(iter(found.values()))["updates"]
            cells = [_spread([o["metrics"][measure] for o in found.values()]) for measure in columns]
            rows.append([title_of(arm), str(len(found)), str(updates or "–"), *cells])
    return header, rows


def changes(outcomes: Outcomes, columns: Columns, group: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows): paired differences: relative, the interval, and the seeds on which the arm is better."""
    header = ["paired at the same seed", "against", *(column.title for column in columns.values())]
    rows = []
    for arm, pairs in differences(outcomes, columns).items():
        if ARMS[arm].group == group:
            rows.append([title_of(arm), title_of(ARMS[arm].against), *(_change(pairs[m]) for m in columns)])
    return header, rows


def verdicts(outcomes: Outcomes, columns: Columns) -> list[str]:
    """A sentence per arm of the main group: what fell, what grew; with fewer than `ENOUGH` seeds it claims nothing."""
    sentences = []
    for arm, pairs in differences(outcomes, columns).items():
        if ARMS[arm].group != "main":
            continue
        seeds = max(pair["pairs"] for pair in pairs.values())
        fell = ", ".join(_named(columns[m], pair) for m, pair in pairs.items() if pair["high"] < 0) or "nothing"
        grew = ", ".join(_named(columns[m], pair) for m, pair in pairs.items() if pair["low"] > 0) or "nothing"
        name = f"**{title_of(arm)}** against {title_of(ARMS[arm].against)}, {seeds} seed{'s' if seeds > 1 else ''}:"
        if seeds >= ENOUGH:
            sentences.append(f"{name} better in {fell}; worse in {grew}; the others are not told apart.")
        elif seeds > 1:
            sentences.append(f"{name} too few seeds to tell. Better on all of them in {fell}; worse in {grew}.")
        else:
            sentences.append(f"{name} a single seed tells nothing.")
    return sentences


def curves(outcomes: Outcomes, measure: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows): the mean over seeds of one measure at every point of the training, main arms."""
    rows, points = [], 0
    for arm, found in by_arm(outcomes).items():
        series = [o["curve"] for o in found.values()]
        if group_of(arm) == "main" and arm in ARMS:
            points = max(points, len(series[0]))
            means = [sum(c[i][measure] for c in series) / len(series) for i in range(len(series[0]))]
            rows.append([title_of(arm), *(f"{mean:.3f}" for mean in means)])
    return ["share of the updates", *(f"{(i + 1) / points:.0%}" for i in range(points))], rows


def report(record: dict[str, Any], columns: Columns, subject: Subject) -> str:
    """The page in Markdown."""
    outcomes, settings = record["outcomes"], record["settings"]
    unfinished = settings["runs"] - len(outcomes)
    state = (
        f"**{len(outcomes)} of {settings['runs']} runs are finished; `{settings['command']}` continues the rest.** "
        f"Where no run is kept, `--known docs/results/{subject.name}.json` takes over those of that file. What follows "
        "is what finished."
        if unfinished
        else "All runs are finished."
    )
    parts = [
        f"# {subject.title}",
        f"`{settings['command']}` wrote this page, [{subject.name}.json]({subject.name}.json) and {subject.name}.html, "
        f"which shows the clips side by side. {state}",
        f"Seeds {settings['seeds'][0]} to {settings['seeds'][-1]}, on which nothing was chosen: λ = 0.1 and τ = 0.1 "
        "are the paper's. Every trained arm costs as many network forwards as "
        f"{settings['updates']} updates of 4-step DMD ({settings['forwards']:,.0f} a sample of the batch; one with "
        f"gradient counts as three, one with a tangent as 2.6), and is measured on {settings['samples']} samples "
        f"against {subject.target}. At "
        "one seed all arms have the same noise and the same target.",
        "## What it shows",
        "Better and worse: the 95 % bootstrap interval over seeds of the paired difference leaves 0 out. Over few "
        "seeds such an interval is too narrow, and five of five of one sign come by chance once in sixteen measures: "
        "read a single measure as a hint, several that agree as a result.",
        "\n".join(f"- {sentence}" for sentence in verdicts(outcomes, columns)) or "No pair of arms is finished.",
        "## Mean ± standard deviation over seeds",
        "Lower is better; temporal order is best at 0, std ratio and diversity at 1.",
        markdown(*levels(outcomes, columns, "main")),
        "## Paired differences",
        "Mean difference relative to the other arm's mean, [95 % interval of the difference], seeds on which the arm "
        "is better. For measures with a best value: of the distances from it.",
        markdown(*changes(outcomes, columns, "main")),
        "## Quality over training",
        f"![every measure against the updates]({subject.name}.png)\n\n{CURVES}",
        *(f"{columns[m].title}:\n\n{markdown(*curves(outcomes, m))}" for m in ("relation_energy", "video_energy")),
    ]
    for group in ("λ", "τ", "steps"):
        if any(group_of(o["arm"]) == group for o in outcomes):
            parts += [f"## Sensitivity to {group}", markdown(*levels(outcomes, columns, group)),
                      markdown(*changes(outcomes, columns, group))]  # fmt: skip
    parts += [
        "## Measures",
        "\n".join(f"- **{column.title}**: {column.explanation}." for column in columns.values()),
        f"{subject.absent}Cosines cannot tell a video from its reversal.",
    ]
    return "\n\n".join(parts) + "\n"


def document(record: dict[str, Any], columns: Columns, subject: Subject, curve_picture: bytes) -> str:
    """The page in HTML, with moving clips of every arm and the PNG of `figures.training_curves`."""
    outcomes = record["outcomes"]
    body = [
        f"<h1>{subject.title}</h1>",
        f'<p class="note">{html.escape(record["settings"]["command"])}: '
        f"{len(outcomes)} of {record['settings']['runs']} runs</p>",
        *(f"<p>{_bold(html.escape(s))}</p>" for s in verdicts(outcomes, columns)),
        f"<h2>Clips</h2><p>Videos of the first seed, from the same noise{subject.clips}.</p>",
        clips(outcomes),
        "<h2>Mean ± standard deviation over seeds</h2>", page.table(*levels(outcomes, columns, "main")),
        "<h2>Paired differences</h2>", page.table(*changes(outcomes, columns, "main")),
        "<h2>Quality over training</h2>", page.figure(curve_picture, CURVES),
    ]  # fmt: skip
    for group in ("λ", "τ", "steps"):
        if not any(group_of(o["arm"]) == group for o in outcomes):
            continue
        body += [f"<h2>Sensitivity to {group}</h2>", page.table(*levels(outcomes, columns, group)),
                 page.table(*changes(outcomes, columns, group))]  # fmt: skip
    return page.page(subject.title, "\n".join(body))


def clips(outcomes: Outcomes) -> str:
    """A row of moving clips per arm."""
    radius, rows = ArcVideo().config.radius, []
    for arm, found in by_arm(outcomes).items():
        first = found[min(found)]
        shown = [_clip(path, radius) for path in first.get("paths", ())] or list(map(_gif, first.get("clips", ())))
        if not shown:
            continue  # of a run that was taken over
        cells = "".join(f"<td>{clip}</td>" for clip in shown[:CLIPS])
        rows.append(f"<tr><td>{html.escape(title_of(arm))}</td>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _gif(data: str) -> str:
    return (
        f'<img alt="clip" width="{SIZE}" height="{SIZE}" style="image-rendering:pixelated" '
        f'src="data:image/gif;base64,{data}">'
    )


def _clip(path: Sequence[Sequence[float]], radius: float) -> str:
    def place(value: float) -> float:
        return round(SIZE / 2 * (1 + value / (1.6 * radius)), 1)

    points = [(place(x), place(-y)) for x, y in path]
    line = " ".join(f"{x},{y}" for x, y in points)
    times = ";".join(f"{i / len(points):.3f}" for i in range(len(points)))
    moves = "".join(
        f'<animate attributeName="{name}" values="{";".join(str(point[axis]) for point in points)}" '
        f'keyTimes="{times}" dur="{SECONDS}s" calcMode="discrete" repeatCount="indefinite"/>'
        for axis, name in enumerate(("cx", "cy"))
    )
    middle, ring = SIZE / 2, round(SIZE / 2 / 1.6, 1)
    return (
        f'<svg width="{SIZE}" height="{SIZE}" role="img" aria-label="path of a point over eight frames">'
        f'<circle cx="{middle}" cy="{middle}" r="{ring}" fill="none" style="stroke:var(--line)"/>'
        f'<polyline points="{line}" fill="none" stroke="#9ab6d9"/>'
        f'<circle r="4" fill="#d1495b" cx="{points[0][0]}" cy="{points[0][1]}">{moves}</circle></svg>'
    )


def _bold(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _spread(values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    text = f"{round(mean, 3) + 0.0:.3f}"
    return text if math.isnan(deviation) else f"{text}{SPACE}±{SPACE}{deviation:.3f}"


def _change(pair: dict[str, Any]) -> str:
    relative = "" if math.isnan(pair["relative"]) else f"{pair['relative']:+.0%} "
    interval = "" if math.isnan(pair["low"]) else f"[{pair['low']:+.3f},{SPACE}{pair['high']:+.3f}] "
    return f"{relative}{interval}{pair['better']}/{pair['pairs']}"


def _named(column: Column, pair: dict[str, Any]) -> str:
    relative = f"{pair['mean']:+.3f}" if column.best is not None else f"{pair['relative']:+.0%}"
    return f"{column.title} ({relative}, {pair['better']} of {pair['pairs']})"
