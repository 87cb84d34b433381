"""Writes docs/conventions.md: the table from the dataclass, the cost of bfloat16 arithmetic from a measurement.

    python docs/build_conventions.py [--check]

``--check`` writes nothing and fails when the file is out of date.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from codmd import conventions, reference
from codmd.conventions import NAMED, Convention
from codmd.reference import dmd as equations

PAGE = Path(__file__).with_name("conventions.md")
RATIOS = (0.3, 0.1, 0.03, 0.01)
SOURCES = {
    "causvid": "https://github.com/tianweiy/CausVid",
    "self_forcing": "https://github.com/guandeh17/Self-Forcing",
    "codmd": "https://arxiv.org/abs/2606.21982",
    "longlive": "https://github.com/NVlabs/LongLive",
    "dmd2": "https://github.com/tianweiy/DMD2",
    "rcm": "https://github.com/NVlabs/rcm",
    "fastgen": "https://github.com/NVlabs/FastGen",
    "modelopt": "https://github.com/NVIDIA/Model-Optimizer",
    "fastvideo": "https://github.com/hao-ai-lab/FastVideo",
    "fastvideo_legacy": "https://github.com/hao-ai-lab/FastVideo",
    "lightx2v": "https://github.com/ModelTC/LightX2V",
    "videox_fun": "https://github.com/aigc-apps/VideoX-Fun",
    "diffsynth": "https://github.com/modelscope/DiffSynth-Studio",
    "simpletuner": "https://github.com/bghira/SimpleTuner",
    "tdm": "https://github.com/Luo-Yihong/TDM",
}

INTRODUCTION = """\
# Conventions: which DMD loss a number belongs to

<!-- Written by `python docs/build_conventions.py`; edit that file. -->

Every codebase of distribution matching distillation computes

    g = (fake - real) / norm,   norm = mean|student - real|,   L = ½ mean(g²) in value,   ∂L/∂student = g / numel

and no two agree on the rest. `codmd.ops.dmd_loss(..., convention=...)` takes a name from the table, an instance
(`conventions.rcm`) or a variation of one (`replace(conventions.self_forcing, guard="clamp", eps=1e-5)`).

## Guidance: the same number means two things

`cond` is c + s(c - u), `uncond` is u + s(c - u); cond-form s is uncond-form s + 1. CoDMD's 3.5 is cond-form, so in
FastGen, VideoX-Fun or diffusers the same teacher is 4.5:

    $ codmd guidance 3.5 --from self_forcing --to fastgen
    self_forcing  s = 3.5      cond + s * (cond - uncond)
    fastgen       s = 4.5      uncond + s * (cond - uncond)

`guidance=` is always the scale in the convention's own form; `convention.guidance_scale(4.5, form="uncond")` converts.
rCM's training loss is cond-form although its teacher sampler is uncond-form, with one setting for both.

## The table

"norm" is the scope of the mean and its guard; "NaN" what happens to g (`nan_to_num` also turns ±inf, x/0, into the
dtype's largest number); "weight" what `sample_weight` multiplies.
"""

EMULATION = """\
## Arithmetic: float32, float64, or theirs

The named instances mean the codebase's *formula* in float32 arithmetic, `arithmetic="float32"`: that is what the fused
kernels compute, from inputs of any precision, with the differences taken first. `replace(c, arithmetic="float64")`
computes every step in float64, and `replace(c, arithmetic="emulate")` repeats the codebase's own roundings, so that
value and gradient agree with that code to the last bits (the tests compare them bit for bit); both run step by step in
PyTorch, on any device. What emulation follows, with "in" for the dtype of the latents:
"""

COST = """\
## What bfloat16 arithmetic costs

Relative error of g, ‖g - g₆₄‖/‖g₆₄‖ on the same bfloat16 inputs, by how far the critic is from the guided teacher:
`self_forcing` emulated (guidance, norm and g in bfloat16; x0 from velocities in float64, stored in bfloat16) against
the default, float32 arithmetic. Latents of 1×21×16×60×104 from a standard normal distribution, teacher guidance 3.5 on
an unconditional prediction 0.1 away, σ = 0.5. `python docs/build_conventions.py` measures this table and writes the
page; `--check` fails when the page differs (7 s on a CPU).
"""

NOTES = """\
The error grows as the critic closes in on the teacher: guidance and x0 are rounded to 8 bits before their difference is
taken. It has no preferred direction, so training averages some of it out; but it is noise, and it is free to avoid.

## Notes

- `longlive` is published with and without blocks of frames; `norm_block` is its `num_frame_per_block`. With
  `independent_first_frame=True` the first frame stands alone and its norm is 1.
- `dmd2` guides noise predictions in its own code; here guidance acts on x0.
- `rcm` sums over everything. Its own code sums each sample and then takes the mean over the batch: divide by the batch
  size (docs/integrations.md). Where its code multiplies a NaN by the zero of a dropped sample in the backward pass,
  `zero_sample` gives a zero gradient.
- `lightx2v` has an optional minimum of the norm: `replace(conventions.lightx2v, guard="clamp", eps=...)`.
- `tdm` divides the loss by the norm, not g. Its pseudo-Huber loss is `replace(conventions.tdm, penalty="huber")`.
- Guidance starts from the conditional prediction and sums are divided, not elements. A convention that keeps NaN may
  therefore show inf where its codebase shows NaN (0/0 beside x/0), or NaN in fewer elements of a sample; the loss is
  non-finite in both. `arithmetic="emulate"` repeats the codebase here, too.
- A student that is not finite always gives a non-finite loss (except that `zero_sample` drops the sample).
"""


def columns(convention: Convention) -> list[str]:
    """The cells of one row, from the dataclass alone."""
    scope = {"sample": "sample", "batch": "whole batch", "block": f"blocks of {convention.norm_block} frames"}
    norm = scope[convention.norm_scope]
    if convention.guard != "none":
        norm += f", {'min' if convention.guard == 'clamp' else '+'} {convention.eps:g}"
    if convention.norm_divides == "loss":
        norm += ", divides the loss"
    nan = {"to_num": "nan_to_num", "zero_sample": "zero the sample", "keep": "keep"}[convention.nan]
    penalty = "g²" if convention.penalty == "l2" else f"sqrt(g² + {convention.huber_c:g}²) - {convention.huber_c:g}"
    coefficient = "½" if convention.coefficient == 0.5 else f"{convention.coefficient:g}"
    weight = "loss" if convention.weight_on == "loss" else "g"
    reduction = f"{coefficient} {convention.reduction} {penalty}"
    return [convention.guidance_form, norm, nan, reduction, weight, convention.layout]


def table(header: list[str], rows: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def grouped(key) -> dict[Convention, list[str]]:
    """Names that share what ``key`` reads, in the order of their first."""
    groups: dict[object, list[str]] = {}
    for name, convention in NAMED.items():
        groups.setdefault(tuple(key(convention)), []).append(name)
    return groups


def differences() -> str:
    header = ["convention", "guidance", "norm", "NaN", "loss", "weight", "layout"]
    linked = [
        [", ".join(f"[`{name}`]({SOURCES[name]})" for name in names), *row] for row, names in grouped(columns).items()
    ]
    return table(header, linked)


def roundings() -> str:
    def cells(convention: Convention) -> list[str]:
        steps = convention.rounding
        short = {"input": "in", "float32": "float32", "float64": "float64"}
        g = f"(f - r)·round(1/norm), {short[steps.direction]}" if steps.reciprocal else short[steps.direction]
        target = "(x + (c - f)) + k(c - u), in" if steps.split_target else short[steps.target]
        base = "c + ..." if steps.guidance_base == "cond" else "u + ..."
        return [base, short[steps.norm], g, target, short[steps.loss]]

    header = ["convention", "guidance, in", "norm", "g", "x - g", "penalty and reduction"]
    rows = [[", ".join(f"`{name}`" for name in names), *row] for row, names in grouped(cells).items()]
    return table(header, rows)


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
    parts = [INTRODUCTION, differences(), EMULATION, roundings(), COST, measured or cost(), NOTES]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE.name} is out of date: run `python docs/build_conventions.py`")
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
