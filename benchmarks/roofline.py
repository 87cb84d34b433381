"""docs/performance.md: launches, bytes and memory floors of every operator, beside what was measured.

    python -m benchmarks.roofline [--results docs/results/gpu.json] [--out docs/performance.md]

Everything but the measured columns follows from sizes and from the launches that the operators make on meta tensors.
Measured columns are filled from a results file of ``benchmarks.gpu_suite`` and are empty without one. The same file
says which backend is the fastest: ``codmd/fastest.json``, which ``auto`` follows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import attention_jvp, static_cases
from benchmarks.shapes import SHAPES
from benchmarks.traffic import codmd_bytes, relation_bytes, traffic
from codmd.kernels.launch import Launch
from codmd.kernels.limits import MOST_WHOLE

EVERY_SHAPE = SHAPES | {"wan-720p-161-frames-b8": (8, 41, 16, 90, 160)}
CEILINGS = {"H100": 3.35e12, "H200": 4.3e12}
"""Bytes a second: the H100's data sheet, and a device-to-device copy measured on an H200."""

RESULTS = Path("docs/results/gpu.json")
MODELLED = Path("docs/results/modelled.json")
PAGE_PATH = Path("docs/performance.md")
FASTEST = Path("codmd/fastest.json")

BACKWARD = ("apply_kernel", "apply_batch_kernel", "gradient_kernel")


@dataclass(frozen=True)
class Row:
    """One operator at one shape, bfloat16, forward and backward."""

    op: str
    shape: str
    required: int
    moved: int
    forward: int
    backward: int

    def floor_us(self, device: str) -> float:
        return self.required / CEILINGS[device] * 1e6


def required_bytes(op: str, shape: tuple[int, ...]) -> int:
    """Bytes that an operator must move at a shape, bfloat16, forward and backward."""
    numel = math.prod(shape)
    if op.startswith("relation_loss"):
        return relation_bytes(numel, 2, whole=op.endswith("pool=None"))
    return codmd_bytes(numel, 2, predictions=3)


def served(op: str, shape: tuple[int, ...]) -> bool:
    """Whether the kernels take an operator at a shape: whole latents of up to 128 frames and samples."""
    return not op.endswith("pool=None") or max(shape[:2]) <= MOST_WHOLE


OPERATORS: dict[str, Callable[[tuple[int, ...]], list[Launch]]] = {
    "relation_loss": static_cases.relation_launches,
    "relation_loss, pool=None": partial(static_cases.relation_launches, pool=None),
    "dmd_loss": partial(static_cases.codmd_launches, relation=False),
    "codmd_loss": static_cases.codmd_launches,
}
"""What records the launches of an operator at a shape."""


def rows() -> list[Row]:
    """Every operator at every shape."""
    found = []
    for name, shape in EVERY_SHAPE.items():
        for op, record in OPERATORS.items():
            if served(op, shape):
                launches = record(shape)
                backward = sum(launch.name in BACKWARD for launch in launches[-1:])
                moved = traffic(launches).moved
                found.append(Row(op, name, required_bytes(op, shape), moved, len(launches) - backward, backward))
    return found


def table(found: list[Row], results: dict[str, Any] | None, modelled: dict[str, Any] | None = None) -> str:
    """The page's table; measured columns empty without ``results``, modelled ones without ``modelled``."""
    measured = {(case["op"], case["shape"]): case for case in results["timings"]} if results else {}
    head = (
        "| operator | shape | launches | MB required | moved / required | floor H100 us | floor H200 us "
        "| Triton us (modelled) | CUDA us (modelled) "
        "| Triton us | CUDA us | eager us | compiled us | max-autotune us | percent of copy |"
    )
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for r in found:
        case = measured.get((r.op, r.shape), {})

        def cell(key: str, scale: float = 1.0, case: dict[str, Any] = case) -> str:
            value = case.get(key)
            return "" if value is None else f"{value * scale:.1f}"

        estimates = [(modelled or {}).get(f"{r.op}, {r.shape}, {backend}") for backend in ("triton", "cuda")]
        guesses = " | ".join("" if one is None else f"{one['estimated_us']:.1f}" for one in estimates)
        lines.append(
            f"| {r.op} | {r.shape} | {r.forward} + {r.backward} | {r.required / 1e6:.1f} "
            f"| {r.moved / r.required:.3f} | {r.floor_us('H100'):.1f} | {r.floor_us('H200'):.1f} "
            f"| {guesses} | {cell('triton_ms', 1e3)} | {cell('cuda_ms', 1e3)} | {cell('eager_ms', 1e3)} "
            f"| {cell('compiled_ms', 1e3)} | {cell('autotuned_ms', 1e3)} | {cell('percent_of_copy')} |"
        )
    return "\n".join(lines)


PAGE = """# Performance of the GPU kernels

Written by `python -m benchmarks.roofline`; do not edit. {measured}

The losses are bound by memory: what they must do is read every latent that enters once and write the gradient. The
floor is that many bytes over the device's bandwidth, {h100} TB/s (H100, data sheet) and {h200} TB/s (H200, a measured
copy). All rows are bfloat16, forward and backward, with the teacher's unconditional prediction for `dmd_loss` and
`codmd_loss`. `moved / required` counts the elements that the programs of the launched grid cover and all scratch memory
once written and once read; `tests/test_static.py` asserts at most 1.05 for everything but `pool=None` with more samples
of several frames than one program holds. The 14B model has the latents of the 1.3B model, so its rows are the same.

{table}

* Up to 32 frames and 32 samples, the relation is one launch forward: the last block of each sample computes its frame
  relation, the last sample's the batch relation. Beyond, two more launches spread the rows of the relation over
  programs: rows of G, then rows of the gradient, which need a column of G each.
* `codmd_loss` likewise, total included. With a process group: one launch before the gather and two after it.
* `pool=None` streams the latents once for the Gram matrices and once for the gradient. One relation kind, be it of
  frames (one sample) or of samples (images), is one launch and one. Frames *and* samples are two launches and one: a
  program takes all samples of its columns, whose time averages it then has in registers. That holds up to 8 samples of
  32 frames or 16 of 16, from Triton 3.8 on. Beyond, the batch term keeps the time averages in float32, 36 bytes for
  each pixel of a sample (x, r and d written and read, x read and its gradient written, that read backward) beside the
  10 bytes for each pixel of a frame: 36/(10 x frames), 0.088 at 41 frames, and one launch more. bfloat16 and float16
  are multiplied by tensor cores, exactly (kernels/README.md); float32 by IEEE FMA.
* What the compiler makes of every kernel (registers, spills, vector accesses): `python -m benchmarks.static`.
* *Modelled* columns are estimates for an H100 from the compiled code and no measurement: one warp is walked through it
  (`python -m benchmarks.latency`), without instruction-cache misses and queues, so real times are longer. They rank
  designs. Written by `python -m benchmarks.latency --table docs`; beside a measurement, `--results` prints their error.
* Host time a call: `python -m benchmarks.launch`; without a GPU down to a CUDA driver that does nothing.
* Measuring: `python -m benchmarks.gpu_suite` on a GPU writes the results file that fills the empty columns. A row whose
  accuracy gate fails shows no speed. The same file makes `codmd/fastest.json`, the table by which `auto` takes the
  faster of Triton and the CUDA extension for an operator and a size; until then Triton comes first.
* All that is to be run on a GPU, in order, whole networks included: [gpu.md](gpu.md).

## Attention with tangents

`attention_jvp` is bound by arithmetic: two products a tile of attention itself and four of its tangent, fewer where
tangents are absent. The floor is that arithmetic at {peak:.0f} TFLOP/s (H100, data sheet, dense bfloat16).
*Estimated*, for the H100, adds the softmax between the products, which nothing overlaps while a multiprocessor holds
one program (`python -m benchmarks.attention_jvp`). The kernel allocates its results and nothing else.

{attention}
"""


def page(results: dict[str, Any] | None, modelled: dict[str, Any] | None) -> str:
    where = f"Measured on {results['device']}, {results['date']}." if results else "No GPU was measured yet."
    return PAGE.format(
        measured=where,
        h100=CEILINGS["H100"] / 1e12,
        h200=CEILINGS["H200"] / 1e12,
        table=table(rows(), results, modelled),
        peak=attention_jvp.PEAK / 1e12,
        attention=attention_jvp.table(),
    )


SERVED_BY = {
    "relation_loss": ("relation_loss",),
    "whole_relation_loss": ("relation_loss, pool=None",),
    "objective": ("dmd_loss", "codmd_loss"),
}
"""Operators in ``torch.ops.codmd``, and the rows that measure them."""


def fastest(results: dict[str, Any] | None) -> dict[str, dict[str, list[tuple[float | None, str]]]]:
    """The table of ``codmd.backends``: at each measured size the backend of the least time.

    Between two sizes with different backends the limit is their geometric mean. Sizes that not both backends were timed
    at do not count, and an operator for which Triton always wins is left out: that is the order without a table.
    """
    found = {}
    for operator, ops in SERVED_BY.items():
        times: dict[int, Counter[str]] = {}
        for case in (results or {}).get("timings", ()):
            if case["op"] in ops and case.get("triton_ms") and case.get("cuda_ms"):
                at = times.setdefault(math.prod(EVERY_SHAPE[case["shape"]]), Counter())
                at.update({name: case[f"{name}_ms"] for name in ("triton", "cuda")})
        winners = [(size, min(at, key=at.__getitem__)) for size, at in sorted(times.items())]
        limits: list[tuple[float | None, str]] = []
        for (size, name), (after, other) in pairwise(winners):
            if name != other:
                limits.append((round(math.sqrt(size * after)), name))
        limits += [(None, name) for _, name in winners[-1:]]
        if any(name != "triton" for _, name in limits):
            found[operator] = limits
    return {results["capability"]: found} if results and found else {}


def load(path: Path) -> dict[str, Any] | None:
    """A file of results, if there is one."""
    return json.loads(path.read_text()) if path.exists() else None


def write_page(results: Path = RESULTS, out: Path = PAGE_PATH) -> None:
    """Write the page from the files of results that are there."""
    out.write_text(page(load(results), load(MODELLED)))
    print(f"wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="absent: measured columns stay empty")
    parser.add_argument("--out", type=Path, default=PAGE_PATH)
    options = parser.parse_args()
    write_page(options.results, options.out)
    FASTEST.write_text(json.dumps(fastest(load(options.results))) + "\n")
    print(f"wrote {FASTEST}")


if __name__ == "__main__":
    main()
