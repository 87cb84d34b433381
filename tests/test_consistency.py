"""rCM and sCM: TrigFlow, the consistency term and its trainers, on models with known answers."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import relative_error
from test_distill import SHAPE, GaussianDenoiser, generator

from codmd.demo.arc import ArcVideo
from codmd.demo.teacher import TeacherConfig, train_teacher
from codmd.distill.config.consistency import ConsistencyConfig
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.update.consistency import consistency_loss, sample_time
from codmd.distill.update.methods import ConsistencyDistiller, RegularisedDistiller, consistency_trainer
from codmd.distill.update.rollout import sample_euler, sample_few_step
from codmd.distill.update.schedule import sampling_sigmas
from codmd.distill.update.trigflow import cos_sin, field, field_difference, field_jvp, level_of, time_of
from codmd.metrics import energy_distance
from codmd.models.base import per_sample
from codmd.models.toy import ToyConfig, ToyDenoiser

MEAN, SPREAD = 0.7, 1.3
RCM_LEVELS = (0.98765, 0.93378, 0.85290, 0.60898)
SETTINGS = ConsistencyConfig(warmup=0)
RECIPE = DistillConfig(
    method="rcm", consistency=SETTINGS, sigmas=RCM_LEVELS, batch_size=4, convention="rcm", relation_weight=0.0,
    critic_updates=4, share_rollout=False,
)  # fmt: skip


class ExactStudent(GaussianDenoiser):
    """The velocity whose f(x, t) is the end of the Gaussian's own path: x0 = mean + spread (x - cos t mean)/sd(x_t)."""

    def forward(self, x_t, sigma, cond=None):
        t = time_of(sigma.double())
        cos, sin = cos_sin(t, x_t.double())
        x = (cos + sin) * x_t
        deviation = (cos.square() * self.spread**2 + sin.square()).sqrt()
        x0 = self.mean + self.spread * (x - cos * self.mean) / deviation
        return (cos * x - x0) / sin * (cos + sin) + (sin - cos) * x


def videos(x0, cond=None):
    return itertools.repeat((x0, cond))


def points(batch=6):
    x_t = torch.randn(batch, *SHAPE, generator=generator(1), dtype=torch.float64)
    return x_t, torch.linspace(0.05, math.pi / 2 - 0.01, batch, dtype=torch.float64)


# TrigFlow


def test_times_and_levels_are_inverse_and_the_published_steps_are_those_of_rcm():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(level_of(time_of(sigma)), sigma)
    times = torch.tensor([math.atan(80), 1.5, 1.4, 1.0], dtype=torch.float64)
    assert level_of(times).tolist() == pytest.approx(RCM_LEVELS, abs=5e-6)


def test_the_field_is_the_velocity_of_the_path_and_predicts_x0():
    model = GaussianDenoiser(MEAN, SPREAD)
    x_t, t = points()
    cos, sin = cos_sin(t, x_t)
    x0 = model.predict_x0((x_t / (cos + sin)).float(), level_of(t).float())
    torch.testing.assert_close((cos * x_t - sin * field(model, x_t, t)).float(), x0, rtol=1e-5, atol=1e-5)


def test_times_are_log_normal_and_each_sample_has_its_own():
    t = sample_time(4000, ConsistencyConfig(log_mean=0.7, log_std=1.6), generator(), torch.device("cpu"))
    logs = t.tan().log()
    assert logs.mean() == pytest.approx(0.7, abs=0.1)
    assert logs.std() == pytest.approx(1.6, abs=0.1)


def test_the_tangent_agrees_with_central_differences():
    torch.manual_seed(0)
    model = ToyDenoiser(ToyConfig(frames=3, channels=2, width=32, blocks=2, frequencies=4))
    torch.nn.init.normal_(model.blocks[0].down.weight)
    x_t, t = points()
    direction = torch.randn(x_t.shape, generator=generator(2), dtype=torch.float64)
    arguments = model, x_t, t, direction, t.cos() * t.sin()
    exact, difference = field_jvp(*arguments), field_difference(*arguments)
    assert relative_error(difference, exact) < 0.02
    assert relative_error(field_jvp(*arguments[:4], torch.zeros_like(t)), exact) > 0.05  # the time counts


# The consistency term


@pytest.mark.parametrize("method", ["rcm", "scm"])
def test_the_exact_consistency_function_has_no_loss_after_the_warm_up(method):
    teacher, student = GaussianDenoiser(MEAN, SPREAD), ExactStudent(MEAN, SPREAD)
    x0 = MEAN + SPREAD * torch.randn(8, *SHAPE, generator=generator(3))
    recipe = replace(RECIPE, method=method)
    found = consistency_loss(student, teacher, x0, recipe, generator(4), 1.0)
    other = consistency_loss(GaussianDenoiser(MEAN, SPREAD), teacher, x0, recipe, generator(4), 1.0)
    assert found.loss < 1e-5 * other.loss
    assert found.tangent_norm < 1e-3 * other.tangent_norm


def test_the_teacher_s_own_field_has_no_tangent_at_the_warm_up_s_beginning_but_the_jvp():
    """At r = 0 what is left of g is cos t sin t dF/dt in rCM, and nothing in sCM."""
    teacher = GaussianDenoiser(MEAN, SPREAD)
    x0 = torch.randn(4, *SHAPE, generator=generator(3))
    rcm, scm = (
        consistency_loss(copy.deepcopy(teacher), teacher, x0, replace(RECIPE, method=m), generator(4), 0.0)
        for m in ("rcm", "scm")
    )
    assert scm.loss == 0
    assert rcm.loss > 1
    assert rcm.derivative_norm == scm.derivative_norm > 0


def test_the_gradient_moves_the_student_towards_the_teacher():
    teacher = GaussianDenoiser(0.0, 1.0)
    student = GaussianDenoiser(0.5, 1.0)
    x0 = torch.randn(200, *SHAPE, generator=generator(3))
    consistency_loss(student, teacher, x0, RECIPE, generator(4), 1.0).loss.backward()
    assert (student.mean.grad > 0).all()  # whose mean is 0


class Broken(GaussianDenoiser):
    def forward(self, x_t, sigma, cond=None):
        v = super().forward(x_t, sigma, cond)
        return torch.where(torch.arange(len(v)).view(-1, 1, 1, 1, 1) == 1, torch.nan, v)


def test_a_sample_that_is_not_a_number_is_dropped():
    x0 = torch.randn(3, *SHAPE, generator=generator(3))
    found = consistency_loss(GaussianDenoiser(0.5), Broken(0.0), x0, RECIPE, generator(4), 1.0)
    assert found.dropped == 1
    assert found.tangent_norm > 0
    assert found.derivative_norm > 0
    assert found.loss.isfinite()
    student = GaussianDenoiser(0.5)
    consistency_loss(student, Broken(0.0), x0, RECIPE, generator(4), 1.0).loss.backward()
    assert student.mean.grad.isfinite().all()


def test_the_field_is_guided_in_the_form_of_the_convention():
    class Conditional(GaussianDenoiser):
        def forward(self, x_t, sigma, cond=None):
            return super().forward(x_t, sigma) + (0.0 if cond == "null" else 0.3)

    x0 = torch.randn(4, *SHAPE, generator=generator(3))
    recipe = replace(RECIPE, guidance=5.0, batch_guidance=False)
    teacher = Conditional(MEAN, SPREAD)
    student = Conditional(MEAN, SPREAD)
    none = consistency_loss(student, teacher, x0, replace(recipe, guidance=1.0), generator(4), 1.0, "prompt")
    plain = consistency_loss(student, teacher, x0, replace(recipe, guidance=None), generator(4), 1.0, "prompt")
    strong = consistency_loss(student, teacher, x0, recipe, generator(4), 1.0, "prompt")
    assert float(none.tangent_norm) == pytest.approx(float(plain.tangent_norm))  # u + 1 (c - u)
    assert abs(strong.tangent_norm - plain.tangent_norm) > 0.05


# The trainers


def trainers(method="rcm", **changes):
    recipe = replace(RECIPE, method=method, student_lr=1e-2, critic_lr=1e-2, **changes)
    teacher, student, critic = (GaussianDenoiser(MEAN, SPREAD) for _ in range(3))
    x0 = MEAN + SPREAD * torch.randn(4, *SHAPE, generator=generator(3))
    if method == "scm":
        return ConsistencyDistiller(teacher, student, recipe, 0, None, videos(x0)), teacher, student, critic
    return RegularisedDistiller(teacher, student, critic, recipe, 0, None, videos(x0)), teacher, student, critic


def test_forwards_of_a_cycle_are_counted():
    """One teacher field, one tangent and one field of the student; then the score term and four critic updates."""
    trainer, teacher, student, critic = trainers()
    trainer.cycle()
    trainer.cycle()  # rollouts of two steps
    for model in (teacher, student, critic):
        model.calls.clear()
        model.calls_with_gradient = 0
    log = trainer.cycle()
    assert log.steps == 3
    assert len(teacher.calls) == 1 + 1
    assert len(student.calls) == 2 + 3 + 4 * 3
    assert student.calls_with_gradient == 1 + 1
    assert len(critic.calls) == 1 + 4
    assert critic.calls_with_gradient == 4


def test_only_the_consistency_term_trains_before_the_warm_up_ends():
    trainer, _, student, critic = trainers(consistency=ConsistencyConfig(warmup=2))
    for expected in (0.5, 1.0):
        log = trainer.cycle()
        assert log.warmth == expected
        assert log.generator is None
    assert len(critic.calls) == 0
    assert len(student.calls) == 2 * 2
    assert trainer.cycle().generator is not None


def test_rollouts_have_one_to_four_steps_in_turn_at_falling_levels():
    trainer, _, student, _ = trainers()
    for steps in (1, 2, 3, 4, 1):
        trainer.update = steps if steps > 1 else trainer.update + 1
        student.calls.clear()
        trainer.draw_sample(None)
        assert len(student.calls) == (trainer.update - 1) % 4 + 1
        assert student.calls[0] == 1.0
        assert student.calls == sorted(student.calls, reverse=True)


def test_scm_trains_the_student_alone():
    trainer, teacher, student, critic = trainers("scm")
    before = student.mean.detach().clone()
    scalars = trainer.cycle().scalars()
    assert not torch.equal(student.mean, before)
    assert (len(teacher.calls), len(student.calls), len(critic.calls)) == (1, 2, 0)
    assert {"loss", "tangent_norm", "derivative_norm"} <= set(scalars)
    assert set(trainer.optimizers) == {"student"}


def test_micro_batches_give_the_gradient_of_their_mean():
    found = []
    for micro_batch in (4, 2):
        trainer, _, student, _ = trainers("scm", micro_batch=micro_batch)
        parts = itertools.cycle(torch.ones(4, *SHAPE).split(micro_batch))
        trainer.videos = ((part, None) for part in parts)
        trainer.cycle()
        found.append(len(student.calls))
    assert found == [2, 4]


def test_the_relation_is_weighed_against_half_a_mean():
    trainer, *_ = trainers(relation_weight=0.1)
    log = trainer.cycle()
    elements = 4 * math.prod(SHAPE)
    assert log.generator.relation_weight == pytest.approx(0.1 * 2 * elements)


def test_scm_refuses_a_relation_weight():
    with pytest.raises(ValueError, match="relation_weight: scm has no scores to relate"):
        DistillConfig(method="scm")
    for option in ({"critic_mixing": 0.03}, {"diversity_weight": 0.05}, {"decoupled": True, "guidance": 3.0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: an option of method dmd; method rcm does not"):
            DistillConfig(method="rcm", **option)


def test_a_rollout_may_begin_below_pure_noise():
    model = GaussianDenoiser(MEAN, SPREAD)
    noise = torch.randn(2, *SHAPE, generator=generator())
    sample_few_step(model, noise, RCM_LEVELS, generator(1))
    assert model.calls == pytest.approx(RCM_LEVELS)
    first = model.predict_x0(RCM_LEVELS[0] * noise, torch.full((2,), RCM_LEVELS[0]))
    torch.testing.assert_close(sample_few_step(model, noise, RCM_LEVELS[:1], generator(1)), first)


def test_per_sample_levels_keep_float64():
    assert per_sample(torch.ones(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)).dtype == torch.float64


# The power-law average


def test_a_power_law_average_has_the_width_it_was_given():
    recipe = replace(RECIPE, ema_width=0.1)
    updates = 2000
    weights = torch.zeros(updates, dtype=torch.float64)
    for update in range(1, updates + 1):
        decay = recipe.ema_decay_at(update)
        weights *= decay
        weights[update - 1] += 1 - decay
    places = torch.arange(1, updates + 1, dtype=torch.float64) / updates
    mean = (weights * places).sum()
    assert float(weights.sum()) == pytest.approx(1)
    assert float((weights * (places - mean).square()).sum().sqrt()) == pytest.approx(0.1, abs=1e-3)


def test_the_power_law_average_follows_the_student():
    trainer, _, student, _ = trainers("scm", ema_width=0.1)
    trainer.cycle()
    assert torch.equal(trainer.average.average["mean"], student.mean)  # the first update counts alone
    trainer.cycle()
    assert not torch.equal(trainer.average.average["mean"], student.mean)


# The toy teacher


@pytest.fixture(scope="module")
def toy():
    """(teacher of moving arcs, its data), much smaller and less trained than the demo's."""
    config = TeacherConfig(steps=400, batch_size=256, warmup=50, model=ToyConfig(width=64, blocks=2))
    return train_teacher(config, lambda: None).requires_grad_(False), ArcVideo(config.arc)


@pytest.mark.parametrize("method", ["rcm", "scm"])
def test_a_student_of_four_steps_beats_four_plain_steps_of_its_teacher(method, toy):
    teacher, data = toy
    real, noise = data.sample(500, generator(5)), torch.randn(500, *teacher.latent_shape, generator=generator(6))
    plain = energy_distance(sample_euler(teacher, noise, sampling_sigmas(4, 3.0)), real)
    recipe = replace(
        RECIPE, method=method, consistency=ConsistencyConfig(log_mean=0.0, warmup=60), batch_size=64,
        student_lr=3e-4, critic_lr=3e-4,
    )  # fmt: skip
    student, critic = (copy.deepcopy(teacher).requires_grad_() for _ in range(2))
    drawing = generator(7)
    stream = ((data.sample(64, drawing), None) for _ in itertools.count())
    trainer = consistency_trainer(teacher, student, critic, recipe, 0, None, stream, None)
    for _ in range(150):
        trainer.cycle()
    found = energy_distance(sample_few_step(student, noise, RCM_LEVELS, generator(8)), real)
    assert found < 0.6 * plain
