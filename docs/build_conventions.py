"""docs/conventions.md: tables from the dataclass and its sources, the cost of bfloat16 from a measurement.

    python docs/build_conventions.py [--check]

``--check`` writes nothing and fails when the file is out of date.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from codmd import conventions, reference
from codmd.conventions import NAMED, SOURCES, Convention
from codmd.reference import dmd as equations

PAGE = Path(__file__).with_name("conventions.md")
TEMPLATE = Path(__file__).with_name("conventions.in.md")
RATIOS = (0.3, 0.1, 0.03, 0.01)


def columns(convention: Convention) -> list[str]:
    """The cells of one row, from the dataclass alone; italics where the fused pass does not know it."""
    form = convention.guidance_form
    if convention.guided_above is not None:
        form += f" for s > {convention.guided_above:g}"
    scope = {"sample": "sample", "batch": "whole batch", "block": f"blocks of {convention.norm_block} frames"}
    norm = scope[convention.norm_scope]
    if convention.norm_of == "fake":
        norm += ", *of f - r*"
    if convention.norm_over == "selected":
        norm += ", *selected elements*"
    if convention.guard != "none":
        norm += f", {'min' if convention.guard == 'clamp' else '+'} {convention.eps:g}"
    if convention.norm_divides == "loss":
        norm += ", divides the loss"
    nan = {"to_num": "nan_to_num", "zero": "*non-finite → 0*", "zero_sample": "zero the sample", "keep": "keep"}
    penalty = "g²" if convention.penalty == "l2" else f"sqrt(g² + {convention.huber_c:g}²) - {convention.huber_c:g}"
    coefficient = "½" if convention.coefficient == 0.5 else f"{convention.coefficient:g}"
    reduction = {"mean": "mean", "mean_all": "*mean over all*", "sum": "sum"}[convention.reduction]
    loss = f"{coefficient} {reduction} {penalty}"
    if convention.projected:
        loss += ", *projected*"
    if convention.loss_cap is not None:
        loss += f", *at most {convention.loss_cap:g}*"
    weight = "loss" if convention.weight_on == "loss" else "g"
    return [form, norm, nan[convention.nan], loss, weight, convention.layout]


def after_averaging(convention: Convention, masked: bool) -> str:
    """How a gradient averaged over ranks compares with that of one process that holds all samples."""
    if convention.norm_scope == "batch":
        return "per rank"
    if convention.reduction == "sum":
        return "1/W of one process"
    if convention.reduction == "mean" and masked:
        return "per rank"
    return "one process"


def table(header: list[str], rows: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def grouped(key) -> dict[Convention, list[str]]:
    """Names that share what ``key`` reads, in the order of their first."""
    groups: dict[object, list[str]] = {}
    for name, convention in NAMED.items():
        groups.setdefault(tuple(key(convention)), []).append(name)
    return groups


def names_of(group: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in group)


def differences() -> str:
    header = ["convention", "guidance", "norm", "NaN", "loss", "weight", "layout"]
    return table(header, [[names_of(names), *row] for row, names in grouped(columns).items()])


def sources() -> str:
    rows = [
        [f"`{name}`", source.repository, f"[{source.path}]({source.url})", source.function, source.date]
        for name, source in SOURCES.items()
    ]
    return table(["convention", "repository", "path", "function", "date of the code"], rows)


def parallel() -> str:
    """Which norms, means and sums see one rank alone, and what averaging makes of the gradient."""

    def cells(convention: Convention) -> list[str]:
        norm = "this rank's batch" if convention.norm_scope == "batch" else "a sample's own"
        reduction = {
            "mean": "mean over this rank's (selected) elements", "mean_all": "mean over this rank's elements",
            "sum": "sum over this rank's elements",
        }[convention.reduction]  # fmt: skip
        return [norm, reduction, *(after_averaging(convention, masked) for masked in (False, True))]

    header = ["convention", "norm", "reduction", "after averaging", "with a mask of unequal counts"]
    return table(header, [[names_of(names), *row] for row, names in grouped(cells).items()])


def roundings() -> str:
    def cells(convention: Convention) -> list[str]:
        steps = convention.rounding
        short = {"input": "in", "float32": "float32", "float64": "float64"}
        g = short[steps.direction]
        if steps.reciprocal:
            g = f"(f - r)·round(1/norm), {g}"
        elif convention.norm_divides == "direction" and steps.direction == "input" != steps.norm:
            g = f"f - r in, g {short[steps.norm]}"
        target = "(x + (c - f)) + k(c - u), in" if steps.split_target else short[steps.target]
        base = "c + ..." if steps.guidance_base == "cond" else "u + ..."
        return [base, short[steps.norm], g, target, short[steps.loss]]

    header = ["convention", "guidance, in", "norm", "g", "x - g", "penalty and reduction"]
    return table(header, [[names_of(names), *row] for row, names in grouped(cells).items()])


def errors(ratio: float, flow: bool) -> tuple[float, float]:
    """Relative errors of g in bfloat16 arithmetic and in float32 arithmetic, from the same bfloat16 inputs."""
    generator = torch.Generator().manual_seed(0)
    shape, scale = (1, 21, 16, 60, 104), 3.5
    student, cond, other, noise, noisy = (torch.randn(shape, generator=generator) for _ in range(5))
    uncond = cond + 0.1 * other
    fake = reference.guided(cond, uncond, scale) + ratio * noise
    sigma = torch.tensor([0.5])
    outputs = [(noisy - x0) / 0.5 if flow else x0 for x0 in (fake, cond, uncond)]
    half = [v.bfloat16() for v in (student, *outputs, noisy)]

    def direction(arithmetic: str) -> torch.Tensor:
        convention = replace(conventions.self_forcing, arithmetic=arithmetic)
        x, f, c, u, x_t = half
        levels = (x_t, sigma) if flow else (None, None)
        critic = reference.x0_prediction(f, None, scale, convention, "bfchw", *levels)
        teacher = reference.x0_prediction(c, u, scale, convention, "bfchw", *levels)
        return equations.direction(x, critic, teacher, scale, convention, "bfchw").g.double()

    truth = direction("float64")
    emulated, single = ((direction(kind) - truth).norm() / truth.norm() for kind in ("emulate", "float32"))
    return float(emulated), float(single)


def cost() -> str:
    header = [
        "‖f - r‖/‖x‖",
        "bfloat16, from x0",
        "float32, from x0",
        "bfloat16, from velocities",
        "float32, from velocities",
    ]
    rows = [
        [f"{ratio:g}", *(f"{error:.1e}" for flow in (False, True) for error in errors(ratio, flow))] for ratio in RATIOS
    ]
    return table(header, rows)


def page(measured: str | None = None) -> str:
    """The whole page; ``measured`` stands for the table that takes seconds."""
    text = TEMPLATE.read_text()
    parts = {
        "differences": differences(), "sources": sources(), "parallel": parallel(), "roundings": roundings(),
        "cost": measured or cost(),
    }  # fmt: skip
    for name, part in parts.items():
        text = text.replace(f"{{{{{name}}}}}", part.rstrip("\n"))
    return text


def main() -> None:
    torch.set_num_threads(2)  # sums depend on it, and with them a digit of the measured table
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE.name} is out of date: run `python docs/build_conventions.py`")
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
