"""The report of an inspection: results.json and a self-contained report.html."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from codmd import page
from codmd.compare.study import unplayable
from codmd.files import short_names
from codmd.output import MARKER

from . import figures
from .measures import COLUMNS, Column, Measurement
from .pairs import DISTANCES, SET_DISTANCES, Pair, mean_and_std, set_distances

FILMS = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif"}
"""What browsers play, to its MIME type."""
MOST_FILM = 64 * 2**20
"""Bytes of films in a page."""


@dataclass(frozen=True)
class Inspection:
    """What one run of `codmd inspect` found."""

    clips: list[Measurement]
    pairs: list[Pair]
    """One for each clip that has a reference."""
    skipped: list[tuple[Path, str]]
    """What could not be read or compared, and why."""
    prompts: dict[Path, str]
    """By the path of the clip, where `codmd sample` recorded it."""


def write_report(folder: Path, inspection: Inspection, pictures: int) -> None:
    """Writes results.json and report.html into an existing folder; `pictures` bounds the clips shown with matrices."""
    (folder / MARKER).write_text(json.dumps(results(inspection, pictures)), "utf-8")
    (folder / "report.html").write_text(render(inspection, pictures), "utf-8", "replace")  # a name may not be UTF-8


def results(inspection: Inspection, pictures: int) -> dict[str, Any]:
    """The content of results.json; numbers that are not finite become null, matrices are those of the clips shown."""
    by_path = {pair.clip.path: pair for pair in inspection.pairs}
    with_matrices = {clip.path for clip in shown(inspection, pictures)}
    return {
        "clips": [
            {"path": str(c.path), "prompt": inspection.prompts.get(c.path)}
            | _clip_entry(c, by_path.get(c.path), c.path in with_matrices)
            for c in inspection.clips
        ],
        "measures": {name: _statistics([m.values for m in inspection.clips], name) for name in COLUMNS},
        "distances": {name: _statistics([p.distances for p in inspection.pairs], name) for name in DISTANCES},
        "set_distances": set_distances(inspection.pairs),
        "skipped": [{"path": str(path), "reason": reason} for path, reason in inspection.skipped],
        "explanations": {
            "measures": {name: column.explanation for name, column in COLUMNS.items()},
            "distances": {name: column.explanation for name, column in DISTANCES.items()},
            "set_distances": SET_DISTANCES,
        },
    }


def shown(inspection: Inspection, pictures: int) -> list[Measurement]:
    """The clips to show: those farthest from their reference first, then those without one, at most `pictures`."""
    distance = {pair.clip.path: pair.distances["cosine"] for pair in inspection.pairs}
    return sorted(inspection.clips, key=lambda clip: distance.get(clip.path, -1.0), reverse=True)[:pictures]


def verdict(inspection: Inspection) -> str:
    """The outcome in a sentence."""
    count, pairs = len(inspection.clips), inspection.pairs
    static = sum(m.values.get("static", 0) == 1 for m in inspection.clips)
    if pairs:
        differing = [pair for pair in pairs if pair.findings]
        kinds = [finding.partition(":")[0] for pair in differing for finding in pair.findings]
        counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        text = f"{len(pairs) - len(differing)} of {len(pairs)} clips look like their references to these measures"
        text += (
            f", {len(differing)} {'differs' if len(differing) == 1 else 'differ'} visibly ({counted})"
            if counted
            else ""
        )
    else:
        text = f"{count} {'clip was' if count == 1 else 'clips were'} measured, without references to compare with"
    text += f"; {static} of {count} {'is' if static == 1 else 'are'} static"
    if inspection.skipped:
        text += f"; {len(inspection.skipped)} skipped or not compared"
    return f"{text}."


def render(inspection: Inspection, pictures: int) -> str:
    """report.html as text."""
    names = dict(zip((c.path for c in inspection.clips), short_names([c.path for c in inspection.clips]), strict=True))
    by_path = {pair.clip.path: pair for pair in inspection.pairs}
    references = [by_path[c.path].reference if c.path in by_path else None for c in inspection.clips]
    parts = [f'<h1>codmd inspect</h1><p class="verdict">{html.escape(verdict(inspection))}</p>']
    if inspection.skipped:
        rows = [(str(path), reason) for path, reason in inspection.skipped]
        parts.append(f"<h2>Skipped or not compared</h2>{page.text_table((), rows)}")
    parts.append("<h2>Measures</h2>")
    parts.append(
        page.figure(
            figures.overview(inspection.clips, references),
            "One dot a clip" + (", joined to its reference." if inspection.pairs else "."),
        )
    )
    parts.append(_measures_table(inspection, names))
    if inspection.pairs:
        parts.append(_pairs_section(inspection, names))
    parts.append(_cards(inspection, names, by_path, pictures))
    return page.page("codmd inspect", "\n".join(parts))


def _measures_table(inspection: Inspection, names: dict[Path, str]) -> str:
    rows = [[names[m.path], *(_cell(m.values.get(name), c) for name, c in COLUMNS.items())] for m in inspection.clips]
    groups = {"mean": inspection.clips, "mean of the references": [pair.reference for pair in inspection.pairs]}
    for title, members in groups.items():
        if members:
            found = (_statistics([m.values for m in members], name) for name in COLUMNS)
            rows.append([title, *(_spread(s, c) for s, c in zip(found, COLUMNS.values(), strict=True))])
    header = ["clip", *(c.title for c in COLUMNS.values())]
    present = {name for clip in inspection.clips for name in clip.values}
    meanings = [(c.title, c.explanation) for name, c in COLUMNS.items() if name in present]
    return page.table(header, rows, lambda row: "strong" if row[0] in groups else "", meanings)


def _pairs_section(inspection: Inspection, names: dict[Path, str]) -> str:
    found = [(names[p.clip.path], "; ".join(p.findings) or "as the reference") for p in inspection.pairs]
    rows = [
        [names[p.clip.path], *(_cell(p.distances.get(name), c) for name, c in DISTANCES.items())]
        for p in inspection.pairs
    ]
    spreads = ((_statistics([p.distances for p in inspection.pairs], name), c) for name, c in DISTANCES.items())
    rows.append(["mean", *(_spread(s, c) for s, c in spreads)])
    parts = ["<h2>Against the references</h2>", page.text_table(("clip", "finding"), found)]
    parts.append("<h2>Distances</h2>")
    meanings = [(c.title, c.explanation) for c in DISTANCES.values()]
    parts.append(page.table(["clip", *(c.title for c in DISTANCES.values())], rows, _mean_is_strong, meanings))
    if between := set_distances(inspection.pairs):
        parts.append("<h3>Between the two sets</h3>")
        parts.append(page.text_table((), [(f"{value:.4f}", SET_DISTANCES[name]) for name, value in between.items()]))
    return "".join(parts)


def _cards(inspection: Inspection, names: dict[Path, str], by_path: dict[Path, Pair], pictures: int) -> str:
    chosen = shown(inspection, pictures)
    rest = len(inspection.clips) - len(chosen)
    parts = ["<h2>Clips</h2>"]
    if rest:
        which = "farthest from their references" if by_path else "first"
        parts.append(f'<p class="note">The {len(chosen)} {which}; {rest} more are in the tables.</p>')
    room = MOST_FILM
    for clip in chosen:
        pair = by_path.get(clip.path)
        width, height = clip.size
        caption = f"{clip.frames} frames of {width}x{height}, {clip.fps:g} per second."
        if pair is not None:
            caption += f" Findings: {'; '.join(pair.findings) or 'as the reference'}."
        png = figures.clip_card(clip, pair.reference if pair else None)
        prompt = html.escape(inspection.prompts.get(clip.path, ""))
        parts.append(f"<h3>{html.escape(names[clip.path])}</h3>")
        films = _films(clip, pair, room)
        room -= sum(len(content) for _, _, content in films)
        parts.append(f"<p>{prompt}</p>" if prompt else "")
        parts.append(page.beside(films) if films else "")
        parts.append(page.figure(png, caption))
    return "".join(parts)


def _films(clip: Measurement, pair: Pair | None, room: int) -> list[tuple[str, str, bytes]]:
    """The clip and its reference as a browser plays them; none where it plays one of them not, or `room` is over."""
    sides = [("clip", clip)] if pair is None else [("clip", clip), ("reference", pair.reference)]
    if any(m.path.suffix.lower() not in FILMS or m.path.is_dir() for _, m in sides):
        return []
    if sum(m.path.stat().st_size for _, m in sides) > room:
        return []
    if any(m.path.suffix.lower() == ".mp4" and unplayable(m.path) for _, m in sides):
        return []
    return [(side, FILMS[m.path.suffix.lower()], m.path.read_bytes()) for side, m in sides]


def _mean_is_strong(row: Sequence[str]) -> str:
    return "strong" if row[0] == "mean" else ""


def _clip_entry(clip: Measurement, pair: Pair | None, matrices: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "kind": clip.kind,
        "frames": clip.frames,
        "width": clip.size[0],
        "height": clip.size[1],
        "fps": clip.fps,
        "values": clip.values,
        "curves": clip.curves,
    }
    if matrices:
        entry |= {"cosine_matrix": _rounded(clip.cosine), "spearman_matrix": _rounded(clip.spearman)}
    if pair is not None:
        distances = {name: value if math.isfinite(value) else None for name, value in pair.distances.items()}
        entry["reference"] = {
            "path": str(pair.reference.path),
            "values": pair.reference.values,
            "distances": distances,
            "findings": pair.findings,
        }
    return entry


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in matrix.tolist()]


def _statistics(values: Sequence[dict[str, float]], name: str) -> dict[str, float | None] | None:
    """Mean and standard deviation of the finite values, and how many they are; None where there is none."""
    present = [v[name] for v in values if name in v and math.isfinite(v[name])]
    if not present:
        return None
    mean, std = mean_and_std(present)
    return {"mean": mean, "std": std, "count": len(present)}


def _cell(value: float | None, column: Column) -> str:
    return "–" if value is None else f"{round(value, column.digits) + 0.0:.{column.digits}f}"  # + 0.0: no minus zero


def _spread(found: dict[str, float | None] | None, column: Column) -> str:
    if found is None:
        return "–"
    std = found["std"]
    return _cell(found["mean"], column) + ("" if std is None else f" ±\u00a0{std:.{column.digits}f}")
