"""Forward and backward of the CoDMD objective on the CPU: the unfused eager composition against ``codmd_loss``.

    python -m benchmarks.codmd_cpu [--threads N] [--rounds N] [--shapes NAME ...] [--out DIR]

The composition is what a training step around Self-Forcing's loss does: x0 from three velocities in float64,
guidance, norm, ``nan_to_num``, the squared error in float64, and the relation loss as it is usually written
(benchmarks/baselines.py). Every case first passes its accuracy gate against float64, then both sides run interleaved
in this process on the same threads; medians are printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import accuracy
from benchmarks.baselines import eager_relation_loss
from benchmarks.shapes import SHAPES
from codmd import ops, reference
from codmd.ops.backends import cpp
from codmd.ops.gradient_memory import release_gradient_memory

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
GUIDANCE, RELATION_WEIGHT = 3.5, 0.1
Scores = dict[str, Tensor]


@dataclass
class Case:
    """One row of the table; times in milliseconds, memory in bytes beyond the inputs."""

    shape: str
    dtype: str
    eager_ms: float
    codmd_ms: float
    loss_error: float
    gradient_error: float
    eager_loss_error: float
    eager_gradient_error: float
    extra_bytes: int
    latent_bytes: int

    @property
    def speed_up(self) -> float:
        return self.eager_ms / self.codmd_ms


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Scores]:
    """The student; velocities, x_t and sigma around a clean latent, the critic a tenth off the teacher."""
    generator = torch.Generator().manual_seed(0)
    clean, noise, student, critic, uncond = (torch.randn(shape, generator=generator) for _ in range(5))
    sigma = 0.2 + 0.6 * torch.rand(shape[0], generator=generator)
    level = sigma.reshape(-1, 1, 1, 1, 1)
    velocity = noise - clean
    scores = {
        "fake": velocity + 0.1 * critic,
        "real": velocity,
        "real_uncond": velocity + 0.3 * uncond,
        "noisy": (1 - level) * clean + level * noise,
    }
    return student.to(dtype).requires_grad_(), {n: v.to(dtype) for n, v in scores.items()} | {"sigma": sigma}


def x0_in_float64(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    level = sigma.double().reshape(-1, 1, 1, 1, 1)
    return (noisy.double() - level * velocity.double()).to(velocity.dtype)


def eager(student: Tensor, scores: Scores) -> Tensor:
    """The composition, in the dtypes in which training code runs it."""
    with torch.no_grad():
        fake, cond, uncond = (
            x0_in_float64(scores["noisy"], scores[name], scores["sigma"]) for name in ("fake", "real", "real_uncond")
        )
        real = cond + (cond - uncond) * GUIDANCE
        norm = torch.abs(student - real).mean(dim=[1, 2, 3, 4], keepdim=True)
        direction = torch.nan_to_num((fake - real) / norm)
    wide = student.double()
    dmd = 0.5 * F.mse_loss(wide, (wide - direction.double()).detach())
    return dmd + RELATION_WEIGHT * eager_relation_loss(student, real, fake)


def fused(student: Tensor, scores: Scores) -> Tensor:
    loss = ops.codmd_loss(
        student, **scores, guidance=GUIDANCE, relation_weight=RELATION_WEIGHT, prediction="flow", backend="cpp"
    )
    assert isinstance(loss, Tensor)
    return loss


def plain(student: Tensor, scores: Scores) -> Tensor:
    """The reference of the fused operator, in the compute dtype of its inputs."""
    options = {"noisy": scores["noisy"], "sigma": scores["sigma"]}
    names = {name: scores[name] for name in ("fake", "real", "real_uncond")}
    dmd = reference.dmd_loss(student, **names, guidance=GUIDANCE, prediction="flow", **options)
    wide = reference.compute_dtype(student.dtype)
    noisy, fake, cond, uncond = (scores[name].to(wide) for name in ("noisy", "fake", "real", "real_uncond"))
    fake, real = (
        reference.x0_from_flow(noisy, velocity, scores["sigma"])
        for velocity in (fake, reference.guided(cond, uncond, GUIDANCE))
    )
    return dmd + RELATION_WEIGHT * reference.relation_loss(student, real, fake)[0]


def gradient_of(loss: Callable[..., Tensor], student: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, scores)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def gate(student: Tensor, scores: Scores) -> tuple[tuple[float, float], tuple[float, float]]:
    """Relative errors (loss, gradient) of ``fused`` and of ``eager`` against the float64 reference.

    Raises:
        RuntimeError: an error of ``fused`` exceeds twice that of the reference in the latents' own dtype plus 1e-6.
    """
    truth = gradient_of(plain, student.double(), {name: value.double() for name, value in scores.items()})

    def errors(loss: Callable[..., Tensor]) -> tuple[float, float]:
        value, gradient = gradient_of(loss, student, scores)
        return accuracy.relative_error(value, truth[0]), accuracy.relative_error(gradient, truth[1])

    found, usual = errors(fused), errors(plain)
    if any(mine > 2 * yard + 1e-6 for mine, yard in zip(found, usual, strict=True)):
        raise RuntimeError(f"accuracy gate failed: errors {found} exceed twice {usual}, so no time is reported")
    return found, errors(eager)


def step(loss: Callable[..., Tensor], student: Tensor, scores: Scores) -> float:
    """Seconds of one forward and backward."""
    student.grad = None
    start = time.perf_counter()
    loss(student, scores).backward()
    return time.perf_counter() - start


def medians(student: Tensor, scores: Scores, rounds: int) -> tuple[float, float]:
    """Median milliseconds of the composition and of the fused loss over interleaved blocks of three steps.

    The first step of a block is not counted: it pays for the caches and the heap that the other side left behind.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for taken, loss in zip(times, (eager, fused), strict=True):
            taken += [step(loss, student, scores) for _ in range(3)][1:]
    return 1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1])


def print_extra_bytes(shape: str, dtype: str, threads: int) -> None:
    """Body of a fresh process: what a fused step needs beyond its inputs, the gradient included."""
    torch.set_num_threads(threads)
    student, scores = inputs(SHAPES[shape], DTYPES[dtype])
    growth = []
    for _ in range(5):
        step(fused, student, scores)
        student.grad = None
        release_gradient_memory()
        gc.collect()
        growth.append(accuracy.peak_growth(lambda: step(fused, student, scores)))
    print(min(growth))


def extra_bytes(shape: str, dtype: str, threads: int) -> int:
    code = f"from benchmarks.codmd_cpu import print_extra_bytes as run; run({shape!r}, {dtype!r}, {threads})"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    folder = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout)


def measure(name: str, dtype: str, rounds: int) -> Case:
    """Gate, times, memory."""
    student, scores = inputs(SHAPES[name], DTYPES[dtype])
    found, usual = gate(student, scores)
    eager_ms, codmd_ms = medians(student, scores, rounds)
    extra = extra_bytes(name, dtype, torch.get_num_threads())
    return Case(name, dtype, eager_ms, codmd_ms, *found, *usual, extra, student.nbytes)


def table(cases: list[Case]) -> str:
    head = (
        f"{'shape':<20} {'dtype':<9} {'eager ms':>9} {'codmd ms':>9} {'speed-up':>9} {'extra memory':>22} "
        f"{'loss err':>9} {'(eager)':>9} {'grad err':>9} {'(eager)':>9}"
    )
    rows = [
        f"{c.shape:<20} {c.dtype:<9} {c.eager_ms:9.2f} {c.codmd_ms:9.3f} {c.speed_up:8.1f}x "
        f"{c.extra_bytes / 2**20:8.2f} MiB ={c.extra_bytes / c.latent_bytes:5.2f} lat. "
        f"{c.loss_error:9.1e} {c.eager_loss_error:9.1e} {c.gradient_error:9.1e} {c.eager_gradient_error:9.1e}"
        for c in cases
    ]
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["wan-480p"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="write codmd_cpu.json here")
    arguments = parser.parse_args()
    if cpp.load_error:
        parser.exit(1, f"{cpp.load_error}\n")
    torch.set_num_threads(arguments.threads)

    cases = [measure(name, dtype, arguments.rounds) for name in arguments.shapes for dtype in arguments.dtypes]
    isa = cpp._C.active_isa()
    machine = f"{accuracy.processor()}, {arguments.threads} threads, {isa}, torch {torch.__version__}"
    print(f"{machine}\n{table(cases)}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        rows = [asdict(c) | {"speed_up": c.speed_up} for c in cases]
        report = {"machine": machine, "system": platform.platform(), "rounds": arguments.rounds, "cases": rows}
        (arguments.out / "codmd_cpu.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
