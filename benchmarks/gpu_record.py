"""The record of ``benchmarks.gpu_suite``: one file, complete at every moment, and the pages made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.roofline import EVERY_SHAPE, required_bytes
from codmd.atomic import replacing

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent

PARTS = {
    "triton": "triton_ms",
    "cuda": "cuda_ms",
    "eager": "eager_ms",
    "compiled": "compiled_ms",
    "launches": "launches",
    "extra": "extra_mb",
    "autotuned": "autotuned_ms",
}
"""The parts of a row, in the order in which they are measured, and the key of each one's value."""

RIVALS = {
    "eager": "eager_ms", "compiled": "compiled_ms", "max-autotune": "autotuned_ms", "CUDA extension": "cuda_ms"
}  # fmt: skip
"""What stands beside the Triton kernels."""


def is_done(row: Row, part: str) -> bool:
    """Whether a part has a value, or a reason why not."""
    return PARTS[part] in row or f"{part}_missing" in row


def sources() -> str:
    """A digest of the code that is measured."""
    found = hashlib.sha256()
    for folder in ("kernels", "csrc", "codmd/ops"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".inl"):
                found.update(path.read_bytes())
    return found.hexdigest()[:12]


class Record:
    """``gpu.json``: read if it is there, written whole by a rename at every change.

    Raises:
        SystemExit: the file is of another device, other versions or other sources.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = identity | {"seconds": 0.0, "copy_tb_s": None, "checks": [], "timings": []}
        if path.exists():
            kept = json.loads(path.read_text())
            for key in identity.keys() - {"date"}:
                if kept.get(key) != identity[key]:
                    raise SystemExit(f"{path} has {key} {kept.get(key)!r}, here it is {identity[key]!r}; another --out")
            self.found = kept
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        with replacing(self.path) as partial:
            partial.write_text(json.dumps(self.found, indent=2) + "\n")

    def take(self, task: str | list[str], found: dict[str, Any] | None) -> None:
        """Keeps the result of a check (a name), of the copy, or of a part of a row (operator, shape, part)."""
        if found is None:
            return
        if task == "copy":
            self.found |= found
        elif isinstance(task, str):
            self.found["checks"].append({"name": task, **found})
        else:
            self.row(*task[:2]).update(found)
        for row in self.found["timings"]:
            _complete(row, self.found["copy_tb_s"])
        self.write()

    def failed(self, task: str | list[str], reason: str) -> None:
        """Keeps why a task has no result."""
        check = {"passed": False, "detail": reason}
        self.take(task, check if isinstance(task, str) else {f"{task[2]}_missing": reason})

    def row(self, op: str, shape: str) -> Row:
        """The row of an operator and a shape, new if there was none."""
        rows: list[Row] = self.found["timings"]
        for row in rows:
            if (row["op"], row["shape"]) == (op, shape):
                return row
        rows.append({"op": op, "shape": shape})
        return rows[-1]


def _complete(row: Row, copy_tb_s: float | None) -> None:
    """Adds the bandwidth that a time means."""
    if row.get("triton_ms"):
        required = required_bytes(row["op"], EVERY_SHAPE[row["shape"]])
        row["gb_s"] = required / row["triton_ms"] * 1e-6
        if copy_tb_s:
            row["percent_of_copy"] = 100 * required / (copy_tb_s * 1e12 * row["triton_ms"] * 1e-3)


def write_pages(results: dict[str, Any], folder: Path) -> None:
    """``gpu.md`` and, with matplotlib, ``gpu.png``."""
    with replacing(folder / "gpu.md") as partial:
        partial.write_text(markdown(results))
    plot(results, folder / "gpu.png")


def summary(results: dict[str, Any]) -> str:
    """The last lines that the command prints, and the head of the Markdown file."""
    checks = results["checks"]
    failed = [check for check in checks if check["passed"] is False]
    unknown = [check for check in checks if check["passed"] is None]
    lines = [
        f"{results['device']}, torch {results['torch']}, triton {results['triton']}, {results['seconds']:.0f} s",
        f"checks: {len(checks) - len(failed) - len(unknown)} passed, {len(failed)} failed, {len(unknown)} unfinished",
        *(f"  FAILED {check['name']}: {check['detail']}" for check in failed),
    ]
    if results["copy_tb_s"]:
        lines.append(f"copy ceiling: {results['copy_tb_s']:.2f} TB/s")
    for row in results["timings"]:
        lines.append(_line(row))
        lines += [f"    no {part}: {row[f'{part}_missing']}" for part in PARTS if f"{part}_missing" in row]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row.get("triton_ms") is None:
        return f"  {row['op']} {row['shape']}: no time of the Triton kernels"
    shown = [f"{row['triton_ms'] * 1e3:8.1f} us"]
    for key, words in (("percent_of_copy", "{:5.1f} % of copy"), ("launches", "{} launches")):
        shown += [words.format(row[key])] * (key in row)
    rivals = [f"{row[key] / row['triton_ms']:.1f}x {name}" for name, key in RIVALS.items() if row.get(key)]
    return f"  {row['op']:<24} {row['shape']:<24} {'  '.join([*shown, ', '.join(rivals)])}"


COLUMNS = (
    ("ms", "triton_ms", 4), ("eager", "eager_ms", 4), ("compiled", "compiled_ms", 4),
    ("max-autotune", "autotuned_ms", 4), ("CUDA", "cuda_ms", 4), ("GB/s", "gb_s", 0),
    ("% of copy", "percent_of_copy", 1), ("launches", "launches", 0), ("extra MB", "extra_mb", 2),
    ("SM MHz", "triton_sm_mhz", 0),
)  # fmt: skip


def cells(row: Row, columns: Iterable[tuple[str, str, int]] = COLUMNS) -> str:
    """The values of a row's columns, empty where there is none."""
    values = [(row.get(key), digits) for _, key, digits in columns]
    return " | ".join("" if value is None else f"{value:.{digits}f}" for value, digits in values)


def markdown(results: dict[str, Any]) -> str:
    """The page of a record."""
    head = f"| operator | shape | {' | '.join(name for name, _, _ in COLUMNS)} |"
    rows = [f"| {row['op']} | {row['shape']} | {cells(row)} |" for row in results["timings"]]
    return "\n".join(["```", summary(results), "```", "", head, "|---" * (len(COLUMNS) + 2) + "|", *rows]) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Percent of the copy ceiling by operator and shape; nothing without matplotlib or times."""
    timed = [row for row in results["timings"] if row.get("percent_of_copy")]
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    if not timed:
        return
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(timed) + 1.5))
    labels = [f"{row['op']}  {row['shape']}" for row in timed]
    axes.barh(labels, [row["percent_of_copy"] for row in timed], color="#4878a8")
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("percent of the copy ceiling")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
