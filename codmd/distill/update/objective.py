"""The two objectives: DMD plus lambda times the relation term for the student, flow matching for the critic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from codmd import conventions, ops, reference
from codmd.distill.config.recipe import DistillConfig
from codmd.models.base import Condition, VideoDenoiser, cat_cond

from .noise import Randomness, noise_like
from .phased import noised, velocity_error
from .rollout import euler_step
from .schedule import sample_sigma


@dataclass(frozen=True)
class GeneratorLoss:
    """The student's loss and its parts, scalars; `total` = dmd + relation_weight * relation."""

    total: Tensor
    dmd: Tensor
    relation: Tensor
    relation_batch: Tensor
    relation_frame: Tensor
    relation_weight: float

    @classmethod
    def mean(cls, losses: Sequence[GeneratorLoss]) -> GeneratorLoss:
        """The average over micro-batches of one update, without graph."""
        terms = [field.name for field in fields(cls) if field.name != "relation_weight"]
        means = {name: torch.stack([getattr(loss, name).detach() for loss in losses]).mean() for name in terms}
        return cls(**means, relation_weight=losses[0].relation_weight)

    def gradient_ratio(self, sample: Tensor) -> Tensor:
        """norm(relation_weight * grad relation) / norm(grad DMD) with respect to `sample`; keeps the graph.

        0/0, which a critic equal to the teacher gives, is reported as 0.
        """
        (dmd,) = torch.autograd.grad(self.dmd, sample, retain_graph=True)
        (relation,) = torch.autograd.grad(self.relation, sample, retain_graph=True)
        numerator, denominator = self.relation_weight * relation.norm(), dmd.norm()
        return torch.where(numerator == 0, numerator, numerator / denominator)


@dataclass(frozen=True)
class Scores:
    """x0 predictions of noised samples, [B, F, C, H, W]: the critic's, and the teacher's in its parts."""

    fake: Tensor
    real: Tensor
    real_uncond: Tensor | None = None
    augment_real: Tensor | None = None
    """With `augment_uncond`, of the decoupled loss: the teacher at the guidance's own level; `real` is unguided."""
    augment_uncond: Tensor | None = None
    frame_mask: Tensor | None = None
    """[B, F], True where a frame is generated; None where all are."""

    @classmethod
    def cat(cls, scores: Sequence[Scores]) -> Scores:
        """The scores of several micro-batches as those of the joint batch."""
        names = [field.name for field in fields(cls) if getattr(scores[0], field.name) is not None]
        return cls(**{name: torch.cat([getattr(score, name) for score in scores]) for name in names})

    def guided(self, config: DistillConfig) -> Tensor:
        """The teacher's prediction after guidance."""
        if self.real_uncond is None or config.guidance is None:
            return self.real
        form = conventions.resolve(config.convention).guidance_form
        return reference.guided(self.real, self.real_uncond, config.guidance, form)


@torch.no_grad()
def predict_scores(
    sample: Tensor,
    teacher: VideoDenoiser,
    critic: VideoDenoiser,
    config: DistillConfig,
    randomness: Randomness,
    cond: Condition = None,
    student_level: float = 1.0,
) -> Scores:
    """Both scores at the same noised sample, one noise level per sample.

    `sample` is at the level that the recipe's phase ends at, 0 unless an expert ends above it.

    With guidance the teacher's two predictions come from one forward of twice the batch (`batch_guidance`). Decoupled
    (`config.decoupled`), they come from a noising of their own, at levels below `student_level`, that of the student's
    input: what lies above is settled there (arXiv 2511.22677, whose time runs from noise to data: tau > t).
    """
    x0, phase = sample.detach(), config.phase
    sigma = sample_sigma(len(x0), config.shift, phase.sigma_range, randomness, x0.device, drawn=phase.drawn)
    x_t = noised(critic, x0, noise_like(x0, randomness), sigma, phase.end)
    fake = critic.predict_x0(x_t, sigma, cond)
    mask = generated_frames(critic, x0)
    if config.guidance is None:
        return Scores(fake, teacher.predict_x0(x_t, sigma, cond), frame_mask=mask)
    if not config.decoupled:
        return Scores(fake, *_with_and_without(teacher, x_t, sigma, config, cond), frame_mask=mask)
    real = teacher.predict_x0(x_t, sigma, cond)
    lower = sample_sigma(len(x0), config.shift, config.sigma_range, randomness, x0.device, student_level)
    augmented = teacher.add_noise(x0, noise_like(x0, randomness), lower)
    return Scores(fake, real, None, *_with_and_without(teacher, augmented, lower, config, cond), frame_mask=mask)


def generated_frames(model: VideoDenoiser, sample: Tensor) -> Tensor | None:
    """[B, F], True where a frame of `sample` is generated and not given by its condition; None where all are."""
    if not model.known_frames:
        return None
    mask = torch.ones(sample.shape[:2], dtype=torch.bool, device=sample.device)
    mask[:, : model.known_frames] = False
    return mask


def guided_x0(teacher: VideoDenoiser, x_t: Tensor, sigma: Tensor, config: DistillConfig, cond: Condition) -> Tensor:
    """The teacher's x0 with the recipe's guidance."""
    if config.guidance is None:
        return teacher.predict_x0(x_t, sigma, cond)
    form = conventions.resolve(config.convention).guidance_form
    return reference.guided(*_with_and_without(teacher, x_t, sigma, config, cond), config.guidance, form)


@torch.no_grad()
def guided_path(
    teacher: VideoDenoiser, noise: Tensor, levels: Sequence[float], config: DistillConfig, cond: Condition = None
) -> Tensor:
    """The guided teacher's state at the last of `levels`, by Euler steps from `noise` [B, F, C, H, W] at the first."""
    state = noise
    for sigma, following in pairwise(levels):
        level = torch.full((len(noise),), sigma, device=noise.device)
        state = euler_step(state, guided_x0(teacher, state, level, config, cond), sigma, following)
    return state


def _with_and_without(
    teacher: VideoDenoiser, x_t: Tensor, sigma: Tensor, config: DistillConfig, cond: Condition
) -> tuple[Tensor, Tensor]:
    """The teacher's x0 with and without its condition."""
    null = teacher.without_prompt(cond, len(x_t))
    if config.batch_guidance:
        both = teacher.predict_x0(torch.cat((x_t, x_t)), torch.cat((sigma, sigma)), cat_cond((cond, null)))
        with_cond, without = both.chunk(2)
        return with_cond, without
    return teacher.predict_x0(x_t, sigma, cond), teacher.predict_x0(x_t, sigma, null)


def distillation_loss(
    sample: Tensor,
    scores: Scores,
    config: DistillConfig,
    relation_weight: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> GeneratorLoss:
    """DMD + lambda * relation of the student's sample [B, F, C, H, W], given the scores.

    Frames that the condition gives are in no norm, no mean and no row of a relation, and get no gradient.

    Args:
        relation_weight: lambda; None takes the configuration's.
        group: the processes whose samples are related to each other.

    Source: arXiv 2606.21982, the total objective.
    """
    weight = config.relation_weight if relation_weight is None else relation_weight
    convention, mask = conventions.resolve(config.convention), None
    if scores.frame_mask is not None:
        convention, mask = replace(convention, norm_over="selected"), scores.frame_mask[:, :, None, None, None]
    both = config.relation_features == "both"
    terms = ops.codmd_loss(
        sample,
        real=scores.real,
        fake=scores.fake,
        real_uncond=scores.real_uncond,
        augment_real=scores.augment_real,
        augment_uncond=scores.augment_uncond,
        guidance=0.0 if config.guidance is None else config.guidance,
        relation_weight=weight if config.uses_relation else 0.0,
        convention=convention,
        mask=mask,
        frame_mask=scores.frame_mask,
        temperature=config.temperature,
        batch_weight=config.batch_weight,
        frame_weight=config.frame_weight / 2 if both else config.frame_weight,
        layout="bfchw",
        group=group,
        return_terms=True,
        relation_features="level" if both else config.relation_features,
    )
    total, frame = terms.total, terms.frame
    if both and config.uses_relation:
        motion = ops.relation_loss(
            sample, scores.guided(config), scores.fake, temperature=config.temperature, batch_weight=0.0,
            frame_mask=scores.frame_mask, relation_features="difference",
        )  # fmt: skip
        total, frame = total + weight * config.frame_weight / 2 * motion, (frame + motion) / 2
    relation = config.batch_weight * terms.batch + config.frame_weight * frame
    return GeneratorLoss(total, terms.dmd, relation, terms.batch, frame, weight)


def critic_loss(
    critic: VideoDenoiser,
    sample: Tensor,
    config: DistillConfig,
    randomness: Randomness,
    cond: Condition = None,
) -> Tensor:
    """Flow-matching loss of the critic on detached samples: mean squared error of the velocity of generated frames.

    In x0 terms the error of the velocity is (x0 prediction - x0) / sigma, which every parameterisation offers. Samples
    of a phase that ends above level 0 have another target: `phased`.
    """
    phase = config.phase
    sigma = sample_sigma(len(sample), config.shift, phase.sigma_range, randomness, sample.device, drawn=phase.drawn)
    noise = noise_like(sample, randomness)
    x0 = critic.predict_x0(noised(critic, sample, noise, sigma, phase.end), sigma, cond)
    error = velocity_error(x0, sample, noise, sigma, phase.end)
    return error[:, critic.known_frames :].square().mean()
