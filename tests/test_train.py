"""The update rule on real networks: its cost, accumulation, averages, guards, adapters, and what it learns."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from codmd import models
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.config.sections import TeacherSettings
from codmd.distill.update import trainer as trainer_module
from codmd.distill.update.cycle_log import collapse_ratios
from codmd.distill.update.ema import WeightAverage
from codmd.distill.update.noise import noise_like
from codmd.distill.update.objective import Scores, distillation_loss, predict_scores
from codmd.distill.update.optimizer import GuardedAdamW, NonFiniteRun, trainable_weights
from codmd.distill.update.rollout import sample_few_step, trajectory
from codmd.distill.update.teacher import FlowMatching
from codmd.distill.update.trainer import Distiller
from codmd.models.lora import LoraOptions, LoraRoles
from codmd.models.toy import ToyConfig, ToyDenoiser

SMALL = ToyConfig(frames=4, channels=4, width=32, blocks=1)


class Counting(ToyDenoiser):
    """Counts network forwards per sample: 1 without gradient; 4 with (backward is 2, its recomputation 1)."""

    def __init__(self, batch):
        super().__init__(SMALL)
        self.batch, self.cost = batch, 0.0

    def forward(self, x_t, sigma, cond=None):
        self.cost += (4 if torch.is_grad_enabled() else 1) * len(x_t) / self.batch
        return super().forward(x_t, sigma)

    def null_cond(self, batch):
        return torch.zeros(batch, 1)


def toy_roles(scale=0.1, config=SMALL, critic_error=0.0):
    """Teacher, student and critic of one network; `critic_error` perturbs the critic, so that there is a gradient."""
    torch.manual_seed(0)
    teacher = ToyDenoiser(config).requires_grad_(False)
    for block in teacher.blocks:
        nn.init.normal_(block.down.weight, std=scale)
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    with torch.no_grad():
        for weight in critic.parameters():
            weight.add_(critic_error * torch.randn_like(weight))
    return teacher, student, critic


def flat(weights):
    return torch.cat([weight.detach().flatten() for weight in weights.values()])


def gradients(monkeypatch, distiller):
    """The student's gradient of one cycle, and its log."""
    kept = []

    def keep(_loss):
        kept.append(torch.cat([w.grad.flatten().clone() for w in distiller.student_weights.values()]))
        return trainer_module.Step(torch.zeros(()), False)

    monkeypatch.setattr(distiller.student_optimizer, "step", keep)
    log = distiller.cycle()
    return kept[0], log


# Cost


@pytest.mark.parametrize(("share", "expected"), [(True, 38.5), (False, 41.0)])
def test_a_cycle_costs_38_forwards_and_a_half_where_the_published_loop_has_50(share, expected, monkeypatch):
    config = DistillConfig(batch_size=2, guidance=3.5, share_rollout=share)
    networks = [Counting(2) for _ in range(3)]
    networks[0].requires_grad_(False)
    exits = iter(list(range(4)) * 100)
    monkeypatch.setattr(trainer_module, "draw_exit_step", lambda _steps, _generator: next(exits))
    distiller = Distiller(*networks, config, conditions=iter(torch.ones(2, 1) for _ in range(1000)))
    cycles = 4 * (5 if share else 6)  # every exit step equally often
    for _ in range(cycles):
        distiller.cycle()
    assert sum(network.cost for network in networks) / cycles == pytest.approx(expected)
    published = 3 + 4 + 1 + 2 + 5 * (3 + 1 + 4)
    assert (expected, published) < (50, 51)


# Accumulation


def test_accumulated_micro_batches_average_to_the_gradient_of_the_batch(monkeypatch):
    config = DistillConfig(batch_size=8, micro_batch=2, relation_weight=0.0)
    distiller = Distiller(*toy_roles(critic_error=0.05), config, seed=3)
    assert (distiller.micro_batch, distiller.accumulate) == (2, 4)
    samples = []
    draw = distiller.draw_sample
    monkeypatch.setattr(distiller, "draw_sample", lambda cond: samples.append(draw(cond)) or samples[-1])
    actual, log = gradients(monkeypatch, distiller)
    again = Distiller(*toy_roles(critic_error=0.05), config, seed=3)
    losses = []
    for _ in range(4):
        sample = again.draw_sample(None).x0
        scores = predict_scores(sample, again.teacher, again.critic, config, again.noise)
        losses.append(distillation_loss(sample, scores, config).total)
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(again.student_weights.values()))
    assert float(actual.norm()) > 1e-3
    torch.testing.assert_close(actual, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-7)
    assert float(log.generator.total) == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-5)
    assert len(samples) == 4 + 4 * 4  # the student update's, shared with the first critic update, then 4 x 4 fresh


def joint_loss(distiller, config):
    """The loss of the whole window in one graph, with the draws in the order of training."""
    samples, scores = [], []
    for _ in range(distiller.accumulate):
        exit_step = trainer_module.draw_exit_step(len(config.sigmas), distiller.exit_generator)
        state = trajectory(distiller.student, distiller._start(), config.sigmas, exit_step, distiller.noise)
        samples.append(distiller.student.predict_x0(*state))
        scores.append(predict_scores(samples[-1], distiller.teacher, distiller.critic, config, distiller.noise))
    return distillation_loss(torch.cat(samples), Scores.cat(scores), config)


def test_with_relation_accumulate_the_gradient_is_that_of_one_joint_batch(monkeypatch):
    config = DistillConfig(batch_size=8, micro_batch=2, relation_weight=0.5, relation_accumulate=True)
    roles = toy_roles(critic_error=0.05)  # a critic unlike the teacher: a relation to learn
    actual, log = gradients(monkeypatch, Distiller(*copy.deepcopy(roles), config, seed=3))
    reference = Distiller(*copy.deepcopy(roles), config, seed=3)
    loss = joint_loss(reference, config)  # one graph through all micro-batches
    expected = torch.autograd.grad(loss.total, list(reference.student_weights.values()))
    torch.testing.assert_close(actual, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-7)
    for name in ("total", "dmd", "relation_batch", "relation_frame"):
        assert float(getattr(log.generator, name)) == pytest.approx(float(getattr(loss, name).detach()), rel=1e-4)
    alone, _ = gradients(
        monkeypatch, Distiller(*copy.deepcopy(roles), replace(config, relation_accumulate=False), seed=3)
    )
    assert float((alone - actual).norm() / actual.norm()) > 1e-3


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "message"),
    [(6, None, 4, "batch_size: 6 does not divide among 4"), (8, 3, 1, "micro_batch: 3 does not divide .* 8 samples")],
)
def test_a_batch_that_does_not_divide_is_refused(batch, micro, processes, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(batch_size=batch, micro_batch=micro).micro_batches(processes)


# Weight of the relation


def test_the_relation_weight_warms_up_linearly_and_stays():
    config = DistillConfig(relation_weight=0.4, relation_warmup=4)
    assert [config.relation_weight_at(n) for n in (1, 2, 4, 9)] == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert DistillConfig(relation_weight=0.4).relation_weight_at(1) == 0.4
    distiller = Distiller(*toy_roles(), replace(config, batch_size=4))
    assert [distiller.cycle().generator.relation_weight for _ in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


# Collapse


def test_collapse_ratios_are_ratios_of_spread_and_of_motion():
    real = torch.randn(4, 6, 3, 2, 2)
    ratios = collapse_ratios(2 * real, real)
    assert (float(ratios.std_ratio), float(ratios.frame_difference_ratio)) == pytest.approx((2, 2))
    frozen = real[:, :1].expand_as(real)
    assert float(collapse_ratios(frozen, real).frame_difference_ratio) == 0


# The running average


def test_the_average_follows_its_recursion_in_float32():
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    average = WeightAverage({"w": weight}, 0.9)
    expected = weight.detach().float().clone()
    for step in range(5):
        with torch.no_grad():
            weight.add_(step)
        average.update()
        expected = 0.9 * expected + 0.1 * weight.detach().float()
    assert average.average["w"].dtype == torch.float32
    torch.testing.assert_close(average.average["w"], expected)


def test_the_network_computes_with_the_average_inside_the_block_and_is_itself_after():
    weight = nn.Parameter(torch.randn(5))
    average = WeightAverage({"w": weight}, 0.5)
    with torch.no_grad():
        weight.add_(1)
    before = weight.detach().clone()
    with pytest.raises(KeyError), average.applied():  # noqa: PT012
        assert torch.equal(weight, average.average["w"])
        raise KeyError
    assert torch.equal(weight, before)


# Guards


def guarded(max_nonfinite=3, **options):
    weight = nn.Parameter(torch.ones(3))
    common = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "grad_clip": None}
    return weight, GuardedAdamW("student", {"w": weight}, **{**common, **options}, max_nonfinite=max_nonfinite)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(bad, value):
    weight, optimizer = guarded()
    weight.grad = torch.ones(3)
    optimizer.step(torch.tensor(1.0))
    before, state = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state().items()}
    weight.grad = torch.tensor([1.0, value if bad == "gradient" else 1.0, 1.0])
    step = optimizer.step(torch.tensor(value if bad == "loss" else 1.0))
    assert step.skipped
    assert (optimizer.skipped, optimizer.in_a_row) == (1, 1)
    assert torch.equal(weight, before)
    assert all(torch.equal(state[k], v) for k, v in optimizer.state().items())
    weight.grad = torch.ones(3)
    assert not optimizer.step(torch.tensor(1.0)).skipped
    assert (optimizer.skipped, optimizer.in_a_row) == (1, 0)


def test_too_many_skipped_updates_in_a_row_end_the_run_with_what_to_try():
    weight, optimizer = guarded(max_nonfinite=3)
    for _ in range(2):
        weight.grad = torch.full((3,), math.nan)
        optimizer.step(torch.tensor(1.0))
    weight.grad = torch.full((3,), math.nan)
    with pytest.raises(
        NonFiniteRun, match=r"3 updates of the student in a row .* gradient norm nan.*lower learning rate"
    ):
        optimizer.step(torch.tensor(1.0))
    assert torch.equal(weight, torch.ones(3))


def test_the_guarded_optimizer_is_adamw_with_clipping():
    weight, optimizer = guarded(grad_clip=0.5, weight_decay=0.1)
    other = nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([other], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for step in range(4):
        gradient = torch.tensor([1.0, -2.0, 3.0]) * (step + 1)
        weight.grad, other.grad = gradient.clone(), gradient.clone()
        norm = optimizer.step(torch.tensor(0.0)).grad_norm
        assert float(norm) == pytest.approx(float(gradient.norm()))
        torch.nn.utils.clip_grad_norm_([other], 0.5)
        plain.step()
    assert torch.equal(weight, other)


def test_a_network_without_trained_weights_is_refused():
    teacher, student, _ = toy_roles()
    with pytest.raises(ValueError, match="critic: has no trainable parameters"):
        Distiller(teacher, student, copy.deepcopy(teacher), DistillConfig(batch_size=4))


def test_a_poisoned_teacher_skips_the_student_and_spares_the_critic():
    teacher, student, critic = toy_roles()
    with torch.no_grad():
        next(teacher.parameters()).fill_(math.nan)
    # This convention keeps NaN; others replace it, as their codebases do.
    config = DistillConfig(batch_size=4, convention="fastgen", relation_weight=0.0, max_nonfinite=3, ema_decay=0.5)
    distiller = Distiller(teacher, student, critic, config)
    before, started = flat(distiller.student_weights), flat(distiller.critic_weights)
    for _ in range(2):
        assert distiller.cycle().student.skipped
    assert torch.equal(flat(distiller.student_weights), before)
    assert torch.equal(flat(distiller.average.average), before)
    assert not torch.equal(flat(distiller.critic_weights), started)
    with pytest.raises(NonFiniteRun, match="3 updates of the student in a row"):
        distiller.cycle()


# Through diffusers' network


def tiny_wan(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"frames": 2, "height": 4, "width": 4, "compute": "float32", "null_embedding": "zeros"}
    return models.build("wan", weights="random", config="tiny", **sizes, **options)


def prompts(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(batch, 1, 32, generator=generator)


def test_a_tiny_wan_student_overfits_to_its_teacher_and_the_dmd_gradient_shrinks():
    teacher, student = tiny_wan(0), tiny_wan(1)
    shape = teacher.latent_shape
    video = torch.linspace(-2, 2, 16).view(1, 1, 16, 1, 1).expand(1, *shape)
    settings = TeacherSettings(updates=80, batch_size=8, lr=1e-2, warmup=5, shift=1.0)
    lesson = FlowMatching(teacher, itertools.repeat((video.expand(8, *shape), torch.zeros(8, 1, 32))), settings, seed=0)
    for _ in range(80):
        lesson.cycle()
    config = DistillConfig(
        sigmas=(1.0, 0.5), batch_size=4, student_lr=3e-3, critic_lr=6e-3, critic_updates=2, betas=(0.0, 0.99)
    )
    conditions = itertools.repeat(torch.zeros(4, 1, 32))
    distiller = Distiller(teacher.requires_grad_(False), student, copy.deepcopy(student), config, conditions=conditions)

    def distance():
        noise = torch.randn(16, *shape, generator=torch.Generator().manual_seed(9))
        samples = sample_few_step(student, noise, config.sigmas, torch.Generator(), torch.zeros(16, 1, 32))
        return float((samples - video).square().mean())

    untrained = distance()
    dmd = [float(distiller.cycle().generator.dmd) for _ in range(50)]
    assert sum(dmd[-10:]) / 10 < 0.65 * sum(dmd[:2]) / 2
    assert distance() < 0.6 * untrained
    assert all(weight.grad is None for weight in teacher.parameters())


def test_with_adapters_each_role_trains_its_own_and_the_base_stays():
    roles = LoraRoles(tiny_wan(), LoraOptions(rank=2, alpha=2))
    base = {name: weight.detach().clone() for name, weight in roles.base.named_parameters() if "lora" not in name}
    config = DistillConfig(sigmas=(1.0, 0.5), batch_size=2, critic_updates=1, student_lr=1e-3, critic_lr=1e-3)
    distiller = Distiller(roles.teacher, roles.student, roles.critic, config, conditions=prompts(2))
    assert not {id(w) for w in distiller.student_weights.values()} & {id(w) for w in distiller.critic_weights.values()}
    norms = {"student": [], "critic": []}
    for name, mine, others in (
        ("student", distiller.student_weights, distiller.critic_weights),
        ("critic", distiller.critic_weights, distiller.student_weights),
    ):
        optimizer = distiller.optimizers[name]
        made = optimizer.step

        def spy(loss, made=made, mine=mine, others=others, name=name):
            norms[name].append([float(w.grad.norm()) for w in mine.values() if w.grad is not None])
            assert all(weight.grad is None for weight in others.values())
            return made(loss)

        optimizer.step = spy
    for _ in range(3):
        distiller.cycle()
    for name, weights in (("student", distiller.student_weights), ("critic", distiller.critic_weights)):
        assert all(len(step) == len(weights) for step in norms[name]), "every factor has a gradient"
        assert all(max(step) > 0 for step in norms[name][-1:])
    for name, weight in roles.base.named_parameters():
        if "lora" not in name:
            assert torch.equal(weight, base[name]), name


# Training a teacher


class Blob:
    """Videos around one point, without end."""

    def __init__(self, batch):
        self.batch, self.generator = batch, torch.Generator().manual_seed(0)

    def __iter__(self):
        return self

    def __next__(self):
        x0 = 1.5 + 0.1 * torch.randn(self.batch, *(4, 4, 1, 1), generator=self.generator)
        return x0, None


def test_a_teacher_learns_its_data_by_flow_matching():
    torch.manual_seed(0)
    settings = TeacherSettings(updates=150, batch_size=32, micro_batch=16, lr=5e-3, warmup=10, ema_decay=0.9)
    model = ToyDenoiser(SMALL)
    trainer = FlowMatching(model, Blob(16), settings, seed=0)
    logs = [trainer.cycle() for _ in range(150)]
    assert sum(float(log.loss) for log in logs[-10:]) < 0.5 * sum(float(log.loss) for log in logs[:10])
    x_t = noise_like(torch.empty(8, 4, 4, 1, 1), torch.Generator().manual_seed(1))
    x0 = model.predict_x0(x_t, torch.ones(8))
    assert float(x0.detach().mean()) == pytest.approx(1.5, abs=0.2)


def test_the_teachers_learning_rate_warms_up_and_falls_to_zero():
    trainer = FlowMatching(ToyDenoiser(SMALL), Blob(4), TeacherSettings(updates=100, warmup=10, batch_size=4), seed=0)
    rates = []
    for trainer.update in range(1, 101):
        rates.append(trainer.learning_rate())
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates.index(max(rates)) == 9
    assert rates[-1] < 1e-6


def test_dropped_conditions_become_the_null_condition():
    model = tiny_wan()
    settings = TeacherSettings(batch_size=64, drop_condition=0.25)
    trainer = FlowMatching(model, iter(()), settings, seed=0)
    cond = torch.ones(4000, 1, 32)
    kept = trainer._drop(cond)[:, 0, 0]
    assert set(kept.tolist()) == {0.0, 1.0}
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.03)


def test_the_weights_that_train_have_the_names_of_the_network():
    model = ToyDenoiser(SMALL)
    assert list(trainable_weights(model)) == [name for name, _ in model.named_parameters()]
    model.output.requires_grad_(False)
    assert not any(name.startswith("output") for name in trainable_weights(model))
