"""The times of ``benchmarks.gpu_suite``: L2-cold, rotated inputs inside one CUDA graph, median of its replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_checks
from benchmarks.baselines import eager_relation_loss, lean_relation_loss
from benchmarks.gpu_checks import Case, Inputs
from benchmarks.roofline import EVERY_SHAPE
from benchmarks.traffic import codmd_bytes, relation_bytes
from codmd import backends

OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "relation_loss": ("relation_loss", {"pool": "mean"}),
    "relation_loss, pool=None": ("relation_loss", {"pool": None}),
    "dmd_loss": ("dmd_loss", {}),
    "codmd_loss": ("codmd_loss", {"pool": "mean"}),
}
REPLAYS = 15
COMPILED_SHAPES = ("wan-480p", "wan-720p-161-frames-b8")
"""Where the torch.compile baseline is timed: compiling it everywhere would take longer than everything else."""


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


def milliseconds(call: Callable[[Inputs], object], rotated: list[Inputs]) -> float:
    """Median time of one call; the calls on all rotated inputs lie in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for made in rotated[:2]:
            call(made)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for made in rotated:
            call(made)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(rotated))
    return statistics.median(times)


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


def rotated_inputs(case: Case) -> list[Inputs]:
    """Sets of inputs that together exceed twice the L2 cache, at least four, of one random draw."""
    first = gpu_checks.inputs(case, "cuda")
    size = sum(v.numel() * v.element_size() for v in first.values())
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(4, min(24, 2 * cache // size + 1))
    return [first, *({name: value.clone() for name, value in first.items()} for _ in range(count - 1))]


def measure(name: str, shape: str, copy: float) -> dict[str, Any]:
    """One row; ``reason`` says why a time is missing."""
    op, options = OPERATORS[name]
    case = Case(op, EVERY_SHAPE[shape], torch.bfloat16, options)
    row: dict[str, Any] = {"op": name, "shape": shape}
    rotated = rotated_inputs(case)
    reason = "" if rotated[0]["student"].numel() > 4e7 else gpu_checks.errors(case, rotated[0], "triton")
    if rotated[0]["student"].numel() > 4e7:
        part = Case(op, (1, *case.shape[1:]), case.dtype, options)
        reason = gpu_checks.errors(part, gpu_checks.inputs(part, "cuda"), "triton")
        row["gate"] = "on one sample: float64 of the whole does not pay"
    if reason:
        return row | {"reason": f"the accuracy gate failed: {reason}"}

    def ours(made: Inputs) -> object:
        return gpu_checks.gradient(case, made, "triton")

    numel = rotated[0]["student"].numel()
    whole = options.get("pool", "mean") is None
    required = relation_bytes(numel, 2, whole) if op == "relation_loss" else codmd_bytes(numel, 2, predictions=3)
    row["triton_ms"] = milliseconds(ours, rotated)
    row["gb_s"] = required / row["triton_ms"] * 1e-6
    row["percent_of_copy"] = 100 * required / copy / (row["triton_ms"] * 1e-3)
    row["launches"] = launches(lambda: ours(rotated[0]))
    row["extra_mb"] = extra_bytes(lambda: ours(rotated[0]), numel * 2) / 1e6
    if not backends._refusal("cuda", "cuda", torch.bfloat16):
        row["cuda_ms"] = milliseconds(lambda made: gpu_checks.gradient(case, made, "cuda"), rotated)
    sides = [("eager_ms", False), *[("compiled_ms", True)] * (shape in COMPILED_SHAPES)]
    for key, compiled in sides:
        try:
            row[key] = milliseconds(differentiated(case, compiled), rotated[:4])
        except Exception as error:
            row[f"{key}_missing"] = f"{type(error).__name__}: {error}"[:200]
    return row


def differentiated(case: Case, compiled: bool) -> Callable[[Inputs], object]:
    """Forward and backward of the baseline."""
    loss = baseline(case, lean=compiled)
    if compiled:
        loss = torch.compile(loss, dynamic=False)

    def call(made: Inputs) -> object:
        leaf = made["student"].detach().requires_grad_()
        rest = {name: value for name, value in made.items() if name not in ("student", "frame_mask")}
        return torch.autograd.grad(loss(leaf, **rest), leaf)

    return call


def run(copy: float, deadline: float) -> list[dict[str, Any]]:
    """Every operator at every shape until ``deadline`` (``time.monotonic``); the rest say so."""
    first = ["wan-480p", "wan-720p-161-frames-b8"]
    order = [*first, *(name for name in EVERY_SHAPE if name not in first)]
    found = []
    for shape in order:
        for name in OPERATORS:
            if OPERATORS[name][1].get("pool", "mean") is None and max(EVERY_SHAPE[shape][:2]) > 128:
                continue
            if time.monotonic() > deadline:
                found.append({"op": name, "shape": shape, "reason": "out of time"})
                continue
            try:
                found.append(measure(name, shape, copy))
            except Exception as error:
                found.append({"op": name, "shape": shape, "reason": f"{type(error).__name__}: {error}"[:300]})
            torch.cuda.empty_cache()
    return found
