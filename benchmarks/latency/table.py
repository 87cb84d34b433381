"""Modelled cycles and estimated time of every operator, without a GPU.

    python -m benchmarks.latency [--only TEXT] [--arch sm_90] [--backend triton] [--results FILE] [--json FILE]
    python -m benchmarks.latency --table docs [--only TEXT]    # the modelled columns of docs/performance.md

The code that Triton makes, and with ``--backend cuda`` that nvcc makes of the CUDA extension, is walked by one warp
(:mod:`benchmarks.latency.walk`): one program of a launch, then the block that takes the last ticket. *Modelled* is what
the walk counts, *estimated* the time of all launches in a graph: a boundary each, one program, then either the other
waves or the bytes over the bandwidth, then the tail. It ranks designs and does not replace a measurement: no
instruction cache, no queues, warps that never disturb each other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.latency.extension import cuda_launches
from benchmarks.latency.launches import LAYOUTS, triton_launches
from benchmarks.latency.model import model, summary
from benchmarks.roofline import CEILINGS, EVERY_SHAPE, MODELLED, OPERATORS, required_bytes, served, write_page
from codmd.atomic import replacing

DEVICE = "H100"
BACKENDS = {"triton": triton_launches, "cuda": cuda_launches}


def row(op: str, shape: str, backend: str, arch: str) -> dict[str, Any]:
    """One operator at one shape, bfloat16, forward and backward."""
    launches = [model(launched, CEILINGS[DEVICE]) for launched in BACKENDS[backend](op, EVERY_SHAPE[shape], arch)]
    return summary(op, shape, backend, arch, launches, required_bytes(op, EVERY_SHAPE[shape]) / CEILINGS[DEVICE] * 1e6)


def rows(cases: list[tuple[str, str, str, str]]) -> Iterator[dict[str, Any]]:
    """Rows of (operator, shape, backend, architecture), by as many processes as there are cores."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(row, *case) for case in cases]:
            yield future.result()


HEAD = (
    "| operator, shape | backend | kernel | grid | registers | waves | program cycles (modelled) "
    "| tail cycles (modelled) | us (modelled) | instructions | barriers | dependent loads | us (estimated) | floor us "
    "| measured us | error of the estimate |"
)


def lines(found: dict[str, Any], measured: float | None) -> list[str]:
    """A line for each launch of a row, and one for all of them."""
    name = f"{found['op']}, {found['shape']} | {found['backend']} {found['arch']}"
    shown = [
        f"| {name} | `{m['kernel']}` | {m['grid']} | {m['registers']} | {m['waves']} | {m['program']:.0f} "
        f"| {m['tail']:.0f} | {(m['program'] + m['tail']) / 1755:.1f} | {m['instructions']} | {m['barriers']} "
        f"| {m['dependent_loads']} | {m['estimated_us']:.1f} | | | |"
        for m in found["launches"]
    ]
    error = "" if measured is None else f"{100 * (found['estimated_us'] / measured - 1):+.0f} %"
    total = (
        f"| {name} | **all** | | | | | {found['modelled_cycles']} | {found['modelled_us']:.1f} "
        f"| {found['modelled_instructions']} | {found['modelled_barriers']} | {found['modelled_dependent_loads']} "
        f"| **{found['estimated_us']:.1f}** | {found['floor_us']:.1f} "
        f"| {'' if measured is None else f'{measured:.1f}'} | {error} |"
    )
    return [*shown, total]


def measured_us(results: dict[str, Any] | None, found: dict[str, Any]) -> float | None:
    """The measured time of a row's backend in a results file of ``benchmarks.gpu_suite``."""
    for case in (results or {}).get("timings", ()):
        if (case["op"], case["shape"]) == (found["op"], found["shape"]):
            value = case.get(f"{found['backend']}_ms")
            return None if value is None else value * 1e3
    return None


def kept(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What docs/performance.md shows of rows, by "operator, shape, backend"."""
    return {
        f"{row['op']}, {row['shape']}, {row['backend']}": {
            "estimated_us": round(row["estimated_us"], 1),
            "modelled_cycles": row["modelled_cycles"],
            "tail_cycles": round(max(m["tail"] for m in row["launches"])),
        }
        for row in rows
    }


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of 'operator, shape', such as 'codmd_loss, wan-480p-b8'")
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=list(LAYOUTS))
    parser.add_argument("--backend", nargs="+", choices=list(BACKENDS), help="triton; all for --table docs")
    parser.add_argument(
        "--results", type=Path, help="a results file of benchmarks.gpu_suite: measured times and errors"
    )
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--table", choices=["docs"], help=f"also into {MODELLED} and docs/performance.md, of sm_90")
    options = parser.parse_args()
    docs = options.table == "docs"
    if docs and options.arch != ["sm_90"]:
        parser.error(f"--arch {' '.join(options.arch)}: docs/performance.md has sm_90")
    cases = [
        (op, shape, backend, arch)
        for op in OPERATORS
        for shape in EVERY_SHAPE
        for backend in options.backend or (list(BACKENDS) if docs else ["triton"])
        for arch in options.arch
        if options.only in f"{op}, {shape}," and served(op, EVERY_SHAPE[shape])
    ]
    if not cases:
        parser.error(f"--only {options.only!r} is part of no 'operator, shape'")
    results = json.loads(options.results.read_text()) if options.results else None
    print(HEAD, "|---" * (HEAD.count("|") - 1) + "|", sep="\n")
    shown = []
    for found in rows(cases):
        shown.append(found)
        print(*lines(found, measured_us(results, found)), sep="\n", flush=True)
        if docs:
            before = json.loads(MODELLED.read_text()) if MODELLED.exists() else {}
            with replacing(MODELLED) as partial:
                partial.write_text(json.dumps(before | kept([found]), indent=1, sort_keys=True) + "\n")
    if docs:
        write_page()
    if options.json:
        with replacing(options.json) as partial:
            partial.write_text(json.dumps({"rows": shown}, indent=1) + "\n")
    return 0
