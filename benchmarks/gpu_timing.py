"""The times of ``benchmarks.gpu_suite``: L2-cold, rotated inputs inside one CUDA graph, median of its replays.

A row is an operator at a shape, bfloat16, forward and backward. Its parts are measured one by one: whatever becomes of
one, the others stay.
"""

from __future__ import annotations

import functools
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_checks
from benchmarks.baselines import eager_relation_loss, lean_relation_loss
from benchmarks.gpu_checks import Case, Inputs
from benchmarks.gpu_record import PARTS, Row, is_done
from benchmarks.roofline import EVERY_SHAPE, served
from benchmarks.workers import Task
from codmd import backends

OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "relation_loss": ("relation_loss", {"pool": "mean"}),
    "relation_loss, pool=None": ("relation_loss", {"pool": None}),
    "dmd_loss": ("dmd_loss", {}),
    "codmd_loss": ("codmd_loss", {"pool": "mean"}),
}
FIRST = "wan-480p"
"""The shape that is measured before all others."""

WARM_S = 0.2
"""Seconds of replays before the first that counts: clocks rise under load."""

INTERVAL_MS = 2.0
"""Least time between two events: launching a graph costs several microseconds, whatever is in it."""

INTERVALS = 15
MOST_GATED = 4e7
"""Elements of which float64 is computed; beyond, the accuracy gate takes one sample."""


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 2 GB."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.numel() * 2 / statistics.median(times)


# The operators and their baselines


def eager_dmd(student: Tensor, fake: Tensor, real: Tensor, real_uncond: Tensor) -> Tensor:
    """The DMD loss as Self-Forcing's training code writes it."""
    with torch.no_grad():
        guided = real + (real - real_uncond) * 3.5
        norm = torch.abs(student - guided).mean(dim=[1, 2, 3, 4], keepdim=True)
        direction = torch.nan_to_num((fake - guided) / norm)
    wide = student.double()
    return 0.5 * torch.nn.functional.mse_loss(wide, (wide - direction.double()).detach())


def baseline(case: Case, lean: bool) -> Callable[..., Tensor]:
    """The operator in eager PyTorch: ``lean`` is the one that torch.compile gets."""
    relation = lean_relation_loss if lean else eager_relation_loss
    pool = case.options.get("pool", "mean")

    def loss(student: Tensor, real: Tensor, fake: Tensor, real_uncond: Tensor | None = None) -> Tensor:
        if case.op == "relation_loss":
            return relation(student, real, fake, pool=pool)
        assert real_uncond is not None
        dmd = eager_dmd(student, fake, real, real_uncond)
        if case.op == "dmd_loss":
            return dmd
        return dmd + 0.1 * relation(student, real + (real - real_uncond) * 3.5, fake, pool=pool)

    return loss


COMPILE_MODES = {"compiled": "default", "autotuned": "max-autotune-no-cudagraphs"}
"""Of torch.compile; the graph around every measured call is what max-autotune would add."""


def baseline_call(case: Case, part: str) -> Callable[[Inputs], object]:
    """Forward and backward of a baseline: ``eager``, ``compiled`` or ``autotuned``."""
    loss = baseline(case, lean=part in COMPILE_MODES)
    if part in COMPILE_MODES:
        # The losses share their code, and Dynamo gives up a code that was compiled for too many of them.
        torch.compiler.reset()
        loss = torch.compile(loss, dynamic=False, fullgraph=True, mode=COMPILE_MODES[part])

    def call(made: Inputs) -> object:
        leaf = made["student"].detach().requires_grad_()
        rest = {name: value for name, value in made.items() if name != "student"}
        return gpu_checks.differentiated(loss(leaf, **rest), leaf)

    return call


# Time and memory


def sm_clock() -> subprocess.Popen[str] | None:
    """nvidia-smi, asked for the clock of this process's GPU; None where it is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    identity = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = [tool, "-i", identity, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    return subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def warm(replay: Callable[[], object], asked: subprocess.Popen[str] | None) -> int | None:
    """Replays for ``WARM_S`` and until ``asked`` has answered: the SM clock in MHz under this load."""
    end = time.monotonic() + WARM_S
    while time.monotonic() < end or (asked is not None and asked.poll() is None):
        for _ in range(10):
            replay()
        torch.cuda.synchronize()
    answer = asked.communicate()[0].strip() if asked is not None else ""
    return int(answer) if answer.isdecimal() else None


def elapsed_ms(replay: Callable[[], object], replays: int) -> float:
    """Time of some replays, one after another."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def milliseconds(call: Callable[[Inputs], object], rotated: list[Inputs]) -> tuple[float, int | None]:
    """(median time of one call, SM clock in MHz).

    The calls on all ``rotated`` inputs lie in one graph, and what each returns has memory of its own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for made in rotated[:2]:
            call(made)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(made) for made in rotated]
    clock = warm(graph.replay, sm_clock())
    replays = max(1, math.ceil(INTERVAL_MS / elapsed_ms(graph.replay, 1)))
    times = [elapsed_ms(graph.replay, replays) for _ in range(INTERVALS)]
    return statistics.median(times) / (replays * len(kept)), clock


def launches(call: Callable[[], object]) -> int:
    """Kernels, memsets and copies that one call puts on the device."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def extra_bytes(call: Callable[[], object], gradient: int) -> int:
    """Peak memory of a call beyond its inputs and its gradient."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - gradient)


@functools.lru_cache(maxsize=1)
def rotated_inputs(name: str, shape: str) -> tuple[Case, list[Inputs]]:
    """A row's case, and sets of inputs that together exceed twice the L2 cache, at least four, of one random draw."""
    op, options = OPERATORS[name]
    case = Case(op, EVERY_SHAPE[shape], torch.bfloat16, options)
    first = gpu_checks.inputs(case, "cuda")
    size = sum(v.numel() * v.element_size() for v in first.values())
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(4, min(24, 2 * cache // size + 1))
    return case, [first, *({name: value.clone() for name, value in first.items()} for _ in range(count - 1))]


def gate(case: Case, made: Inputs, backend: str) -> str:
    """Empty if the backend's loss and gradient are right; of one sample where float64 of the whole does not pay."""
    if math.prod(case.shape) > MOST_GATED:
        case = Case(case.op, (1, *case.shape[1:]), case.dtype, case.options)
        made = gpu_checks.inputs(case, "cuda")
    return gpu_checks.errors(case, made, backend)


# Rows


def measure(name: str, shape: str, part: str) -> dict[str, Any]:
    """A part of a row; ``PART_missing`` says why there is none."""
    try:
        case, rotated = rotated_inputs(name, shape)

        def ours(made: Inputs) -> object:
            return gpu_checks.gradient(case, made, "cuda" if part == "cuda" else "triton")

        if part == "launches":
            return {"launches": launches(lambda: ours(rotated[0]))}
        if part == "extra":
            return {"extra_mb": extra_bytes(lambda: ours(rotated[0]), math.prod(case.shape) * 2) / 1e6}
        call = ours
        if part not in ("triton", "cuda"):
            call = baseline_call(case, part)
        elif wrong := gate(case, rotated[0], part):
            return {f"{part}_missing": f"the accuracy gate failed: {wrong}"}
        ms, clock = milliseconds(call, rotated)
        return {f"{part}_ms": ms, f"{part}_sm_mhz": clock}
    except Exception as error:
        return {f"{part}_missing": f"{type(error).__name__}: {error}"[:300]}
    finally:
        torch.cuda.empty_cache()


def planned() -> list[tuple[str, str, str]]:
    """(operator, shape, part) of all that is to be measured, in order: one shape whole, then autotuning last."""
    shapes = [FIRST, *(shape for shape in EVERY_SHAPE if shape != FIRST)]
    parts = [part for part in PARTS if part != "cuda" or not backends._refusal("cuda", "cuda", torch.bfloat16)]
    found = [(op, s, part) for s in shapes for op in OPERATORS if served(op, EVERY_SHAPE[s]) for part in parts]
    return sorted(found, key=lambda task: task[1] != FIRST and 1 + (task[2] == "autotuned"))


def left(rows: list[Row], first: bool) -> list[tuple[str, str, str]]:
    """What of the plan has neither a value nor a reason; ``first``: of the shape that comes before all others."""
    known = {(row["op"], row["shape"]): row for row in rows}
    return [
        (op, shape, part)
        for op, shape, part in planned()
        if not is_done(known.get((op, shape), {}), part) and (not first or (shape == FIRST and part != "autotuned"))
    ]


def tasks(found: dict[str, Any], first: bool) -> Iterator[tuple[Task, Callable[[], dict[str, Any]]]]:
    """What a record lacks: the copy's bandwidth, then parts of rows; each with what measures it."""
    if found["copy_tb_s"] is None and all(check["name"] != "copy" for check in found["checks"]):
        yield "copy", lambda: {"copy_tb_s": copy_bandwidth() / 1e12}
    for task in left(found["timings"], first):
        yield list(task), functools.partial(measure, *task)


def compile_one(name: str, shape: str) -> None:
    """Fills the compilers' caches for a row."""
    case, rotated = rotated_inputs(name, shape)
    gpu_checks.gradient(case, rotated[0], "triton")
    baseline_call(case, "compiled")(rotated[0])


def compilations(rows: list[Row], part: int, parts: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every ``parts``-th row that is not measured yet."""
    waiting = sorted({(op, shape) for op, shape, piece in left(rows, False) if piece in ("triton", "compiled")})
    for op, shape in waiting[part::parts]:
        yield f"compile {op}, {shape}", functools.partial(compile_one, op, shape)
