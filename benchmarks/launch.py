"""Host time of an operator call in microseconds: ``python -m benchmarks.launch [--rounds N] [--json FILE]``.

At these sizes the kernels take microseconds, so what Python and the launcher take before a kernel starts decides the
eager speed. On a GPU the real calls are timed (tiny latents, so that the queue never fills). Without one everything
runs down to the CUDA driver, which is replaced by one that does nothing (:mod:`benchmarks.idle_cuda`), and CPU memory
is allocated instead of the GPU's: the numbers then lack what the driver and the GPU's allocator take.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHAPE = (1, 4, 4, 8, 8)
BUDGET_US = 25.0
EMPTY = "an empty autograd.Function"


class Empty(torch.autograd.Function):
    """What autograd itself takes: nothing is computed."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, total: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return total.view(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, None, None]:  # type: ignore[override]
        return ctx.gradient, None, None


def microseconds(calls: dict[str, Callable[[], object]], rounds: int, repeats: int = 40) -> dict[str, float]:
    """Least over ``rounds`` of the mean time of ``repeats`` calls: whatever else runs can only add to it.

    A round of one call is shorter than a scheduler's time slice, so that some have the core to themselves; the calls
    take turns, so that none of them gets all the quiet moments.
    """
    least = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        for _ in range(200):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            least[name] = min(least[name], (time.perf_counter() - start) / repeats * 1e6)
    return least


def measurements(rounds: int) -> dict[str, float]:
    """Microseconds a call, by name."""
    from codmd import conventions, ops
    from codmd.kernels import backend
    from codmd.ops.contract import Numbers, Objective, Relation, Upstream

    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, real, fake, uncond = (torch.randn(SHAPE, device=device, dtype=torch.bfloat16) for _ in range(4))
    leaf = student.clone().requires_grad_()
    out, one = torch.empty_like(student), torch.ones((), device=device)
    options = "bfchw", (1, 1), True, True, Numbers()
    related = Relation(student, real, fake, None, *options)
    matched = Objective(
        student, real, fake, uncond, None, None, None, None, None, None, None, None, "bfchw",
        conventions.self_forcing, False, *options[1:],
    )  # fmt: skip
    features, moments = backend.relation(related), backend.objective(matched, False)
    upstream = Upstream(one, None, None, None)
    relation = ops.relation_loss(leaf, real, fake, backend="triton")
    dmd = ops.dmd_loss(leaf, real=real, fake=fake, real_uncond=uncond, backend="triton")
    total = ops.codmd_loss(leaf, real=real, fake=fake, real_uncond=uncond, backend="triton")
    empty = Empty.apply(leaf, one, out)

    def backward(loss: Any) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss, leaf, retain_graph=True)

    calls: dict[str, Callable[[], object]] = {
        "backend.relation": lambda: backend.relation(related),
        "backend.gradient of a relation": lambda: backend.gradient(out, upstream, related, features),
        "backend.objective": lambda: backend.objective(matched, False),
        "backend.gradient of an objective": lambda: backend.gradient(out, upstream, matched, moments),
        "relation_loss, forward": lambda: ops.relation_loss(leaf, real, fake, backend="triton"),
        "relation_loss, backward": backward(relation),
        "dmd_loss, forward": lambda: ops.dmd_loss(leaf, real=real, fake=fake, real_uncond=uncond, backend="triton"),
        "dmd_loss, backward": backward(dmd),
        "codmd_loss, forward": lambda: ops.codmd_loss(leaf, real=real, fake=fake, real_uncond=uncond, backend="triton"),
        "codmd_loss, backward": backward(total),
        f"{EMPTY}, forward": lambda: Empty.apply(leaf, one, out),
        f"{EMPTY}, backward": backward(empty),
        "torch.empty": lambda: torch.empty(3, device=device),
        "student * 2 (one PyTorch operator)": lambda: student * 2,
    }
    return microseconds(calls, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=75)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    real = torch.cuda.is_available()
    if not real:
        from benchmarks.idle_cuda import IdleCuda

        torch.set_num_threads(1)
        IdleCuda()
    found = measurements(options.rounds)
    print(f"{'GPU' if real else 'idle CUDA driver, CPU memory'}; least of {options.rounds} rounds")
    for name, value in found.items():
        floor = found[f"{EMPTY}, {name.rpartition(', ')[2]}"] if "_loss, " in name else 0.0
        beyond = f", {value - floor:.1f} beyond autograd's" if floor else ""
        over = "" if value <= BUDGET_US else f", over {BUDGET_US:.0f}"
        print(f"{name:<40} {value:8.1f} us{beyond}{over}")
    if options.json is not None:
        options.json.write_text(json.dumps({"idle_driver": not real, "us": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
