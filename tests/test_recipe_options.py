"""Options of the loop, off by default: critic mixing, first-step diversity, decoupled levels, motion, few steps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_distill import GaussianDenoiser, gaussian_distiller, generator, noise, toy_distiller
from train_cases import QUIET, TOY, curve, train

from codmd import cli, ops
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.config.run_config import read_config
from codmd.distill.config.typed import ConfigError
from codmd.distill.update.diversity import first_step_loss
from codmd.distill.update.mixing import mix_critic
from codmd.distill.update.objective import Scores, distillation_loss, predict_scores
from codmd.distill.update.rollout import sample_euler
from codmd.distill.update.schedule import sample_sigma, sampling_sigmas
from codmd.models.base import per_sample

CPU = torch.device("cpu")


class Conditional(GaussianDenoiser):
    """Its velocity falls by the condition."""

    def forward(self, x_t, sigma, cond=None):
        shift = torch.zeros(len(x_t)) if cond is None else cond
        return super().forward(x_t, sigma) - per_sample(shift, x_t)

    def null_cond(self, batch):
        return torch.zeros(batch)


# Critic mixing


def test_mixing_moves_the_critic_by_the_share_and_leaves_the_student():
    critic, student = {"a": torch.zeros(3), "b": torch.ones(2)}, {"a": torch.ones(3), "b": torch.full((2,), 3.0)}
    mix_critic(critic, student, 0.03)
    torch.testing.assert_close(critic, {"a": torch.full((3,), 0.03), "b": torch.full((2,), 1.06)})
    assert torch.equal(student["b"], torch.full((2,), 3.0))


def test_the_critic_is_mixed_once_a_cycle_after_an_update_that_was_made():
    config = DistillConfig(batch_size=4, critic_updates=1, critic_mixing=0.5)
    mixed, plain = (gaussian_distiller(replace(config, critic_mixing=share)) for share in (0.5, 0.0))
    for distiller in (mixed, plain):
        with torch.no_grad():
            distiller.student.mean.fill_(1.0)
        distiller.critic_update = lambda batches: (torch.zeros(()), None)  # what is left is the mixing
        distiller.cycle()
    assert not plain.critic.mean.detach().any()
    torch.testing.assert_close(mixed.critic.mean, 0.5 * mixed.student.mean)
    with torch.no_grad():
        mixed.student.mean.fill_(float("nan"))
    before = mixed.critic.mean.detach().clone()
    mixed.cycle()
    assert torch.equal(mixed.critic.mean, before)


# First-step diversity


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_the_first_step_loss_is_zero_for_the_velocity_that_reaches_the_teacher_s_state(guidance):
    config = DistillConfig(guidance=guidance, diversity_weight=0.05, diversity_steps=(3, 12))
    teacher, start, cond = Conditional(mean=0.5, spread=0.3), noise(4), torch.tensor([0.0, 1.0, 2.0, 3.0])
    levels = sampling_sigmas(12, config.shift)
    scale = 1.0 if guidance is None else 1.0 + guidance  # cond + 1 (cond - uncond), affine in the condition
    path = start
    for sigma, following in itertools.pairwise(levels[:4]):
        level = torch.full((4,), sigma)
        x0 = teacher.predict_x0(path, level, torch.zeros(4))
        x0 = x0 + scale * (teacher.predict_x0(path, level, cond) - x0)
        path = path + (following - sigma) * (path - x0) / sigma
    target = (start - path) / (1 - levels[3])

    class Student(GaussianDenoiser):
        def predict_x0(self, x_t, sigma, cond=None):
            assert bool((sigma == 1).all())
            return x_t - target + self.mean

    student = Student(mean=0.0)
    assert float(first_step_loss(student, teacher, start, config, cond).detach()) < 1e-11
    with torch.no_grad():
        student.mean.fill_(0.2)
    assert float(first_step_loss(student, teacher, start, config, cond).detach()) == pytest.approx(0.04, rel=1e-4)
    assert teacher.mean.grad is None


def test_the_path_is_the_beginning_of_the_teacher_s_own_sampling():
    config = DistillConfig(diversity_weight=1.0, diversity_steps=(3, 4))
    teacher, student, start = GaussianDenoiser(0.5, 0.3), GaussianDenoiser(0.5, 0.3), noise(8)
    first_step_loss(student, teacher, start, config)
    taken = list(teacher.calls)
    teacher.calls.clear()
    sample_euler(teacher, start, sampling_sigmas(4, config.shift))
    assert taken == teacher.calls[:3]
    assert student.calls == [1.0]
    assert student.calls_with_gradient == 1


def test_with_diversity_distribution_matching_trains_the_later_steps_alone_and_the_log_has_the_loss():
    distiller = gaussian_distiller(DistillConfig(batch_size=4, diversity_weight=0.05, diversity_steps=(2, 8)))
    logs = [distiller.cycle() for _ in range(30)]
    assert {log.exit_step for log in logs} == {1, 2, 3}
    assert all(float(log.scalars()["diversity"]) > 0 for log in logs)
    assert "diversity" not in gaussian_distiller(DistillConfig(batch_size=4)).cycle().scalars()


def test_the_first_step_gradient_is_the_weighted_loss_s(monkeypatch):
    config = DistillConfig(batch_size=4, micro_batch=2, diversity_weight=0.5, diversity_steps=(2, 8))
    distiller, kept = toy_distiller(config, 3), []
    monkeypatch.setattr(distiller, "_student_gradients", lambda measure: pytest.fail("not asked for"))
    state = distiller.noise.generator.get_state()
    loss = distiller._first_step_gradients()
    kept = [w.grad.clone() for w in distiller.student_weights.values()]
    distiller.noise.generator.set_state(state)
    both = torch.stack(
        [first_step_loss(distiller.student, distiller.teacher, distiller._start(), config) for _ in range(2)]
    ).mean()
    expected = torch.autograd.grad(0.5 * both, list(distiller.student_weights.values()))
    torch.testing.assert_close(kept, list(expected))
    torch.testing.assert_close(loss, both.detach())


# Decoupled noise levels


@pytest.mark.parametrize("level", [1.0, 0.5])
def test_decoupled_guidance_has_a_level_of_its_own_below_the_student_s(level):
    config = DistillConfig(guidance=2.0, decoupled=True, relation_weight=0.0)
    teacher, critic = Conditional(mean=1.0), Conditional(mean=0.3)
    x, cond = noise(16).requires_grad_(), torch.linspace(0, 1, 16)
    scores = predict_scores(x, teacher, critic, config, generator(5), cond, level)
    draws = generator(5)
    first = sample_sigma(16, config.shift, config.sigma_range, draws, CPU)
    x_t = critic.add_noise(x.detach(), torch.randn(x.shape, generator=draws), first)
    second = sample_sigma(16, config.shift, config.sigma_range, draws, CPU, highest=level)
    lower = critic.add_noise(x.detach(), torch.randn(x.shape, generator=draws), second)
    assert float(second.max()) <= max(level, config.sigma_range[0])
    with torch.no_grad():
        c1, fake = teacher.predict_x0(x_t, first, cond), critic.predict_x0(x_t, first, cond)
        c2, u2 = (teacher.predict_x0(lower, second, c) for c in (cond, torch.zeros(16)))
    for got, expected in zip((scores.real, scores.fake, scores.augment_real, scores.augment_uncond), (c1, fake, c2, u2),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(got, expected)
    assert scores.real_uncond is None
    loss = distillation_loss(x, scores, config).total
    expected = ops.dmd_loss(x, real=c1, fake=fake, augment_real=c2, augment_uncond=u2, guidance=2.0)
    torch.testing.assert_close(loss, expected)
    joint = Scores.cat([scores, scores])
    assert joint.augment_uncond.shape[0] == 32


def test_the_loop_gives_decoupled_guidance_the_level_of_the_student_s_input(monkeypatch):
    config = DistillConfig(batch_size=2, guidance=1.0, decoupled=True)
    distiller, levels = gaussian_distiller(config), []
    from codmd.distill.update import trainer

    def spy(*arguments):
        levels.append(arguments[-1])
        x0 = arguments[0].detach()
        return Scores(x0 + 0.1, x0 - 0.1, None, x0, x0)

    monkeypatch.setattr(trainer, "predict_scores", spy)
    for _ in range(8):
        exit_step = distiller.cycle().exit_step
        assert levels[-1] == config.sigmas[exit_step]
    assert len(set(levels)) > 1


# Motion features, few steps, images


@pytest.mark.parametrize("kind", ["difference", "centred"])
def test_the_recipe_s_motion_features_reach_the_frame_term_alone(kind):
    x, fake, real = (noise(4, seed) for seed in range(3))
    x.requires_grad_()
    config = DistillConfig(relation_features=kind)
    loss = distillation_loss(x, Scores(fake, real), config)
    expected = ops.relation_loss(x, real, fake, relation_features=kind, return_terms=True)
    torch.testing.assert_close((loss.relation_batch, loss.relation_frame), (expected.batch, expected.frame))
    level = distillation_loss(x, Scores(fake, real), DistillConfig())
    assert float(level.relation_frame.detach()) != pytest.approx(float(loss.relation_frame.detach()), rel=1e-3)


def test_both_features_are_the_mean_of_the_two_frame_terms():
    x, fake, real = (noise(4, seed) for seed in range(3))
    x.requires_grad_()
    parts = {
        kind: distillation_loss(x, Scores(fake, real), DistillConfig(relation_features=kind, frame_weight=0.7))
        for kind in ("level", "difference", "both")
    }
    for term in ("relation", "relation_frame", "relation_batch", "total"):
        level, difference, both = (getattr(parts[kind], term) for kind in ("level", "difference", "both"))
        torch.testing.assert_close(both, (level + difference) / 2)
    gradients = [torch.autograd.grad(parts[kind].total, x)[0] for kind in ("level", "difference", "both")]
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.5)])
def test_students_of_one_and_two_steps_reach_the_teacher(sigmas):
    config = DistillConfig(
        sigmas=sigmas, student_lr=0.03, critic_lr=0.06, betas=(0.0, 0.9), batch_size=16, critic_mixing=0.03
    )
    distiller = gaussian_distiller(config)
    exits = {distiller.cycle().exit_step for _ in range(150)}
    assert exits == set(range(len(sigmas)))
    assert distiller.student.mean.mean().item() == pytest.approx(2.0, abs=0.25)


ALL = [
    "distill.critic_mixing=0.03",
    "distill.diversity_weight=0.05",
    "distill.diversity_steps=[2,8]",
    "distill.relation_features=difference",
]


def test_a_resumed_run_with_every_option_is_the_undisturbed_one(tmp_path, capsys):
    train(*TOY, QUIET, *ALL, "updates=6", f"out={tmp_path / 'whole'}")
    train(*TOY, QUIET, *ALL, "updates=3", f"out={tmp_path / 'parts'}")
    train(*TOY, QUIET, *ALL, "updates=6", f"out={tmp_path / 'parts'}")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert all(line["diversity"] > 0 for line in curve(tmp_path / "whole"))


def test_images_are_videos_of_one_frame_and_have_the_batch_relation_alone(tmp_path):
    train(*TOY, QUIET, "model.frames=1", "distill.batch_weight=1.0", "updates=3", f"out={tmp_path}")
    lines = curve(tmp_path)
    assert len(lines) == 3
    assert all(line["relation_frame"] == 0 < line["relation_batch"] for line in lines[1:])


def test_the_dry_run_names_the_options_that_are_on(tmp_path, capsys):
    assert cli.main(["train", "toy", "--dry-run", *ALL, f"out={tmp_path / 'run'}"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe: "))
    for part in ("4-step student", "difference features", "critic mixing 0.03", "first-step diversity 0.05 (2 of 8"):
        assert part in line
    assert "decoupled" not in line
    guided = DistillConfig(guidance=3.0, decoupled=True)
    assert "decoupled guidance" in guided.summary


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.diversity_weight=0.05", "distill.sigmas=[1.0]"], "distill.diversity_weight: got a student of one"),
        (
            ["distill.decoupled=true", "distill.guidance=1.0", "distill.convention=lightx2v_pdmd"],
            "distill.decoupled: not with",
        ),
        (["distill.critic_mixing=0.03", "lora.rank=2"], "distill.critic_mixing: the average of two adapters"),
    ],
)
def test_options_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_config("toy", overrides)
