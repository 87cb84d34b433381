"""The two objectives: DMD plus lambda times the relation term for the student, flow matching for the critic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from codmd import conventions, ops, reference
from codmd.distill.config.recipe import DistillConfig
from codmd.models.base import Condition, VideoDenoiser, cat_cond, per_sample

from .noise import Randomness, noise_like
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
    """x0 predictions of one noised sample, [B, F, C, H, W]: the critic's, and the teacher's in its two parts."""

    fake: Tensor
    real: Tensor
    real_uncond: Tensor | None = None

    @classmethod
    def cat(cls, scores: Sequence[Scores]) -> Scores:
        """The scores of several micro-batches as those of the joint batch."""
        uncond = [score.real_uncond for score in scores if score.real_uncond is not None]
        return cls(
            torch.cat([score.fake for score in scores]),
            torch.cat([score.real for score in scores]),
            torch.cat(uncond) if uncond else None,
        )

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
) -> Scores:
    """Both scores at the same noised sample, one noise level per sample.

    With guidance the teacher's two predictions come from one forward of twice the batch (`batch_guidance`).
    """
    x0 = sample.detach()
    sigma = sample_sigma(len(x0), config.shift, config.sigma_range, randomness, x0.device)
    x_t = critic.add_noise(x0, noise_like(x0, randomness), sigma)
    fake = critic.predict_x0(x_t, sigma, cond)
    if config.guidance is None:
        return Scores(fake, teacher.predict_x0(x_t, sigma, cond))
    null = teacher.null_cond(len(x0))
    if config.batch_guidance:
        both = teacher.predict_x0(torch.cat((x_t, x_t)), torch.cat((sigma, sigma)), cat_cond((cond, null)))
        return Scores(fake, *both.chunk(2))
    return Scores(fake, teacher.predict_x0(x_t, sigma, cond), teacher.predict_x0(x_t, sigma, null))


def distillation_loss(
    sample: Tensor,
    scores: Scores,
    config: DistillConfig,
    relation_weight: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> GeneratorLoss:
    """DMD + lambda * relation of the student's sample [B, F, C, H, W], given the scores.

    Args:
        relation_weight: lambda; None takes the configuration's.
        group: the processes whose samples are related to each other.

    Source: arXiv 2606.21982, the total objective.
    """
    weight = config.relation_weight if relation_weight is None else relation_weight
    terms = ops.codmd_loss(
        sample,
        real=scores.real,
        fake=scores.fake,
        real_uncond=scores.real_uncond,
        guidance=0.0 if config.guidance is None else config.guidance,
        relation_weight=weight if config.uses_relation else 0.0,
        convention=config.convention,
        temperature=config.temperature,
        batch_weight=config.batch_weight,
        frame_weight=config.frame_weight,
        layout="bfchw",
        group=group,
        return_terms=True,
    )
    relation = config.batch_weight * terms.batch + config.frame_weight * terms.frame
    return GeneratorLoss(terms.total, terms.dmd, relation, terms.batch, terms.frame, weight)


def critic_loss(
    critic: VideoDenoiser,
    sample: Tensor,
    config: DistillConfig,
    randomness: Randomness,
    cond: Condition = None,
) -> Tensor:
    """Flow-matching loss of the critic on detached samples: mean squared error of the velocity.

    In x0 terms the error of the velocity is (x0 prediction - x0) / sigma, which every parameterisation offers.
    """
    sigma = sample_sigma(len(sample), config.shift, config.sigma_range, randomness, sample.device)
    x_t = critic.add_noise(sample, noise_like(sample, randomness), sigma)
    error = (critic.predict_x0(x_t, sigma, cond) - sample) / per_sample(sigma, sample)
    return error.square().mean()
