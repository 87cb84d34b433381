"""The demo's folder: PNGs, results.json and a self-contained report.html."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from codmd import page

from . import figures
from .study import Study
from .summary import COLUMNS, TOO_SHORT, Summary, difference_table, table, verdict

CAPTIONS = {
    "demo": "Top: sample videos drawn as paths in the plane of their scene; every frame should lie on the grey circle "
    "and a path should keep its speed. Below: the mean cosine between frames, minus the data's; white is right. "
    "Right: the energy distance between frame relations, one dot a seed; the dotted line is fresh data.",
    "relations": "Mean cosine between the frames of a video (frame 1 top left), and differences.",
    "trajectories": "Sample videos of the first seed; colours are scenes.",
    "measures": "All measures. Dots are seeds, grey lines join the same seed, bars are means, the dotted line is the "
    "distance between two fresh samples of data.",
    "speeds": "Distribution of speed over all seeds; the last bin holds everything faster.",
    "curves": "Training curves: faint lines are seeds, strong ones a running mean. The last panel is the weighted "
    "relation gradient's norm over the DMD gradient's, both with respect to the student's sample.",
}


def write_report(folder: Path, study: Study) -> None:
    """Writes everything into an existing folder."""
    outcomes, summary, arc = figures.Outcomes(study.outcomes), study.summary, study.arc
    drawn = {
        "demo": figures.headline(outcomes, summary, arc),
        "relations": figures.relations(outcomes, summary),
        "trajectories": figures.trajectories(outcomes, summary, arc),
        "measures": figures.measures(outcomes, summary),
        "speeds": figures.speeds(outcomes, summary),
        "curves": figures.curves(outcomes),
    }
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", facecolor="white")
        plt.close(figure)
    (folder / "results.json").write_text(json.dumps(results(study), indent=1), "utf-8")
    (folder / "report.html").write_text(render(folder, summary, study.settings), "utf-8")


def results(study: Study) -> dict[str, Any]:
    """The content of results.json: settings, the summary, and every run's metrics and curves."""
    summary = study.summary
    differences = {
        measure: {**asdict(d), "standard_error": d.standard_error if d.pairs > 1 else None}
        for measure, d in summary.differences.items()
    }
    return {
        "verdict": verdict(summary),
        "settings": study.settings,
        "measures": {name: column.explanation for name, column in COLUMNS.items()},
        "arms": {
            arm: {
                "name": summary.name(arm),
                "network_evaluations": summary.evaluations[arm],
                "milliseconds_per_sample": summary.milliseconds[arm],
                "measures": {measure: asdict(s) for measure, s in measured.items()},
            }
            for arm, measured in summary.statistics.items()
        },
        "codmd_minus_dmd": differences,
        "runs": [
            {"arm": o.arm, "seed": o.seed, "metrics": o.metrics, "mean_frame_relation": o.relation, "curves": o.curves}
            for o in study.outcomes
        ],
    }


def render(folder: Path, summary: Summary, settings: dict[str, Any]) -> str:
    """report.html as text, with the folder's PNGs embedded."""
    meanings = [(c.title, c.explanation) for c in COLUMNS.values()]
    few = summary.student_steps
    body = f"""\
<h1>Distilling a {summary.evaluations["teacher"]}-step teacher into {few} step{"s" if few > 1 else ""}</h1>
<p class="verdict">{TOO_SHORT if settings["quick"] else html.escape(verdict(summary))}</p>
{_figure(folder, "demo")}
{f"<p class='note'>{html.escape(verdict(summary))}</p>" if settings["quick"] else ""}
<h2>What was measured</h2>
{page.table(*table(summary), _row_class, meanings)}
<p class="note">Mean ± standard deviation over seeds {", ".join(map(str, summary.seeds))}. Lower is better, except the
std ratio, which should be 1. Fresh data against data is the floor that sampling noise leaves. DMD and CoDMD students
have the same network, so their sampling time is one measurement.</p>
{page.table(*difference_table(summary), _row_class)}
<p class="note">Paired by seed: same initial weights, same noise, same data; mean ± standard error. Where the term does
not help, the table says so.</p>
{_figure(folder, "measures")}
<h2>Relations</h2>{_figure(folder, "relations")}
<h2>Samples</h2>{_figure(folder, "trajectories")}
<h2>Motion</h2>{_figure(folder, "speeds")}
<h2>Training</h2>{_figure(folder, "curves")}
<h2>The experiment</h2>
<p>Arc video: eight frames of six channels. A scene is a random plane with an offset; a video is a point moving on that
scene's circle with a random phase at one of six angular speeds. The teacher is a residual network trained by flow
matching. Student and critic start as the teacher; each cycle is one student update (exit step drawn first, the
student's own trajectory up to it, DMD + λ · relation) and several critic updates (flow matching on the student's
samples). DMD and CoDMD differ in λ alone.</p>
{page.text_table((), [(name, str(value)) for name, value in settings.items()])}"""
    return page.page("codmd demo", body)


def _figure(folder: Path, name: str) -> str:
    return page.figure((folder / f"{name}.png").read_bytes(), CAPTIONS[name])


def _row_class(row: Sequence[str]) -> str:
    return "strong" if row[0].startswith("CoDMD") else "faint" if row[0].startswith("fresh") else ""
