"""The effect of the batch term's gradient on arc videos, without a network in between.

    python -m benchmarks.batch_term [--seeds 61 62 63 64] [--updates 200] [--samples 1024] [--draws 32] [--out FILE]

A DMD student is trained for `updates` updates at each seed. Its samples are then noised and scored `draws` times, in
batches of 64 with other partners each time, and every loss gives each sample its gradient: the mean over the draws is
what the loss pulls a sample towards, the rest is noise of levels and partners. Then the samples themselves take one
short step, of the same root mean square for every loss, against that mean (and against the gradient of one draw). The
distances to fresh data before and after say whether the direction is a good one. The teacher comes from the cache of
`codmd demo`, or is trained first.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from codmd import metrics, ops, reference
from codmd.atomic import replacing
from codmd.cli import integer_in
from codmd.demo.arc import ArcVideo
from codmd.demo.study import Options, obtain_teacher
from codmd.demo.summary import markdown
from codmd.demo.teacher import TeacherConfig
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.update.objective import predict_scores
from codmd.distill.update.rollout import sample_few_step
from codmd.distill.update.trainer import Distiller
from codmd.models.base import VideoDenoiser
from codmd.models.toy import ToyDenoiser

BATCH = 64
STEP = 0.02
"""Root mean square of the step that samples take, in standard deviations of the data."""
TEMPERATURE = 0.1
MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "video energy": metrics.energy_distance,
    "relation energy": metrics.relation_energy_distance,
    "sample relation": metrics.sample_relation_distance,
}


@dataclass(frozen=True)
class Batch:
    """One noised and scored batch: [B, F, C, 1, 1], and the scene of each sample [B]."""

    student: Tensor
    real: Tensor
    fake: Tensor
    scene: Tensor

    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        """psi of student, real and fake - real, [B, C]; the student's with gradient."""
        real, difference = self.real, reference.difference_of(self.real, self.fake)
        latents = (self.student, real, difference)
        student, real, difference = (reference.batch_features(reference.frame_features(x)) for x in latents)
        return student, real, difference

    def directions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """rhat, fhat, e = fhat - rhat and xhat, [B, C]; the last with gradient."""
        student, real, difference = self.features()
        unit_real, change = reference.unit_difference(real, difference)
        return unit_real, unit_real + change, change, reference.unit_vectors(student)


def own_errors(batch: Batch) -> Tensor:
    """Delta = e fhat^T, row i moves sample i alone: what is wrong with sample i itself."""
    _, unit_fake, change, units = batch.directions()
    return _one_sided(units, change @ unit_fake.T)


def errors_of_others(batch: Batch) -> Tensor:
    """Delta = rhat e^T, row i moves sample i alone: what is wrong with the samples that i is related to."""
    unit_real, _, change, units = batch.directions()
    return _one_sided(units, unit_real @ change.T)


def sharp_partners(batch: Batch) -> Tensor:
    """Delta = e xhat^T: own errors, read off along the partners themselves and not along predictions of them.

    To first order the gradient of sample i is the covariance of its partners' directions under q_i, times e_i.
    """
    _, _, change, units = batch.directions()
    return _one_sided(units, change @ units.detach().T)


def _one_sided(units: Tensor, delta: Tensor) -> Tensor:
    similarity = units @ units.detach().T
    _, q_minus_p = reference.divergence(similarity, delta, TEMPERATURE)
    return (reference.similarity_gradient(q_minus_p, TEMPERATURE, len(units)) * similarity).sum()


def directions_alone(batch: Batch) -> Tensor:
    """e_i moves sample i: the error of the time average's direction, without any partner."""
    _, _, change, units = batch.directions()
    return (change * units).sum(-1).mean()


def same_scene(batch: Batch) -> Tensor:
    """The batch term among the samples of one scene, averaged over rows."""
    features = batch.features()
    total = features[0].new_zeros(())
    for scene in batch.scene.unique():
        rows = batch.scene == scene
        total = total + rows.sum() * reference.relation_divergence(*(x[rows] for x in features), TEMPERATURE)
    return total / len(batch.scene)


def all_frames(batch: Batch) -> Tensor:
    """The batch term with every frame's features side by side in place of their average over time."""
    latents = (batch.student, batch.real, reference.difference_of(batch.real, batch.fake))
    student, real, difference = (reference.frame_features(x).flatten(1) for x in latents)
    return reference.relation_divergence(student, real, difference, TEMPERATURE)


def level(batch: Batch, **weights: float) -> Tensor:
    return ops.relation_loss(batch.student, batch.real, batch.fake, TEMPERATURE, **weights)


def directions_over_the_sample(batch: Batch) -> Tensor:
    """e_i |f_i| / |x_i| moves sample i: the same error over the length of the sample and not of the prediction."""
    student, real, difference = batch.features()
    _, _, change, units = batch.directions()
    length = (real + difference).norm(dim=-1, keepdim=True) / student.detach().norm(dim=-1, keepdim=True)
    return (length * change * units).sum(-1).mean()


LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    "DMD": lambda batch: ops.dmd_loss(batch.student, real=batch.real, fake=batch.fake),
    "frame term": lambda batch: level(batch, batch_weight=0.0),
    "batch term": lambda batch: level(batch, frame_weight=0.0),
    "batch, all frames": all_frames,
    "batch, pairs of one scene": same_scene,
    "batch, own errors": own_errors,
    "batch, errors of others": errors_of_others,
    "own errors, sharp partners": sharp_partners,
    "own errors, no partners": directions_alone,
    "own errors, no partners, over the sample's length": directions_over_the_sample,
}
LOW = (0.02, 0.3)
LOW_NOISE = {f"{name}, low noise": LOSSES[name] for name in ("DMD", "batch term", "batch, own errors")}
"""The same losses with the noise levels of all samples below 0.3, where predictions are nearly the samples."""
ALL = {**LOSSES, **LOW_NOISE}


@dataclass(frozen=True)
class Field:
    """What a loss pulls samples towards: minus its gradient, averaged over draws.

    Attributes:
        mean: over the draws, [N, F, C, 1, 1].
        one: of one draw.
        norm: root mean square over draws and samples, times the batch.
        signal: the share of the squared norm that is the mean's, without the bias of few draws.
    """

    mean: Tensor
    one: Tensor
    norm: float
    signal: float


def student_and_critic(teacher: ToyDenoiser, config: DistillConfig, seed: int, updates: int) -> Sequence[ToyDenoiser]:
    """Both after `updates` updates of DMD."""
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    distiller = Distiller(teacher, student, critic, replace(config, relation_weight=0.0), seed)
    for _ in range(updates):
        distiller.cycle()
    return student, critic


def fields(
    samples: Tensor, scene: Tensor, scores: tuple[VideoDenoiser, VideoDenoiser], draws: int, config: DistillConfig,
    generator: torch.Generator,
) -> dict[str, Field]:  # fmt: skip
    """The field of every loss at `samples` [N, F, C, 1, 1], N a multiple of 64; `scores` is (teacher, critic)."""
    total = {name: torch.zeros_like(samples) for name in ALL}
    squared, last = dict.fromkeys(ALL, 0.0), {name: torch.zeros_like(samples) for name in ALL}
    low = replace(config, sigma_range=LOW)
    for _ in range(draws):
        for rows in torch.randperm(len(samples), generator=generator).split(BATCH):
            x = samples[rows].clone().requires_grad_()
            for levels, losses in ((config, LOSSES), (low, LOW_NOISE)):
                predicted = predict_scores(x, *scores, levels, generator)
                batch = Batch(x, predicted.real, predicted.fake, scene[rows])
                for name, loss in losses.items():
                    last[name][rows] = -len(rows) * torch.autograd.grad(loss(batch), x)[0]
        for name, field in last.items():
            total[name] += field
            squared[name] += float(field.double().square().mean())
    found = {}
    for name in ALL:
        mean, power = total[name] / draws, squared[name] / draws
        signal = (draws * float(mean.double().square().mean()) - power) / (draws - 1) / power
        found[name] = Field(mean, last[name], power**0.5, signal)
    return found


def measured(samples: Tensor, real: Tensor) -> dict[str, float]:
    return {name: measure(samples, real) for name, measure in MEASURES.items()}


def run_seed(teacher: ToyDenoiser, data: ArcVideo, args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Per loss: norm and signal of its field, its cosine with DMD's, and what a step along it changes."""
    config = DistillConfig()
    student, critic = student_and_critic(teacher, config, seed, args.updates)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(args.samples, *teacher.latent_shape, generator=generator)
    samples, real = sample_few_step(student, noise, config.sigmas, generator), data.sample(args.samples, generator)
    found = fields(samples, data.project(samples)[0], (teacher, critic), args.draws, config, generator)
    before, length = measured(samples, real), STEP * float(real.std())
    rows: dict[str, dict[str, float]] = {"": before}
    for name, field in found.items():
        rows[name] = {"norm": field.norm, "signal": field.signal, "cosine": cosine(field.mean, found["DMD"].mean)}
        for kind, direction in (("", field.mean), (", one draw", field.one)):
            moved = samples + length * direction / direction.square().mean().sqrt()
            rows[name] |= {f"{m}{kind}": value - before[m] for m, value in measured(moved, real).items()}
    return rows


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def page(found: dict[int, dict[str, dict[str, float]]]) -> str:
    """A table of means over seeds, and on how many of them a distance fell."""
    columns = ["norm", "signal", "cosine", *MEASURES, "video energy, one draw"]
    lines = []
    for name in ALL:
        values = {column: [rows[name][column] for rows in found.values()] for column in columns}
        cells = [name]
        for column in columns:
            mean = sum(values[column]) / len(found)
            if column in ("norm", "signal", "cosine"):
                cells.append(f"{mean:.3g}")
            else:
                cells.append(f"{1e3 * mean:+.2f}, {sum(v < 0 for v in values[column])}/{len(found)}")
        lines.append(cells)
    return markdown(
        ["field", "norm", "signal", "cosine with DMD", *(f"1000 x change of {m}" for m in columns[3:])], lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[61, 62, 63, 64])
    parser.add_argument("--updates", type=integer_in(0, 1_000_000), default=200)
    parser.add_argument("--samples", type=integer_in(BATCH, 1_000_000), default=1024, help="a multiple of 64")
    parser.add_argument("--draws", type=integer_in(2, 1_000_000), default=32)
    parser.add_argument("--teacher-steps", type=integer_in(1, 1_000_000), default=TeacherConfig().steps)
    parser.add_argument("--out", type=Path, help="JSON of every number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = TeacherConfig(steps=args.teacher_steps)
    teacher, made, _ = obtain_teacher(Options(args.seeds, 0, 0, DistillConfig(), wanted, 1, True, False))
    teacher, data = teacher.requires_grad_(False), ArcVideo(made.arc)
    found = {}
    for seed in args.seeds:
        found[seed] = run_seed(teacher, data, args, seed)
        print(f"seed {seed}: {', '.join(f'{name} {value:.3f}' for name, value in found[seed][''].items())}", flush=True)
    print(page(found))
    if args.out:
        with replacing(args.out) as path:
            path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
