"""Forward and backward of the relation loss on the CPU: PyTorch, compiled and eager, against the C++ backend.

    python -m benchmarks.relation_cpu [--threads N] [--rounds N] [--shapes NAME ...] [--out DIR]

Every case first passes its accuracy gate against float64. Then a fresh process, whose allocator nothing else has
shaped, runs all sides interleaved on the same threads; the least time of each is printed, which other programs on the
machine disturb least. A second process measures memory. "compiled" is torch.compile of the lean loss, the rival that a
user would pick; "eager" is the loss as it is usually written, "lean" the same without the copies
(benchmarks/baselines.py). "floor" is one compiled pass that reads the three latents and writes the gradient's memory,
about the least that a loss can take: torch.compile's time over it is the most that a speed-up can be.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import accuracy, speed_bars
from benchmarks.baselines import eager_relation_loss, lean_relation_loss
from benchmarks.shapes import SHAPES
from benchmarks.speed_bars import Speed
from codmd.ops import relation_loss
from codmd.ops.backends import cpp
from codmd.ops.gradient_memory import release_gradient_memory

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DEFAULT_SHAPES = ["wan-480p", "wan-480p-b2", "wan-720p"]


@dataclass
class Case:
    """One row of the table; times in milliseconds, memory in bytes beyond the three latents."""

    shape: str
    dtype: str
    pool: str
    compiled_ms: float
    eager_ms: float
    lean_ms: float
    codmd_ms: float
    floor_ms: float
    loss_error: float
    gradient_error: float
    extra_bytes: int
    latent_bytes: int

    @property
    def most_speed_up(self) -> float:
        return self.compiled_ms / self.floor_ms

    @property
    def compiled_speed_up(self) -> float:
        return self.compiled_ms / self.codmd_ms

    @property
    def speed_up(self) -> float:
        return self.eager_ms / self.codmd_ms

    @property
    def lean_speed_up(self) -> float:
        return self.lean_ms / self.codmd_ms


def latents(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student with gradient, real, and a fake that differs from real by a hundredth."""
    generator = torch.Generator().manual_seed(0)
    student, real, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    return student.to(dtype).requires_grad_(), real.to(dtype), (real + 0.01 * noise).to(dtype)


def step(loss: Callable[..., Tensor], student: Tensor, real: Tensor, fake: Tensor, pool: str | None) -> float:
    """Seconds of one forward and backward."""
    student.grad = None
    start = time.perf_counter()
    loss(student, real, fake, pool=pool).backward()
    return time.perf_counter() - start


def codmd_loss(student: Tensor, real: Tensor, fake: Tensor, pool: Any) -> Tensor:
    loss = relation_loss(student, real, fake, pool=pool, backend="cpp")
    assert isinstance(loss, Tensor)
    return loss


COMPILER = os.environ.get("CXX", "g++")
"""What torch.compile builds its CPU code with."""


def can_compile() -> bool:
    """Whether the compiled rival can be measured here."""
    return shutil.which(COMPILER) is not None


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(lean_relation_loss, fullgraph=True, dynamic=False)


def compiled_relation_loss(student: Tensor, real: Tensor, fake: Tensor, pool: Any) -> Tensor:
    return _compiled()(student, real, fake, pool=pool)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "compiled": compiled_relation_loss,
    "eager": eager_relation_loss,
    "lean": lean_relation_loss,
    "codmd": codmd_loss,
}


@functools.cache
def _floor() -> Callable[..., None]:
    def pass_over(student: Tensor, real: Tensor, fake: Tensor, out: Tensor) -> None:
        out.copy_(student + real + fake)

    return torch.compile(pass_over, fullgraph=True, dynamic=False)


def floor_step(student: Tensor, real: Tensor, fake: Tensor, out: Tensor) -> float:
    """Seconds of one pass that reads what a loss must read, and writes what it must write."""
    leaf = student.detach()
    start = time.perf_counter()
    _floor()(leaf, real, fake, out)
    return time.perf_counter() - start


def least(inputs: tuple[Tensor, Tensor, Tensor], pool: str | None, rounds: int) -> dict[str, float]:
    """Least milliseconds of each side over interleaved blocks of four steps.

    The first step of a block is not counted: it pays for the caches and the heap that the other side left behind.
    """
    out = torch.empty_like(inputs[0], requires_grad=False)
    sides: dict[str, Callable[[], float]] = {
        **{side: functools.partial(step, loss, *inputs, pool) for side, loss in LOSSES.items()},
        "floor": functools.partial(floor_step, *inputs, out),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            times[side] += [run() for _ in range(4)][1:]
    return {side: 1e3 * min(values) for side, values in times.items()}


def extra_bytes(inputs: tuple[Tensor, Tensor, Tensor], pool: str | None) -> int:
    """What a step needs beyond the latents: the gradient and the scratch memory."""
    growth = []
    for _ in range(5):
        step(codmd_loss, *inputs, pool)
        inputs[0].grad = None
        release_gradient_memory()
        gc.collect()
        growth.append(accuracy.peak_growth(lambda: step(codmd_loss, *inputs, pool)))
    return min(growth)


def worker(task: str, shape: str, dtype: str, pool: str | None, threads: int, rounds: int) -> None:
    """Body of the measuring processes: prints a JSON value."""
    torch.set_num_threads(threads)
    inputs = latents(SHAPES[shape], DTYPES[dtype])
    print(json.dumps(least(inputs, pool, rounds) if task == "time" else extra_bytes(inputs, pool)))


def in_fresh_process(arguments: tuple[Any, ...], **environment: str) -> Any:
    code = f"from benchmarks.relation_cpu import worker; worker(*{arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def measure(shape: str, dtype: str, pool: str | None, threads: int, rounds: int) -> Case:
    """The gate, then times and memory."""
    inputs = latents(SHAPES[shape], DTYPES[dtype])
    errors = accuracy.gate(codmd_loss, *inputs, "mean" if pool else None)
    case = (shape, dtype, pool, threads, rounds)
    times = in_fresh_process(("time", *case))
    extra = in_fresh_process(("memory", *case), MALLOC_MMAP_THRESHOLD_="65536")
    return Case(
        shape, dtype, pool or "none", times["compiled"], times["eager"], times["lean"], times["codmd"], times["floor"],
        *errors, extra, inputs[0].nbytes,
    )  # fmt: skip


def table(cases: list[Case]) -> str:
    head = (
        f"{'shape':<20} {'dtype':<9} {'pool':<5} {'compiled ms':>11} {'eager ms':>9} {'lean ms':>8} {'codmd ms':>9} "
        f"{'floor ms':>9} {'vs compiled':>11} {'at most':>8} {'vs eager':>9} {'vs lean':>8} {'extra memory':>22} "
        f"{'loss err':>9} {'grad err':>9}"
    )
    rows = [
        f"{c.shape:<20} {c.dtype:<9} {c.pool:<5} {c.compiled_ms:11.2f} {c.eager_ms:9.2f} {c.lean_ms:8.2f} "
        f"{c.codmd_ms:9.3f} {c.floor_ms:9.3f} {c.compiled_speed_up:10.2f}x {c.most_speed_up:7.2f}x "
        f"{c.speed_up:8.1f}x {c.lean_speed_up:7.1f}x {c.extra_bytes / c.latent_bytes:14.3f} latents "
        f"{c.loss_error:9.1e} {c.gradient_error:9.1e}"
        for c in cases
    ]
    return "\n".join([head, *rows])


def sides(c: Case) -> dict[str, float]:
    """Milliseconds of the baselines."""
    return {"torch.compile": c.compiled_ms, "eager": c.eager_ms, "lean eager": c.lean_ms}


def speeds(cases: list[Case]) -> list[Speed]:
    """What the picture shows."""
    return [Speed(f"{c.shape}, {c.dtype}, pool {c.pool}", c.codmd_ms, sides(c)) for c in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9, help="interleaved blocks a side")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT_SHAPES)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    parser.add_argument("--pool", nargs="+", choices=["mean", "none"], default=["mean"])
    parser.add_argument("--out", type=Path, help="write relation_cpu.json and relation_cpu.png here")
    arguments = parser.parse_args()
    if cpp.load_error:
        parser.exit(1, f"{cpp.load_error}\n")
    if not can_compile():
        parser.exit(1, f"torch.compile, the first baseline, needs a C++ compiler; {COMPILER} is not on the PATH\n")
    torch.set_num_threads(arguments.threads)

    cases = [
        measure(name, dtype, None if pool == "none" else pool, arguments.threads, arguments.rounds)
        for name in arguments.shapes
        for dtype in arguments.dtypes
        for pool in arguments.pool
    ]
    machine = f"{accuracy.processor()}, {arguments.threads} threads, {cpp._C.active_isa()}, torch {torch.__version__}"
    print(f"{machine}\n{table(cases)}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        ratios = ("compiled_speed_up", "most_speed_up", "speed_up", "lean_speed_up")
        rows = [asdict(c) | {name: getattr(c, name) for name in ratios} for c in cases]
        report = {"machine": machine, "system": platform.platform(), "rounds": arguments.rounds, "cases": rows}
        (arguments.out / "relation_cpu.json").write_text(json.dumps(report, indent=2) + "\n")
        speed_bars.plot(speeds(cases), arguments.out / "relation_cpu.png", arguments.threads)


if __name__ == "__main__":
    main()
