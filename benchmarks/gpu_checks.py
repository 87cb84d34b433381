"""The checks of ``benchmarks.gpu_suite``: accuracy against float64, repeatability, graphs, streams."""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codmd import ops, reference

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One operator on one kind of latents; ``options`` are the operator's own."""

    op: str
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    options: dict[str, Any]
    masked: bool = False
    strided: bool = False

    @property
    def name(self) -> str:
        extras = [
            *(f"{k}={v}" for k, v in self.options.items()),
            *["masked"] * self.masked,
            *["strided"] * self.strided,
        ]
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')} {' '.join(extras)}".strip()


TINY = (2, 3, 2, 4, 8)
SANITIZED = [
    Case("relation_loss", TINY, torch.bfloat16, {"pool": "mean"}),
    Case("relation_loss", TINY, torch.bfloat16, {"pool": None}),
    Case("codmd_loss", TINY, torch.bfloat16, {"pool": "mean"}),
]
"""What compute-sanitizer watches: small, and compiled by the checks before."""


def cases(small: bool) -> Iterator[Case]:
    """The grid; ``small`` keeps it within the interpreter's and the sanitizer's patience."""
    grid = [
        ((1, 21, 16, 60, 104), torch.bfloat16),
        ((2, 5, 3, 7, 13), torch.float16),
        ((3, 41, 8, 30, 52), torch.float32),
        ((40, 1, 4, 16, 24), torch.bfloat16),
    ]
    for shape, dtype in [(TINY, torch.bfloat16)] if small else grid:
        for pool in ("mean", (2, 2), None):
            yield Case("relation_loss", shape, dtype, {"pool": pool}, masked=pool == "mean")
        for convention in ("self_forcing", "rcm", "longlive"):
            yield Case("dmd_loss", shape, dtype, {"convention": convention, "layout": "bfchw"})
        yield Case("codmd_loss", shape, dtype, {"pool": "mean"})
    yield Case("relation_loss", TINY, torch.float32, {"pool": "mean", "temperature": 0.01}, strided=True)
    yield Case("relation_loss", TINY, torch.float32, {"pool": None, "temperature": 10.0}, strided=True)
    if not small:
        yield from SANITIZED
        yield Case("relation_loss", (1, 240, 16, 30, 52), torch.bfloat16, {"pool": "mean"})
        yield Case("relation_loss", (1, 120, 16, 30, 52), torch.bfloat16, {"pool": None})


def inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """student, real, fake, and what else the operator takes; the critic a tenth off the teacher."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(case.shape, generator=generator, device=device)

    real = draw()
    made = {"student": draw(), "real": real, "fake": real + 0.1 * draw()}
    if case.op != "relation_loss":
        made["real_uncond"] = real + 0.3 * draw()
    made = {name: value.to(case.dtype) for name, value in made.items()}
    if case.strided:
        made = {name: value.mT.contiguous().mT for name, value in made.items()}
    if case.masked and case.shape[1] > 2:
        mask = torch.ones(case.shape[:2], dtype=torch.bool, device=device)
        mask[0, 1] = False
        made["frame_mask"] = mask
    return made


@functools.cache
def one(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The loss's own gradient, which autograd would fill with a launch of its own at every call."""
    return torch.ones((), dtype=dtype, device=device)


def differentiated(loss: Tensor, leaf: Tensor) -> Tensor:
    """The gradient of ``leaf``."""
    return torch.autograd.grad(loss, leaf, one(loss.dtype, loss.device))[0]


def gradient(case: Case, made: Inputs, backend: str | None) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the student); ``backend`` None is the reference's own autograd."""
    leaf = made["student"].detach().requires_grad_()
    rest = {name: value for name, value in made.items() if name != "student"}
    if backend is not None:
        loss = getattr(ops, case.op)(leaf, **rest, **case.options, backend=backend)
    elif case.op == "relation_loss":
        loss = reference.relation_loss(leaf, **rest, **case.options)[0]
    else:
        loss = by_reference(case, leaf, rest)
    return loss.detach(), differentiated(loss, leaf)


def by_reference(case: Case, leaf: Tensor, rest: Inputs) -> Tensor:
    """dmd_loss, or dmd_loss + 0.1 relation_loss of the guided predictions, from the reference."""
    options = dict(case.options)
    pool = options.pop("pool", "mean")
    loss = reference.dmd_loss(leaf, **rest, guidance=3.5, **options)
    if case.op == "codmd_loss":
        wide = reference.compute_dtype(leaf.dtype)
        real = reference.guided(rest["real"].to(wide), rest["real_uncond"].to(wide), 3.5)
        loss = loss + 0.1 * reference.relation_loss(leaf, real, rest["fake"], pool=pool)[0]
    return loss


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def wide(made: Inputs) -> Inputs:
    return {name: value.double() if value.is_floating_point() else value for name, value in made.items()}


def errors(case: Case, made: Inputs, backend: str, rounding: float = 1.0) -> str:
    """Empty if loss and gradient are at most twice as far from float64 as PyTorch's in the same dtype."""
    truth = gradient(case, wide(made), None)
    usual, found = gradient(case, made, None), gradient(case, made, backend)
    temperature = case.options.get("temperature", 0.1)
    floor = 1e-6 + 3e-8 / temperature
    for name, factor, a, b, c in zip(("loss", "gradient"), (2.0, 2.0 * rounding), found, truth, usual, strict=True):
        error, allowed = relative_error(a, b), factor * relative_error(c, b) + floor
        if not error <= allowed:
            return f"{name} error {error:.1e}, allowed {allowed:.1e}"
    return ""


def check_accuracy(case: Case, device: str) -> str:
    # The interpreter truncates where the hardware rounds to bfloat16.
    rounding = 2.0 if device == "cpu" and case.dtype is torch.bfloat16 else 1.0
    return errors(case, inputs(case, device), "triton", rounding)


def check_repeats(case: Case, device: str) -> str:
    made = inputs(case, device)
    first = gradient(case, made, "triton")
    for _ in range(2 if device == "cpu" else 20):
        again = gradient(case, made, "triton")
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return "two calls on the same inputs differ"
    return ""


def captured(case: Case, made: Inputs) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
    """A graph of forward and backward on ``made``, warmed up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gradient(case, made, "triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = gradient(case, made, "triton")
    return graph, result


def check_graph_replay(case: Case, device: str) -> str:
    made = inputs(case, device)
    graph, result = captured(case, made)
    for seed in range(3):
        fresh = inputs(case, device, seed)
        expected = gradient(case, fresh, "triton")
        for name, value in fresh.items():
            made[name].copy_(value)
        graph.replay()
        graph.replay()
        if not all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)):
            return f"replay {seed} differs from the eager call"
    return ""


def check_graphs_side_by_side(case: Case, device: str) -> str:
    made = [inputs(case, device, seed) for seed in range(2)]
    expected = [gradient(case, one, "triton") for one in made]
    graphs = [captured(case, one) for one in made]
    streams = [torch.cuda.Stream() for _ in made]
    for _ in range(50):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, result), truth in zip(graphs, expected, strict=True):
        if not all(torch.equal(a, b) for a, b in zip(result, truth, strict=True)):
            return "two graphs replayed at once disturb each other"
    return ""


def check_streams(case: Case, device: str) -> str:
    made = inputs(case, device)
    expected = gradient(case, made, "triton")
    torch.cuda.synchronize()
    found = []
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(gradient(case, made, "triton"))
    torch.cuda.synchronize()
    same = all(torch.equal(a, b) for result in found for a, b in zip(result, expected, strict=True))
    return "" if same else "another stream gives another result"


def attempts(device: str, small: bool) -> Iterator[tuple[str, Callable[[Case, str], str], Case]]:
    """(name, check, case) of everything that is checked."""
    for case in cases(small):
        yield "accuracy", check_accuracy, case
    shape = (2, 3, 2, 4, 8) if small else (2, 21, 16, 60, 104)
    for op, options in (("relation_loss", {"pool": "mean"}), ("relation_loss", {"pool": None}), ("codmd_loss", {})):
        case = Case(op, shape, torch.bfloat16, options)
        yield "repeats bit for bit", check_repeats, case
        if device == "cuda":
            yield "graph replay", check_graph_replay, case
            yield "two graphs at once", check_graphs_side_by_side, case
            yield "streams", check_streams, case


def tasks(
    device: str, small: bool, done: Collection[str] = (), part: int = 0, parts: int = 1
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every ``parts``-th check from ``part`` on that is not ``done``: its name, and what runs it."""
    for name, check, case in itertools.islice(attempts(device, small), part, None, parts):
        label = f"{name}: {case.name}"
        if label not in done:
            yield label, functools.partial(outcome, check, case, device)


def outcome(check: Callable[[Case, str], str], case: Case, device: str) -> dict[str, Any]:
    """``{"passed", "detail"}`` of a check."""
    try:
        detail = check(case, device)
    except Exception:
        detail = traceback.format_exc(limit=4)[-600:]
    return {"passed": not detail, "detail": detail}


def sanitized() -> None:
    """One call of each sanitized case, on inputs that were drawn on the CPU."""
    for case in SANITIZED:
        gradient(case, {name: value.cuda() for name, value in inputs(case, "cpu").items()}, "triton")
    torch.cuda.synchronize()
