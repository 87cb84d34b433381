"""Everything that only a GPU can tell, in one command: ``python -m benchmarks.gpu_suite [--out DIR] [--dry-run]``.

First the kernels against float64 on the device, bit-for-bit repeatability, CUDA-graph capture and replay (also of two
graphs at once), streams other than the default, and compute-sanitizer where it is installed. Then times: inputs
rotated through more memory than the L2 cache holds, inside one CUDA graph, median of its replays, beside the eager and
the ``torch.compile``d baseline and, where built, the CUDA extension. A case that fails its accuracy gate gets no time.
Writes ``gpu.json``, ``gpu.md`` and ``gpu.png``; ``python -m benchmarks.roofline --results DIR/gpu.json`` fills
docs/performance.md. ``--dry-run`` runs the checks on tiny latents through Triton's CPU interpreter and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

DEADLINE_S = 7 * 60
SANITIZERS = ("memcheck", "racecheck")


def sanitizer_runs(out: Path) -> list[dict[str, Any]]:
    """compute-sanitizer over the correctness cases on small latents; empty where the tool is missing."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return []
    found = []
    for check in SANITIZERS:
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_suite"]
        try:
            run = subprocess.run([*command, "--sanitized"], capture_output=True, text=True, timeout=100, check=False)
            passed, tail = run.returncode == 0, (run.stdout + run.stderr)[-2000:]
        except subprocess.TimeoutExpired:
            passed, tail = None, "not finished after 100 s"
        (out / f"sanitizer_{check}.txt").write_text(tail)
        found.append({"name": f"compute-sanitizer {check}", "passed": passed, "detail": tail.strip()[-200:]})
    return found


def parallel_checks(small: bool) -> list[dict[str, Any]]:
    """The checks in several processes: what takes their time is compiling kernels."""
    parts = max(1, min(6, (os.cpu_count() or 2) // 2))
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *["--small"] * small, "--part"]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{part}.json" for part in range(parts)]
        runs = [subprocess.Popen([*command, f"{part}/{parts}", "--out", str(file)]) for part, file in enumerate(files)]
        codes = [run.wait() for run in runs]
        found: list[dict[str, Any]] = []
        for code, file in zip(codes, files, strict=True):
            if code == 0 and file.exists():
                found += json.loads(file.read_text())
            else:
                found.append(
                    {"name": f"checks {file.stem}", "passed": False, "detail": f"the process ended with {code}"}
                )
    return found


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
    for case in results["timings"]:
        if case.get("triton_ms") is None:
            lines.append(f"  {case['op']} {case['shape']}: no time, {case['reason']}")
            continue
        versus = ", ".join(
            f"{case[key] / case['triton_ms']:.1f}x {name}"
            for name, key in (("eager", "eager_ms"), ("compiled", "compiled_ms"), ("CUDA", "cuda_ms"))
            if case.get(key)
        )
        lines.append(
            f"  {case['op']:<24} {case['shape']:<24} {case['triton_ms'] * 1e3:8.1f} us  "
            f"{case['percent_of_copy']:5.1f} % of copy  {case['launches']} launches  {versus}"
        )
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    head = "| operator | shape | ms | eager | compiled | CUDA | GB/s | % of copy | launches | extra MB |"
    lines = ["```", summary(results), "```", "", head, "|---" * 10 + "|"]
    for case in results["timings"]:
        cells = [case["op"], case["shape"]]
        for key, digits in (
            ("triton_ms", 4), ("eager_ms", 4), ("compiled_ms", 4), ("cuda_ms", 4), ("gb_s", 0),
            ("percent_of_copy", 1), ("launches", 0), ("extra_mb", 2),
        ):  # fmt: skip
            value = case.get(key)
            cells.append("" if value is None else f"{value:.{digits}f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Percent of the copy ceiling by operator and shape; nothing without matplotlib or times."""
    timed = [case for case in results["timings"] if case.get("percent_of_copy")]
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    if not timed:
        return
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(timed) + 1.5))
    labels = [f"{case['op']}  {case['shape']}" for case in timed]
    axes.barh(labels, [case["percent_of_copy"] for case in timed], color="#4878a8")
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("percent of the copy ceiling")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--dry-run", action="store_true", help="the checks, tiny, through the CPU interpreter")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device is visible to torch; --dry-run runs the checks through the interpreter")
        return 1
    from benchmarks import gpu_checks, gpu_timing

    start = time.monotonic()
    if options.part is not None:
        part, parts = map(int, options.part.split("/"))
        options.out.write_text(json.dumps(gpu_checks.run("cuda", options.small, part, parts)))
        return 0
    if options.dry_run:
        checks = gpu_checks.run("cpu", small=True)
    elif options.sanitized:
        checks = gpu_checks.run("cuda", small=True)
    else:
        checks = parallel_checks(options.small)
    if options.sanitized:
        failed = [check for check in checks if check["passed"] is False]
        print(f"{len(checks)} checks, {len(failed)} failed")
        return len(failed) > 0
    options.out.mkdir(parents=True, exist_ok=True)
    timings: list[dict[str, Any]] = []
    copy = None
    if not options.dry_run:
        copy = gpu_timing.copy_bandwidth()
        timings = gpu_timing.run(copy, start + DEADLINE_S - 120)
        checks += sanitizer_runs(options.out)
    results = {
        "device": "CPU interpreter" if options.dry_run else torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": time.monotonic() - start,
        "copy_tb_s": None if copy is None else copy / 1e12,
        "checks": checks,
        "timings": timings,
    }
    (options.out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "gpu.md").write_text(markdown(results))
    plot(results, options.out / "gpu.png")
    print(summary(results))
    return any(check["passed"] is False for check in checks)


if __name__ == "__main__":
    sys.exit(main())
