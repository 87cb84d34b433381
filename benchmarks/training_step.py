"""A training cycle at real size with random weights on one GPU, beside the same cycle scheduled as CoDMD's own loop.

    python -m benchmarks.training_step [--config wan_1.3b] [KEY=VALUE ...] [--out DIR] [--budget SECONDS] [--tiny]

`codmd train`'s own trainer runs, with one sample an update and the exit steps given instead of drawn: every step of the
critic's equally often, the student's in pairs around the middle, so that the cycles cost what they cost on average. The
other schedule rolls every trajectory out to its end, evaluates the teacher twice, draws a fresh sample for every critic
update, and writes its losses in plain PyTorch. Writes training_step.json, .md and .png.

On an H200, estimated and not yet measured: 0.7 s a forward pass, hence two minutes a round (two cycles of each
schedule), half a minute before it and half a minute for the attention backends; more rounds while `--budget` lasts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention
from benchmarks import whole_network as network
from benchmarks.schedules import Lap, MeasuredDistiller, Meter, Schedule, exit_steps, schedules
from codmd import backends
from codmd.distill.plan.layouts import Forwards
from codmd.distill.update.objective import Scores

GOAL, LOSS_GOAL = 0.75, 0.001
ATTENTION_S = 90
"""After which no further attention backend is timed."""

COLORS = {"student": "#d1495b", "critic, shared sample": "#7fa8c9", "critic": "#3b75af"}


def measure(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """All of it; the record that is written, without the environment."""
    start = time.monotonic()
    config = network.wan_recipe(options.config, options.overrides, options.tiny, folder)
    if config.distill.guidance is None:
        raise SystemExit("error: distill.guidance: none; the schedules differ in how they evaluate the teacher twice")
    text = network.random_text(config.model, options.tiny).to(device)
    flops = network.forward_flops(config.model, text)
    frozen = config.model.changed(config.teacher_model, "teacher_model")
    roles = [network.build(settings, device) for settings in (frozen, config.model, config.model)]
    both = schedules(config.distill)
    distiller = MeasuredDistiller(
        roles[0].requires_grad_(False), roles[1], roles[2], both[0].config, conditions=itertools.repeat(text)
    )
    distiller.meter = Meter(device, roles)
    found: dict[str, Any] = {
        "tiny": options.tiny,
        "configuration": options.config,
        "latents": list(distiller.student.latent_shape),
        "parameters": sum(weight.numel() for weight in distiller.student.parameters()),
        "gradient_checkpointing": distiller.student.checkpointing,
        "tflop_per_forward": flops * 1e-12,
        "loss_backend": backends.select("auto", torch.empty(0, device=device)).__name__,
    }
    found["rounds"] = run_rounds(distiller, both, start + options.budget)
    losses = {schedule.name: loss_seconds(distiller, schedule) for schedule in both}
    found |= summarize(distiller.meter.laps, losses, 2 * found["rounds"])
    found["average_forwards"] = Forwards.of(both[0].config).equivalent(found["gradient_checkpointing"])
    del distiller, roles
    network.free_memory(device)
    deadline = time.monotonic() + ATTENTION_S
    found["attention"] = [attention.row(config.model, name, text, device, flops, deadline) for name in attention.NAMES]
    return found | {"seconds": time.monotonic() - start}


def run_rounds(distiller: MeasuredDistiller, both: tuple[Schedule, ...], deadline: float) -> int:
    """Two cycles of each schedule a round, at least one round, and as many as end before `deadline`; their number."""
    for schedule in both:  # kernels are compiled and the allocator grows here
        short = replace(schedule, config=replace(schedule.config, critic_updates=2))
        distiller.measured_cycle(short, exit_steps(short, 0))
    distiller.meter.laps.clear()
    rounds, longest = 0, 0.0
    while rounds == 0 or time.monotonic() + longest < deadline:
        began = time.monotonic()
        for number in (2 * rounds, 2 * rounds + 1):
            for schedule in both:
                distiller.measured_cycle(schedule, exit_steps(schedule, number))
        rounds, longest = rounds + 1, max(longest, time.monotonic() - began)
    return rounds


def loss_seconds(distiller: MeasuredDistiller, schedule: Schedule) -> float:
    """Median time of the objective and its gradient with respect to the sample, launches and all."""
    distiller.schedule, distiller.config = schedule, schedule.config
    shape = (1, *distiller.student.latent_shape)
    sample, *scores = (torch.randn(shape, device=distiller.device) for _ in range(4))
    sample.requires_grad_()

    def call() -> object:
        return torch.autograd.grad(distiller._loss(sample, Scores(*scores)).total, sample)

    return statistics.median(network.seconds(call, distiller.device, repeats=20, warm_up=3))


def summarize(laps: list[Lap], losses: dict[str, float], cycles: int) -> dict[str, Any]:
    """Cycle, phases, ratio and the loss's share, from the laps of `cycles` cycles of each schedule."""
    found: dict[str, Any] = {"schedules": {}, "laps": [asdict(lap) for lap in laps]}
    for name, loss in losses.items():
        own = [lap for lap in laps if lap.schedule == name]
        phases = {phase: _phase([lap for lap in own if lap.phase == phase], cycles) for phase in _names(own)}
        cycle = sum(lap.seconds for lap in own) / cycles
        found["schedules"][name] = {
            "cycle_s": cycle,
            "forwards_per_cycle": sum(lap.forwards for lap in own) / cycles,
            "phases": phases,
            "loss_s": loss,
            "loss_share_of_student_update": loss / phases["student"]["mean_s"],
            "loss_share_of_cycle": loss / cycle,
        }
    ours, published = found["schedules"].values()
    found["ratio"] = ours["cycle_s"] / published["cycle_s"]
    found["ratio_of_forwards"] = ours["forwards_per_cycle"] / published["forwards_per_cycle"]
    return found


def _names(laps: list[Lap]) -> list[str]:
    return list(dict.fromkeys(lap.phase for lap in laps))


def _phase(laps: list[Lap], cycles: int) -> dict[str, Any]:
    return {
        "updates_per_cycle": len(laps) / cycles,
        "mean_s": statistics.fmean(lap.seconds for lap in laps),
        "median_s": statistics.median(lap.seconds for lap in laps),
        "forwards": statistics.fmean(lap.forwards for lap in laps),
        "peak_allocated": max((lap.allocated for lap in laps if lap.allocated is not None), default=None),
        "peak_reserved": max((lap.reserved for lap in laps if lap.reserved is not None), default=None),
    }


def markdown(found: dict[str, Any]) -> str:
    """The record as a page."""
    shape = " x ".join(map(str, found["latents"]))
    lines = network.heading("A training cycle at real size", found, found["tiny"])
    lines += [
        "",
        f"Configuration `{found['configuration']}`, {found['parameters'] / 1e9:.3f} billion random weights, latents "
        f"{shape}, gradient checkpointing {'on' if found['gradient_checkpointing'] else 'off'}, one sample an update, "
        f"{found['tflop_per_forward']:.4g} TFLOP a forward pass, {found['rounds']} rounds of two cycles.",
        "",
        "| schedule | update | a cycle | mean s | median s | forwards | peak allocated GB | peak reserved GB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, schedule in found["schedules"].items():
        for phase, row in schedule["phases"].items():
            lines.append(
                f"| {name} | {phase} | {row['updates_per_cycle']:g} | {row['mean_s']:.3f} | {row['median_s']:.3f} "
                f"| {row['forwards']:.2f} | {_gigabytes(row['peak_allocated'])} | {_gigabytes(row['peak_reserved'])} |"
            )
        cells = f"{schedule['cycle_s']:.3f} | | {schedule['forwards_per_cycle']:.2f}"
        lines.append(f"| {name} | **whole cycle** | | {cells} | | |")
    ours, published = found["schedules"].values()
    share = ours["loss_share_of_student_update"]
    lines += [
        "",
        f"The cycle takes {found['ratio']:.3f} of the time of CoDMD's own loop (goal {GOAL}: "
        f"{network.verdict(found['ratio'] <= GOAL, found['tiny'])}) and {found['ratio_of_forwards']:.3f} of its "
        f"forward passes. Averaged over all exit steps a cycle is {found['average_forwards']:g} of them (a backward "
        "pass counts 2, recomputation 1).",
        "",
        f"`codmd_loss` ({found['loss_backend']}) with its gradient: {1e3 * ours['loss_s']:.3f} ms, launches and all, "
        f"{share:.4%} of a student update (goal below {LOSS_GOAL:.1%}: "
        f"{network.verdict(share < LOSS_GOAL, found['tiny'])}); in plain PyTorch {1e3 * published['loss_s']:.3f} ms. "
        "Reserved memory includes what the allocator kept of earlier updates.",
        "",
        *attention.table(found["attention"]),
    ]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any]) -> Callable[[Any], Any]:
    """A bar of seconds for every schedule, update by update, and the peak memory of its phases."""

    def picture(pyplot: Any) -> Any:
        schedules, phases = found["schedules"], list(COLORS)
        measured = any(row["peak_allocated"] for schedule in schedules.values() for row in schedule["phases"].values())
        figure, axes = pyplot.subplots(
            1, 1 + measured, figsize=(7 + 4 * measured, 2.9), layout="constrained", squeeze=False
        )
        times, limit = axes[0, 0], 1.4 * max(schedule["cycle_s"] for schedule in schedules.values())
        for y, schedule in enumerate(schedules.values()):
            left = 0.0
            for phase, row in schedule["phases"].items():
                width = row["updates_per_cycle"] * row["mean_s"]
                times.barh(y, width, 0.6, left, color=COLORS[phase], label=phase if y == 0 else None, edgecolor="white")
                if width > 0.08 * limit:
                    count = f"{row['updates_per_cycle']:g} x " if row["updates_per_cycle"] != 1 else ""
                    place = left + width / 2, y
                    times.text(*place, f"{count}{row['mean_s']:.2g} s", ha="center", va="center", color="white")
                left += width
                if measured:
                    size, level = row["peak_allocated"] / 1e9, y + 0.22 * (phases.index(phase) - 1)
                    axes[0, 1].barh(level, size, 0.2, color=COLORS[phase])
                    axes[0, 1].text(size, level, f" {size:.1f}", va="center", fontsize=8)
            total = f" {schedule['cycle_s']:.3g} s, {schedule['forwards_per_cycle']:g} forwards"
            times.text(left, y, total, va="center")
        times.set_xlim(0, limit)
        times.set_title(f"one cycle: {found['ratio']:.2f} of the time of CoDMD's own loop", loc="left")
        times.set_xlabel(f"seconds, {found['device']}")
        figure.legend(*times.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
        for axis in axes[0]:
            axis.set_yticks(range(len(schedules)), list(schedules))
            axis.set_ylim(len(schedules) - 0.5, -0.5)
        if measured:
            axes[0, 1].set_title("peak allocated, GB", loc="left")
            axes[0, 1].set_yticklabels([])
        return figure

    return picture


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = network.arguments(__doc__, "model.compile=true")
    parser.add_argument("--budget", type=float, help="seconds after which no new round begins (200; 0 tiny)")
    options = parser.parse_intermixed_args(argv)
    if options.budget is None:
        options.budget = 0 if options.tiny else 200
    return network.report("training_step", options, argv, measure, markdown, draw)


if __name__ == "__main__":
    raise SystemExit(main())
