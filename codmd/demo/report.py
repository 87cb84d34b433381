"""Writes the demo's folder: PNGs, results.json and a self-contained report.html."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from . import figures
from .study import Study
from .summary import COLUMNS, Summary, difference_table, table, verdict

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
    definitions = "".join(
        f"<dt>{html.escape(c.title)}</dt><dd>{html.escape(c.explanation)}.</dd>" for c in COLUMNS.values()
    )
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items())
    few = summary.student_steps
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>codmd demo</title><style>{STYLE}</style></head><body><main>
<h1>Distilling a {summary.evaluations["teacher"]}-step teacher into {few} step{"s" if few > 1 else ""}</h1>
<p class="verdict">{html.escape(verdict(summary))}</p>
{_figure(folder, "demo")}
<h2>What was measured</h2>
{_html_table(*table(summary))}
<p class="note">Mean ± standard deviation over seeds {", ".join(map(str, summary.seeds))}. Lower is better, except the
std ratio, which should be 1. Fresh data against data is the floor that sampling noise leaves. DMD and CoDMD students
have the same network, so their sampling time is one measurement.</p>
{_html_table(*difference_table(summary))}
<p class="note">Paired by seed: same initial weights, same noise, same data; mean ± standard error. Where the term does
not help, the table says so.</p>
{_figure(folder, "measures")}
<h2>Relations</h2>{_figure(folder, "relations")}
<h2>Samples</h2>{_figure(folder, "trajectories")}
<h2>Motion</h2>{_figure(folder, "speeds")}
<h2>Training</h2>{_figure(folder, "curves")}
<h2>The measures</h2><dl>{definitions}</dl>
<h2>The experiment</h2>
<p>Arc video: eight frames of six channels. A scene is a random plane with an offset; a video is a point moving on that
scene's circle with a random phase at one of six angular speeds. The teacher is a residual network trained by flow
matching. Student and critic start as the teacher; each cycle is one student update (exit step drawn first, the
student's own trajectory up to it, DMD + λ · relation) and several critic updates (flow matching on the student's
samples). DMD and CoDMD differ in λ alone.</p>
<table class="settings">{rows}</table>
</main></body></html>
"""


STYLE = """
body{margin:0;background:#f6f7f9;color:#202124;font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.5rem 2rem 4rem;background:#fff;box-shadow:0 0 24px #0001}
h1{font-size:1.8rem;margin:0 0 .5rem}h2{font-size:1.2rem;margin:2.4rem 0 .6rem}
.verdict{font-size:1.1rem;padding:.8rem 1.1rem;border-left:4px solid #d1495b;background:#fdf3f4;margin:.8rem 0 1.4rem}
figure{margin:1rem 0}figure img{width:100%;height:auto}figcaption,.note{color:#5f6368;font-size:.86rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .6rem;text-align:right;border-bottom:1px solid #e8eaed}
th{font-weight:600;color:#5f6368;vertical-align:bottom}td:first-child,th:first-child{text-align:left}
tr.codmd td{background:#fdf3f4;font-weight:600}tr.floor td{color:#80868b}
.settings td{text-align:left}.settings td:first-child{color:#5f6368;width:14rem}
dt{font-weight:600}dd{margin:0 0 .5rem;color:#5f6368}
"""


def _figure(folder: Path, name: str) -> str:
    image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
    caption = html.escape(CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption></figure>'
    )


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        kind = "codmd" if row[0].startswith("CoDMD") else "floor" if row[0].startswith("fresh") else ""
        body += f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
