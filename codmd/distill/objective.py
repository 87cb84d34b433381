"""The two objectives: DMD plus lambda times the relation term for the student, flow matching for the critic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codmd import ops, reference
from codmd.models.base import Condition, VideoDenoiser, per_sample

from .config import DistillConfig
from .rollout import noise_like
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

    def detach(self) -> GeneratorLoss:
        """The same values without their graph."""
        return GeneratorLoss(
            self.total.detach(),
            self.dmd.detach(),
            self.relation.detach(),
            self.relation_batch.detach(),
            self.relation_frame.detach(),
            self.relation_weight,
        )

    def gradient_ratio(self, sample: Tensor) -> Tensor:
        """norm(relation_weight * grad relation) / norm(grad DMD) with respect to `sample`; keeps the graph.

        0/0, which a critic equal to the teacher gives, is reported as 0.
        """
        (dmd,) = torch.autograd.grad(self.dmd, sample, retain_graph=True)
        (relation,) = torch.autograd.grad(self.relation, sample, retain_graph=True)
        numerator, denominator = self.relation_weight * relation.norm(), dmd.norm()
        return torch.where(numerator == 0, numerator, numerator / denominator)


def generator_loss(
    sample: Tensor,
    teacher: VideoDenoiser,
    critic: VideoDenoiser,
    config: DistillConfig,
    generator: torch.Generator,
    cond: Condition = None,
) -> GeneratorLoss:
    """The student's objective on its own sample x [B, F, C, H, W] (with gradient).

    Both scores are predicted at the same noised sample, one noise level per sample; `real` is the teacher's x0
    after guidance, `fake` the critic's.
    """
    with torch.no_grad():
        x0 = sample.detach()
        sigma = sample_sigma(len(x0), config.shift, config.sigma_range, generator, x0.device)
        x_t = critic.add_noise(x0, noise_like(x0, generator), sigma)
        fake = critic.predict_x0(x_t, sigma, cond)
        real = teacher.predict_x0(x_t, sigma, cond)
        if config.guidance is not None:
            uncond = teacher.predict_x0(x_t, sigma, teacher.null_cond(len(x0)))
            real = reference.guided(real, uncond, config.guidance)
    return distillation_loss(sample, fake, real, config)


def distillation_loss(sample: Tensor, fake: Tensor, real: Tensor, config: DistillConfig) -> GeneratorLoss:
    """DMD + lambda * relation of the student's sample, given both scores; all [B, F, C, H, W].

    Source: arXiv 2606.21982, the total objective.
    """
    dmd = reference.dmd_loss(sample, fake, real)
    relation = batch = frame = dmd.new_zeros(())
    if config.uses_relation:
        relation, batch, frame = ops.relation_loss(
            sample,
            real,
            fake,
            temperature=config.temperature,
            batch_weight=config.batch_weight,
            frame_weight=config.frame_weight,
            return_terms=True,
        )
    total = dmd + config.relation_weight * relation
    return GeneratorLoss(total, dmd, relation, batch, frame, config.relation_weight)


def critic_loss(
    critic: VideoDenoiser,
    sample: Tensor,
    config: DistillConfig,
    generator: torch.Generator,
    cond: Condition = None,
) -> Tensor:
    """Flow-matching loss of the critic on detached samples: mean squared error of the velocity.

    In x0 terms the error of the velocity is (x0 prediction - x0) / sigma, which every parameterisation offers.
    """
    sigma = sample_sigma(len(sample), config.shift, config.sigma_range, generator, sample.device)
    x_t = critic.add_noise(sample, noise_like(sample, generator), sigma)
    error = (critic.predict_x0(x_t, sigma, cond) - sample) / per_sample(sigma, sample)
    return error.square().mean()
