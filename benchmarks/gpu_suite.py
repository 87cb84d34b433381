"""All checks and times that need a GPU: ``python -m benchmarks.gpu_suite [--out DIR] [--dry-run]``.

Kernels against float64 on the device, bit-for-bit repeatability, CUDA-graph capture and replay (also of two graphs at
once), streams other than the default; times of every operator at every shape (``benchmarks.gpu_timing``) beside eager
PyTorch, torch.compile, torch.compile with max-autotune and, where built, the CUDA extension; compute-sanitizer, where
it is installed. A case that fails its accuracy gate gets no time.

Every result is in ``gpu.json`` as soon as it is there. The command ends after 540 s at most; the same command goes on
with what is missing, and its status is 75 until nothing is. ``gpu.md`` and ``gpu.png`` are made of that file, and
``python -m benchmarks.roofline --results DIR/gpu.json`` takes it to docs/performance.md and to the table that ``auto``
follows. ``--dry-run`` runs the checks on tiny latents through Triton's CPU interpreter and times nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import workers
from benchmarks.gpu_record import Record, sources, summary, write_pages

DEADLINE_S = 540.0
CHECKS_S, COMPILE_S, SANITIZERS_S = 150.0, 120.0, 90.0
"""What the checks and the compilers may take at most, and what is left to the sanitizers, at the end."""

SANITIZERS = ("memcheck", "initcheck")
"""racecheck watches shared memory alone, and what could race here are tickets in global memory."""

MODULE = "benchmarks.gpu_suite"


def commands(kind: str, out: Path, parts: int = 1) -> dict[str, list[str]]:
    """The children of a stage, by name."""
    common = ["--out", str(out), "--worker", kind]
    return {f"{kind}-{part}": workers.python(MODULE, *common, "--part", f"{part}/{parts}") for part in range(parts)}


def sanitizer_commands(out: Path, known: set[str]) -> dict[str, list[str]]:
    """compute-sanitizer over a few small cases whose kernels the checks have compiled; none where it is missing."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {}
    child = workers.python(MODULE, "--out", str(out), "--worker", "sanitized")
    # Each tensor in memory of its own, so that what nobody has written is seen.
    watched = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--error-exitcode", "9", "--tool"]
    names = {f"compute-sanitizer {check}": [*watched, check, *child] for check in SANITIZERS}
    return {name: command for name, command in names.items() if name not in known}


Run = Callable[[Mapping[str, Sequence[str]], float], dict[str, int]]
"""Runs commands until a time; their statuses."""


def stages(record: Record, end: float, run: Run) -> None:
    """Everything in its order: the shape that matters most, then the checks, the other shapes, the sanitizers."""
    out = record.path.parent
    parallel = max(1, min(6, (os.cpu_count() or 2) // 2))
    rows_end = end - SANITIZERS_S
    run(commands("first", out), rows_end)
    run(commands("checks", out, parallel), min(rows_end, time.monotonic() + CHECKS_S))
    run(commands("compile", out, parallel), min(rows_end, time.monotonic() + COMPILE_S))
    run(commands("rest", out), rows_end)
    for name, command in sanitizer_commands(out, {check["name"] for check in record.found["checks"]}).items():
        if run({name: command}, end).get(name) == 0:
            record.take(name, {"passed": True, "detail": ""})


def child(kind: str, out: Path, part: int, parts: int, descriptor: int) -> int:
    """A worker of ``stages``: its status."""
    import torch

    from benchmarks import gpu_checks, gpu_timing

    found = json.loads((out / "gpu.json").read_text())
    known = {check["name"] for check in found["checks"]}
    if kind == "sanitized":
        gpu_checks.sanitized()
        return 0
    report = workers.Report(descriptor)
    if kind == "interpreted":
        return workers.work(gpu_checks.tasks("cpu", True, known), report)
    if kind == "checks":
        todo: Any = gpu_checks.tasks("cuda", False, known, part, parts)
    elif kind == "compile":
        todo = gpu_timing.compilations(found["timings"], part, parts)
    else:
        todo = gpu_timing.tasks(found, kind == "first")
    return workers.work(todo, report, torch.cuda.synchronize)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--dry-run", action="store_true", help="the checks, tiny, through the CPU interpreter")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return child(options.worker, options.out, *map(int, options.part.split("/")), options.report)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device is visible to torch; --dry-run runs the checks through the interpreter")
        return 1
    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    identity = {
        "device": "CPU interpreter" if options.dry_run else torch.cuda.get_device_name(),
        "capability": None if options.dry_run else "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": sources(),
    }
    record = Record(options.out / "gpu.json", identity)
    before = record.found["seconds"]

    def take(task: workers.Task, found: Any) -> None:
        record.found["seconds"] = before + time.monotonic() - start
        record.take(task, found)

    def run(children: Mapping[str, Sequence[str]], end: float) -> dict[str, int]:
        return workers.stage(children, options.out, end, take, record.failed)

    try:
        if options.dry_run:
            run(commands("interpreted", options.out), math.inf)
        else:
            stages(record, start + DEADLINE_S, run)
    finally:
        write_pages(record.found, options.out)
    print(summary(record.found))
    if any(check["passed"] is False for check in record.found["checks"]):
        return 1
    return workers.UNFINISHED if not options.dry_run and unfinished(record) else 0


def unfinished(record: Record) -> int:
    """How many parts of rows are neither measured nor known to be impossible."""
    from benchmarks import gpu_timing

    count = len(gpu_timing.left(record.found["timings"], False))
    if count:
        print(f"{count} times are missing; the same command goes on")
    return count


if __name__ == "__main__":
    sys.exit(main())
