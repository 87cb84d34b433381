"""Frames that the condition gives: in no loss, no norm and no relation, and without a gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codmd.conventions import resolve
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.update.diversity import first_step_loss
from codmd.distill.update.objective import Scores, critic_loss, distillation_loss, generated_frames, predict_scores
from codmd.distill.update.rollout import rollout, sample_few_step
from codmd.distill.update.trainer import Distiller
from codmd.models.toy import ToyConfig, ToyDenoiser

FRAMES = 4


class Given(ToyDenoiser):
    """A toy whose first frame is its condition, [B, 1, C, 1, 1], in the place of x_t's."""

    known_frames = 1

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__(ToyConfig(frames=FRAMES, channels=3, width=16, blocks=1))
        torch.nn.init.normal_(self.output[1].weight, std=0.3)

    def forward(self, x_t, sigma, cond=None):
        return super().forward(self.with_known_frames(x_t, cond), sigma)

    def with_known_frames(self, latents, cond):
        return torch.cat((cond, latents[:, 1:]), dim=1)


def given(seed=0, batch=3):
    return torch.randn(batch, 1, 3, 1, 1, generator=torch.Generator().manual_seed(seed))


def latents(seed):
    return torch.randn(3, FRAMES, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def loss_and_gradient(config, sample, real, fake, mask):
    sample = sample.clone().requires_grad_()
    loss = distillation_loss(sample, Scores(fake, real, frame_mask=mask), config)
    return loss, torch.autograd.grad(loss.total, sample)[0]


@pytest.mark.parametrize("features", ["level", "difference", "centred"])
@pytest.mark.parametrize("convention", ["codmd", "rcm", "fastgen", "fastvideo_legacy", "diffsynth", "tdm"])
def test_a_known_frame_is_as_if_it_were_not_there(convention, features):
    config = DistillConfig(convention=convention, relation_weight=0.5, relation_features=features)
    sample, real, fake = (latents(seed) for seed in range(3))
    mask = generated_frames(Given(), sample)
    assert mask.tolist() == [[False, True, True, True]] * 3
    loss, gradient = loss_and_gradient(config, sample, real, fake, mask)
    alone, inner = loss_and_gradient(config, sample[:, 1:], real[:, 1:], fake[:, 1:], None)
    assert gradient[:, :1].abs().max() == 0
    for name in ("total", "dmd", "relation_frame", "relation_batch"):
        torch.testing.assert_close(getattr(loss, name), getattr(alone, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[:, 1:], inner, rtol=1e-4, atol=1e-6)
    far = [torch.cat((1e3 * torch.randn(3, 1, 3, 2, 2), value[:, 1:]), dim=1) for value in (sample, real, fake)]
    other, same = loss_and_gradient(config, *far, mask)
    torch.testing.assert_close(other.total, loss.total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(loss_and_gradient(config, *far, None)[0].dmd, loss.dmd, rtol=1e-2)


def test_blocks_of_frames_count_from_the_first_frame():
    """LongLive's norm: the block with the known frame is that of its other frames."""
    rule = replace(resolve("longlive"), norm_block=2)
    config = DistillConfig(relation_weight=0)
    object.__setattr__(config, "convention", rule)
    sample, real, fake = (latents(seed) for seed in range(3))
    _, gradient = loss_and_gradient(config, sample, real, fake, generated_frames(Given(), sample))
    norm = (sample - real)[:, 1:2].abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(gradient[:, 1:2], (fake - real)[:, 1:2] / norm / (3 * 3 * 3 * 2 * 2))


def test_samples_begin_with_the_given_frame_and_scores_know_it():
    student, cond = Given(), given()
    noise, generator = torch.randn(3, FRAMES, 3, 1, 1), torch.Generator().manual_seed(1)
    sample = rollout(student, noise, (1.0, 0.5), 1, generator, cond)
    assert torch.equal(sample[:, :1], cond)
    assert torch.equal(sample_few_step(student, noise, (1.0, 0.5), generator, cond)[:, :1], cond)
    scores = predict_scores(sample, student, student, DistillConfig(guidance=None), generator, cond)
    assert torch.equal(scores.fake[:, :1], cond)
    assert torch.equal(scores.frame_mask, generated_frames(student, sample))
    assert torch.equal(Scores.cat([scores, scores]).frame_mask, scores.frame_mask.repeat(2, 1))
    assert generated_frames(ToyDenoiser(), sample) is None


def test_critic_and_first_step_average_over_generated_frames():
    model, cond = Given(), given()
    sample, noise = torch.randn(3, FRAMES, 3, 1, 1), torch.randn(3, FRAMES, 3, 1, 1)
    elsewhere = torch.cat((sample[:, :1] + 100, sample[:, 1:]), dim=1)
    in_place = model.with_known_frames(sample, cond)

    def critic(value):
        config = DistillConfig(shift=1.0, sigma_range=(0.5, 0.6))
        return critic_loss(model, value, config, torch.Generator().manual_seed(0), cond)

    def first_step():
        return first_step_loss(model, model, noise, DistillConfig(diversity_steps=(1, 2)), cond)

    torch.testing.assert_close(critic(elsewhere), critic(sample))
    generated = critic(in_place), first_step()
    model.known_frames = 0
    everywhere = critic(in_place), first_step()
    for ours, theirs in zip(generated, everywhere, strict=True):
        torch.testing.assert_close(ours, theirs * FRAMES / (FRAMES - 1))


@pytest.mark.parametrize("window", [False, True])
def test_training_takes_each_samples_own_first_frame(window):
    config = DistillConfig(
        batch_size=4, micro_batch=2, relation_accumulate=window, critic_updates=1, sigmas=(1.0, 0.5), student_lr=1e-2
    )
    teacher, student, critic = Given(0), Given(0), Given(1)
    seen = []

    def conditions():
        for seed in range(100):
            seen.append(given(seed, batch=2))
            yield seen[-1]

    trainer = Distiller(teacher, student, critic, config, conditions=conditions())
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    for _ in range(2):
        log = trainer.cycle(measure_gradients=True)
        assert torch.isfinite(log.generator.total)
    assert len(seen) == 4
    assert any(not torch.equal(before[name], weight) for name, weight in student.state_dict().items())
