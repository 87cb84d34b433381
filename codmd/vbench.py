"""Scores VBench results as published, beside the published totals of CoDMD, DMD, rCM and the teacher.

Each RESULTS is one model: a results file of VBench, or a folder whose *.json files hold that model's dimensions.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from codmd.cli import CommandError
from codmd.files import read_json, short_names, write_whole

HELP = "score VBench results: quality, semantic and total, beside the published totals"


@dataclass(frozen=True)
class Dimension:
    """How one dimension enters the total: normalised by (x - low) / (high - low), then weighted in its group.

    Its average is a mean cosine of two features, which may be negative, or else a share from 0 to 1.
    """

    low: float
    high: float
    group: str
    weight: float = 1.0
    cosine: bool = False


DIMENSIONS = {
    "subject_consistency": Dimension(0.1462, 1.0, "quality", cosine=True),
    "background_consistency": Dimension(0.2615, 1.0, "quality", cosine=True),
    "temporal_flickering": Dimension(0.6293, 1.0, "quality"),
    "motion_smoothness": Dimension(0.706, 0.9975, "quality"),
    "dynamic_degree": Dimension(0.0, 1.0, "quality", weight=0.5),
    "aesthetic_quality": Dimension(0.0, 1.0, "quality"),
    "imaging_quality": Dimension(0.0, 1.0, "quality"),
    "object_class": Dimension(0.0, 1.0, "semantic"),
    "multiple_objects": Dimension(0.0, 1.0, "semantic"),
    "human_action": Dimension(0.0, 1.0, "semantic"),
    "color": Dimension(0.0, 1.0, "semantic"),
    "spatial_relationship": Dimension(0.0, 1.0, "semantic"),
    "scene": Dimension(0.0, 0.8222, "semantic"),
    "appearance_style": Dimension(0.0009, 0.2855, "semantic", cosine=True),
    "temporal_style": Dimension(0.0, 0.364, "semantic", cosine=True),
    "overall_consistency": Dimension(0.0, 0.364, "semantic", cosine=True),
}
"""The sixteen dimensions with the constants of VBench's own score (Huang et al., CVPR 2024)."""

ROUNDING = 1e-5
"""How far a float32 cosine of equal vectors may exceed 1."""

QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1

PUBLISHED = (
    ("Wan2.1 1.3B teacher, 50x2 evaluations", 83.69),
    ("rCM 1.3B, 4 steps", 82.81),
    ("DMD 1.3B, 4 steps", 83.38),
    ("CoDMD 1.3B, 4 steps", 84.46),
    ("rCM 14B, 4 steps", 84.05),
    ("DMD 14B, 4 steps", 83.81),
    ("CoDMD 14B, 4 steps", 84.87),
)
"""Totals in percent, arXiv 2606.21982."""

NOTE = """\
Published totals: arXiv 2606.21982, which reports a dynamic degree of 71.11 for DMD and 86.11 for CoDMD.
A frozen video scores 1.0 on temporal flickering: read the total beside the dynamic degree."""


@dataclass(frozen=True)
class Score:
    """Scores of one model in percent."""

    quality: float
    semantic: float
    total: float
    dynamic_degree: float


def score(averages: Mapping[str, float]) -> Score:
    """The published score of a model.

    Args:
        averages: the sixteen dimensions' averages as VBench writes them: cosines in [-1, 1], but for rounding, and
            shares in [0, 1].

    Raises:
        ValueError: dimensions are unknown (with the name that may be meant), missing (all are named), not finite or
            outside their range.
    """
    check_names(averages)
    if missing := [name for name in DIMENSIONS if name not in averages]:
        raise ValueError(f"lacks {len(missing)} of the {len(DIMENSIONS)} dimensions: {', '.join(missing)}")
    for name, value in averages.items():
        cosine = DIMENSIONS[name].cosine
        low, high = (-1 - ROUNDING, 1 + ROUNDING) if cosine else (0, 1)
        if not low <= value <= high:  # false for NaN
            expected = "a mean cosine, from -1 to 1" if cosine else "a share, from 0 to 1 and not in percent"
            raise ValueError(f"{name}: got {value!r}; expected {expected}, as VBench writes it")
    quality, semantic = (_group_score(averages, group) for group in ("quality", "semantic"))
    total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return Score(100 * quality, 100 * semantic, 100 * total, 100 * averages["dynamic_degree"])


def check_names(names: Iterable[str]) -> None:
    """Refuses what is no dimension of VBench.

    Raises:
        ValueError: every unknown name, with the dimension that it resembles.
    """
    unknown = []
    for name in names:
        if name not in DIMENSIONS:
            close = difflib.get_close_matches(name.lower(), DIMENSIONS, n=1)
            unknown.append(f"{name!r}, do you mean {close[0]}?" if close else repr(name))
    if unknown:
        raise ValueError(f"holds unknown dimensions: {'; '.join(unknown)} (VBench has {', '.join(DIMENSIONS)})")


def normalised(name: str, average: float) -> float:
    """(x - low) / (high - low) of one dimension; not clipped, as in the published score."""
    dimension = DIMENSIONS[name]
    return (average - dimension.low) / (dimension.high - dimension.low)


def read_results(path: Path) -> dict[str, float]:
    """Averages by dimension from a VBench results file {dimension: [average, per video]}, or a folder of them.

    Spaces in names count as underscores. Two files of a folder may repeat a dimension only with the same average.

    Raises:
        ValueError: the file or folder is missing, holds no results, or is not in that format; names the file.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir():
        files = sorted(path.glob("*_eval_results.json")) or sorted(path.glob("*.json"))
    else:
        files = [path]
    averages: dict[str, float] = {}
    for file in files:
        for name, average in _read_file(file).items():
            if name in averages and averages[name] != average:
                raise ValueError(f"{file}: {name} is {average}, another file of {path} says {averages[name]}")
            averages[name] = average
    if not averages:
        raise ValueError(f"{path}: holds no VBench results; expected *_eval_results.json files")
    return averages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd vbench`."""
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="results file or folder of one model")
    parser.add_argument("--dimensions", action="store_true", help="print every dimension too, raw and normalised")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores to FILE as well")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit status.

    Raises:
        CommandError: some results cannot be scored; every one is named with its reason, and nothing is written.
    """
    averages, scores, problems = {}, {}, []
    for path, name in zip(args.results, short_names(args.results), strict=True):
        try:
            averages[name] = read_results(path)
            scores[name] = score(averages[name])
        except ValueError as error:
            text = str(error)
            problems.append(text if text.startswith(str(path)) else f"{path}: {text}")
    if problems:
        advice = "\n  One model's files, one a dimension, belong in one folder: give the folder."
        raise CommandError("\n  ".join(problems) + (advice if any("lacks" in p for p in problems) else ""))
    if args.json is not None:
        report = {name: {**asdict(s), "dimensions": averages[name]} for name, s in scores.items()}
        write_whole(args.json, json.dumps(report, indent=1))
    print(table(scores))
    if args.dimensions:
        print(f"\n{dimension_table(averages)}")
    print(f"\n{NOTE}")
    return 0


def table(scores: Mapping[str, Score]) -> str:
    """Totals of the given models and of the published ones, in percent, as aligned text."""
    rows = [["", "total", "quality", "semantic", "dynamic degree"]]
    for name, s in scores.items():
        rows.append([name, *(f"{v:.2f}" for v in (s.total, s.quality, s.semantic, s.dynamic_degree))])
    return _aligned(rows + [[f"published: {name}", f"{total:.2f}", "-", "-", "-"] for name, total in PUBLISHED])


def dimension_table(averages: Mapping[str, Mapping[str, float]]) -> str:
    """Every dimension in percent, "raw (normalised)", one column a model."""
    rows = [["", *averages]]
    for name in DIMENSIONS:
        cells = [f"{100 * a[name]:.2f} ({100 * normalised(name, a[name]):.2f})" for a in averages.values()]
        rows.append([name.replace("_", " "), *cells])
    return _aligned(rows)


def _group_score(averages: Mapping[str, float], group: str) -> float:
    members = {name: d for name, d in DIMENSIONS.items() if d.group == group}
    weighted = math.fsum(d.weight * normalised(name, averages[name]) for name, d in members.items())
    return weighted / math.fsum(d.weight for d in members.values())


def _read_file(path: Path) -> dict[str, float]:
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected {{dimension: [average, per video]}}")
    averages: dict[str, float] = {}
    for written, value in content.items():
        average = value[0] if isinstance(value, list) and value else None
        if isinstance(average, bool) or not isinstance(average, int | float):
            raise ValueError(f"{path}: {written!r} is not [average, per video]; is this a results file of VBench?")
        name = written.replace(" ", "_")
        if name in averages and averages[name] != average:
            raise ValueError(f"{path}: {name} is there twice, as {averages[name]} and {average}")
        try:
            averages[name] = float(average)
        except OverflowError as error:
            raise ValueError(f"{path}: {written!r} has an integer too large for a number") from error
    try:
        check_names(averages)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return averages


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
