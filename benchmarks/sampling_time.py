"""Four steps without guidance against fifty with it: the network's time for one video, random weights, one GPU.

    python -m benchmarks.sampling_time [--config wan_1.3b] [KEY=VALUE ...] [--out DIR] [--budget SECONDS] [--tiny]

`codmd sample`'s own samplers run on one video of the configuration's size (81 frames of 480 x 832), weights stored in
bfloat16; the text encoder and the VAE are left out. Four steps are timed with every attention backend there is, eager
and with compiled blocks; fifty with torch's own choice alone. Writes sampling_time.json, .md and .png.

On an H200, estimated and not yet measured: 70 to 95 s for fifty eager steps, 50 to 60 s compiled, a minute for every
backend (most of it compiling): five to six minutes, and no new measurement begins after `--budget`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention
from benchmarks import whole_network as network
from codmd.distill.config.sections import ModelSettings
from codmd.distill.update.noise import NoiseStream
from codmd.models.base import VideoDenoiser
from codmd.sample.samplers import FewStep, Guided

GOAL_S = 1.5
PUBLISHED_RATIO = 25
"""About: fifty steps of two evaluations against four of one (arXiv 2606.21982)."""
MODES = {"eager": False, "compiled": True}


@dataclass(frozen=True)
class Task:
    """One network to build, and what to time with it."""

    attention: str
    mode: str
    many: bool

    @property
    def name(self) -> str:
        return f"{self.attention}, {self.mode}"


def tasks() -> list[Task]:
    """In the order of importance: torch's own choice with both samplers, then the other backends with the few steps."""
    first = [Task("native", mode, True) for mode in MODES]
    return [*first, *(Task(name, mode, False) for name in attention.NAMES[1:] for mode in MODES)]


def sample(denoiser: VideoDenoiser, sampler: FewStep | Guided, text: Tensor) -> Tensor:
    """Latents of one video, its noise drawn on the device."""
    generator = torch.Generator(denoiser.device).manual_seed(0)
    return sampler(denoiser, NoiseStream(generator), text, lambda _steps: None)  # type: ignore[arg-type]


def run_task(
    task: Task, model: ModelSettings, few: FewStep, many: Guided, text: Tensor, device: torch.device
) -> dict[str, Any]:
    """Times of one task; `reason` where something of it failed."""
    found: dict[str, Any] = {"attention": task.attention, "mode": task.mode}
    forwards = 0

    def count(_denoiser: VideoDenoiser, inputs: tuple[Tensor, ...]) -> None:
        nonlocal forwards
        forwards += len(inputs[0])

    def timed(sampler: FewStep | Guided, repeats: int) -> dict[str, Any]:
        nonlocal forwards
        forwards = 0
        times = network.seconds(lambda: sample(denoiser, sampler, text), device, repeats, warm_up=0)
        return {"s": statistics.median(times), "all_s": times, "forwards": forwards / repeats}

    torch.compiler.reset()
    denoiser = None
    try:
        denoiser = network.build(model, device, attention=task.attention, compile=MODES[task.mode])
        denoiser.eval().requires_grad_(False).register_forward_pre_hook(count)
        (found["first_video_s"],) = network.seconds(lambda: sample(denoiser, few, text), device, 1, warm_up=0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found["few"] = timed(few, repeats=3)
        if task.many:
            found["many"] = timed(many, repeats=1)
        found["peak_allocated"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    except Exception as error:
        found["reason"] = network.reason_of(error)
    denoiser = None
    network.free_memory(device)
    return found


def measure(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """All of it; the record that is written, without the environment."""
    start = time.monotonic()
    config = network.wan_recipe(options.config, options.overrides, options.tiny, folder)
    compute = config.model.options.compute
    model = config.model.changed({"storage": compute, "gradient_checkpointing": False}, "model")
    text = network.random_text(model, options.tiny).to(device)
    few, many = FewStep(config.distill.sigmas), Guided()
    flops = network.forward_flops(model, text)
    size = model.options
    found: dict[str, Any] = {
        "tiny": options.tiny,
        "configuration": options.config,
        "latents": [size.frames, size.network()["in_channels"], size.height, size.width],
        "tflop_per_forward": flops * 1e-12,
        "few_steps": few.evaluations,
        "many_steps": many.evaluations,
        "rows": [],
    }
    refused: set[str] = set()
    for task in tasks():
        if task.attention in refused:
            continue
        if time.monotonic() - start > options.budget:
            row = {"attention": task.attention, "mode": task.mode, "reason": "out of time"}
        else:
            print(f"{task.name} ...", flush=True)
            row = run_task(task, model, few, many, text, device)
            if "first_video_s" not in row:
                refused.add(task.attention)
        found["rows"].append(row)
    return found | summarize(found["rows"]) | {"seconds": time.monotonic() - start}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest few steps, and many over few steps of every row that timed both."""
    timed = [row for row in rows if "few" in row]
    fastest = min(timed, key=lambda row: row["few"]["s"], default=None)
    return {
        "fastest": fastest and {key: fastest[key] for key in ("attention", "mode", "few")},
        "fastest_compiled_s": min((row["few"]["s"] for row in timed if row["mode"] == "compiled"), default=None),
        "ratios": {row["mode"]: row["many"]["s"] / row["few"]["s"] for row in timed if "many" in row},
    }


def markdown(found: dict[str, Any]) -> str:
    """The record as a page."""
    frames, _, height, width = found["latents"]
    size = f"{4 * frames - 3} frames of {8 * height} x {8 * width}"
    lines = network.heading("Sampling time of the network", found, found["tiny"])
    lines += [
        "",
        f"Configuration `{found['configuration']}`, random weights, one video of {size}, without text encoder and VAE; "
        f"{found['tflop_per_forward']:.4g} TFLOP a forward pass. {found['few_steps']} steps without guidance: median "
        f"of three videos; {found['many_steps']} steps with guidance: one video.",
        "",
        f"| attention | blocks | {found['few_steps']} steps, s | TFLOP/s | {found['many_steps']} steps, s | ratio "
        "| first video s | peak GB | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in found["rows"]:
        few, many, peak = (row.get(key) for key in ("few", "many", "peak_allocated"))
        cells = [
            row["attention"],
            row["mode"],
            f"{few['s']:.3f}" if few else "",
            f"{few['forwards'] * found['tflop_per_forward'] / few['s']:.1f}" if few else "",
            f"{many['s']:.2f}" if many else "",
            f"{many['s'] / few['s']:.1f}" if few and many else "",
            f"{row['first_video_s']:.1f}" if "first_video_s" in row else "",
            f"{peak / 1e9:.1f}" if peak else "",
            row.get("reason", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", conclusion(found)]) + "\n"


def conclusion(found: dict[str, Any]) -> str:
    """The goal and the ratio in words."""
    best = found["fastest_compiled_s"]
    if best is None:
        return "No compiled network could be timed."
    met = network.verdict(best <= GOAL_S, found["tiny"])
    ratios = ", ".join(f"{ratio:.1f}x {mode}" for mode, ratio in found["ratios"].items())
    return (
        f"{found['few_steps']} steps of a compiled network take {best:.3f} s with the fastest attention backend (goal "
        f"{GOAL_S} s: {met}). {found['many_steps']} steps with guidance take {ratios or 'a time that is not known'} as "
        f"long as {found['few_steps']} without, in the same network (the paper: about {PUBLISHED_RATIO}x)."
    )


def draw(found: dict[str, Any]) -> Callable[[Any], Any]:
    """Seconds of the few steps by backend and mode, with the goal; fifty steps beside them on their own scale."""

    def picture(pyplot: Any) -> Any:
        timed = [row for row in found["rows"] if "few" in row]
        many = [row for row in timed if "many" in row]
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 1.6 + 0.3 * len(timed)), layout="constrained")
        for axis, rows, key, steps, guidance in (
            (axes[0], timed, "few", found["few_steps"], "without"),
            (axes[1], many, "many", found["many_steps"], "with"),
        ):
            values = [row[key]["s"] for row in rows]
            colors = ["#d1495b" if row["mode"] == "compiled" else "#a9b4bf" for row in rows]
            axis.barh(range(len(rows)), values, 0.7, color=colors)
            for y, value in enumerate(values):
                axis.text(value, y, f" {value:.3g} s", va="center")
            axis.set_yticks(range(len(rows)), [f"{row['attention']}, {row['mode']}" for row in rows])
            axis.invert_yaxis()
            axis.set_xlim(0, 1.25 * max(values, default=1))
            axis.set_title(f"{steps} steps {guidance} guidance", loc="left")
            axis.set_xlabel(f"seconds a video, {found['device']}")
        if not found["tiny"]:
            axes[0].axvline(GOAL_S, color="black", linewidth=0.8, linestyle=":")
        return figure

    return picture


def main(argv: Sequence[str] | None = None) -> int:
    parser = network.arguments(__doc__, "model.height=90")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no new measurement begins (420)")
    options = parser.parse_intermixed_args(argv)
    return network.report("sampling_time", options, argv, measure, markdown, draw)


if __name__ == "__main__":
    raise SystemExit(main())
