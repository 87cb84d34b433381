"""The distillation loop: noise levels, rollout, both objectives and the update rule, on models with known answers."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from codmd import ops, reference
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.update.noise import NoiseStream, noise_like
from codmd.distill.update.objective import Scores, critic_loss, distillation_loss, predict_scores
from codmd.distill.update.rollout import draw_exit_step, rollout, sample_euler, sample_few_step
from codmd.distill.update.schedule import check_step_list, sample_sigma, sampling_sigmas, shift_sigma
from codmd.distill.update.trainer import Distiller
from codmd.models.base import VideoDenoiser, per_sample
from codmd.models.toy import ToyConfig, ToyDenoiser

SHAPE = (3, 2, 1, 1)


pytestmark = pytest.mark.usefixtures("one_thread")


class GaussianDenoiser(VideoDenoiser):
    """The exact denoiser of N(mean, spread^2) with a learnable mean; counts its calls and how many had gradient."""

    def __init__(self, mean=0.0, spread=1.0):
        super().__init__()
        self.latent_shape = SHAPE
        self.mean = nn.Parameter(torch.full(SHAPE, float(mean)))
        self.spread = spread
        self.calls, self.calls_with_gradient = [], 0

    def forward(self, x_t, sigma, cond=None):
        self.calls.append(float(sigma[0]))
        self.calls_with_gradient += torch.is_grad_enabled()
        level = per_sample(sigma, x_t)
        signal = (1 - level) * self.spread**2
        variance = (1 - level) ** 2 * self.spread**2 + level**2
        x0 = self.mean + signal / variance * (x_t - (1 - level) * self.mean)
        noise = level / variance * (x_t - (1 - level) * self.mean)
        return noise - x0

    def null_cond(self, batch):
        return "null"

    def save_state(self, path, state, dtype=None, progress=None):
        raise NotImplementedError

    def open_weights(self, path):
        raise NotImplementedError

    @classmethod
    def from_options(cls, options):
        raise NotImplementedError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(batch, seed=0):
    return torch.randn(batch, *SHAPE, generator=generator(seed))


# Noise levels


def test_four_steps_at_shift_three_are_the_published_levels():
    assert sampling_sigmas(4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5))


def test_shift_one_changes_nothing_and_every_shift_keeps_the_ends():
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_sigma(t, 1.0), t)
    for shift in (0.5, 3.0, 8.0):
        assert shift_sigma(t, shift)[[0, -1]].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), "0 levels; expected 1 to 8"),
        (tuple(1 - i / 10 for i in range(9)), "9 levels; expected 1 to 8"),
        ((0.9, 0.5), "first level is 0.9; expected 1.0"),
        ((1.0, 0.5, 0.5), "fall strictly"),
        ((1.0, 0.5, 0.0), "stay above 0"),
        ((1.0, float("nan")), "fall strictly"),
    ],
)
def test_a_bad_step_list_is_refused_by_name(levels, message):
    with pytest.raises(ValueError, match=f"sigmas: .*{message}"):
        check_step_list(levels)


def test_training_levels_are_uniform_shifted_and_clamped():
    levels = sample_sigma(20_000, 3.0, (0.02, 0.98), generator(), torch.device("cpu"))
    assert (float(levels.min()), float(levels.max())) == pytest.approx((0.02, 0.98))
    median_before_shift = 0.5
    assert float(levels.median()) == pytest.approx(3 * median_before_shift / (1 + 2 * median_before_shift), abs=0.01)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sigmas", (0.5,), "sigmas: the first level is 0.5"),
        ("sigma_range", (0.5, 0.5), "sigma_range: got"),
        ("sigma_range", (0.0, 0.5), "sigma_range: got"),
        ("batch_size", 0, "batch_size: got 0; expected at least 1"),
        ("micro_batch", 0, "micro_batch: got 0; expected at least 1"),
        ("max_nonfinite", 0, "max_nonfinite: got 0; expected at least 1"),
        ("relation_warmup", -1, "relation_warmup: got -1; expected at least 0"),
        ("ema_decay", 1.0, "ema_decay: got .*expected a number in"),
        ("guidance", float("nan"), "guidance: got nan"),
        ("convention", "rmc", "convention='rmc' is not known"),
        ("critic_updates", 0, "critic_updates: got 0; expected at least 1"),
        ("shift", 0.0, "shift: got 0.0; expected a finite number above 0"),
        ("student_lr", -1.0, "student_lr: got -1.0"),
        ("critic_lr", float("inf"), "critic_lr: got inf"),
        ("temperature", 0.0, "temperature: got 0.0"),
        ("weight_decay", -0.1, "weight_decay: got -0.1; expected a finite number >= 0"),
        ("relation_weight", float("nan"), "relation_weight: got nan"),
        ("batch_weight", -1.0, "batch_weight: got -1.0"),
        ("frame_weight", -1.0, "frame_weight: got -1.0"),
        ("grad_clip", 0.0, "grad_clip: got 0.0"),
        ("betas", (0.9, 1.0), r"betas: got \(0.9, 1.0\)"),
    ],
)
def test_a_recipe_out_of_range_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**{field: value})


# Models


def test_velocity_x0_and_noise_are_consistent():
    model, x0, eps = GaussianDenoiser(), noise(5), noise(5, 1)
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0])
    x_t = model.add_noise(x0, eps, sigma)
    level = sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(x_t, (1 - level) * x0 + level * eps)
    torch.testing.assert_close(model.predict_x0(x_t, sigma), x_t - level * model(x_t, sigma))


def test_one_noise_level_per_sample_is_required():
    with pytest.raises(ValueError, match=r"sigma: shape \(2,\); expected \(5,\)"):
        GaussianDenoiser().add_noise(noise(5), noise(5), torch.ones(2))


def test_the_toy_model_refuses_conditions_guidance_prompts_and_other_shapes():
    model = ToyDenoiser(ToyConfig(frames=3, channels=2, width=8))
    with pytest.raises(TypeError, match="pass cond=None"):
        model(noise(2), torch.ones(2), cond="a cat")
    with pytest.raises(ValueError, match="use guidance=None"):
        model.null_cond(2)
    with pytest.raises(ValueError, match="encodes no prompts"):
        model.encode(["a cat"])
    with pytest.raises(ValueError, match=r"x_t: shape \(2, 4, 2, 1, 1\); expected \(B, 3, 2, 1, 1\)"):
        model(torch.zeros(2, 4, 2, 1, 1), torch.ones(2))


@pytest.mark.parametrize("field", ["frames", "channels", "width", "blocks", "frequencies"])
def test_a_toy_size_below_one_is_refused_by_name(field):
    with pytest.raises(ValueError, match=f"{field}: got 0; expected a positive integer"):
        ToyConfig(**{field: 0})


# Rollout


@pytest.mark.parametrize("exit_step", range(4))
def test_a_rollout_evaluates_the_network_up_to_the_exit_step_and_keeps_one_gradient(exit_step):
    student, sigmas = GaussianDenoiser(), sampling_sigmas(4, 3.0)
    sample = rollout(student, noise(2), sigmas, exit_step, generator())
    assert student.calls == pytest.approx(sigmas[: exit_step + 1])
    assert student.calls_with_gradient == 1
    assert sample.requires_grad


def test_rollout_renoises_each_prediction_to_the_next_level():
    student, sigmas = GaussianDenoiser(mean=0.7), (1.0, 0.6, 0.2)
    start, draws = noise(4), generator(3)
    expected = start
    for sigma, following in itertools.pairwise(sigmas):
        x0 = student.predict_x0(expected, torch.full((4,), sigma))
        expected = (1 - following) * x0 + following * torch.randn(x0.shape, generator=draws)
    expected = student.predict_x0(expected, torch.full((4,), sigmas[-1]))
    torch.testing.assert_close(rollout(student, start, sigmas, 2, generator(3)), expected)
    torch.testing.assert_close(sample_few_step(student, start, sigmas, generator(3)), expected)


def test_exit_steps_are_uniform():
    draws, shared = 8000, generator()
    counts = torch.bincount(torch.tensor([draw_exit_step(4, shared) for _ in range(draws)]), minlength=4)
    chi_square = float(((counts - draws / 4) ** 2 / (draws / 4)).sum())
    assert chi_square < 16.3  # the 0.999 quantile with 3 degrees of freedom


def test_euler_reaches_a_point_mass_exactly_and_a_gaussian_in_the_limit():
    point = sample_euler(GaussianDenoiser(mean=1.5, spread=0.0), noise(3), sampling_sigmas(4, 3.0))
    torch.testing.assert_close(point, torch.full_like(point, 1.5))
    start = noise(2000)
    exact = 0.5 + 0.3 * start
    errors = [
        float((sample_euler(GaussianDenoiser(0.5, 0.3), start, sampling_sigmas(n, 3.0)) - exact).abs().max())
        for n in (25, 100, 400)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # first order in the step, towards the exact flow


# Objectives


def scores(seed=0, batch=4):
    x, fake, real = (noise(batch, seed + i) for i in range(3))
    return x.requires_grad_(), fake, real


def test_without_the_relation_term_the_objective_is_dmd():
    x, fake, real = scores()
    loss = distillation_loss(x, Scores(fake, real), DistillConfig(relation_weight=0.0))
    torch.testing.assert_close(loss.total, reference.dmd_loss(x, real=real, fake=fake))
    assert float(loss.relation) == 0


@pytest.mark.parametrize(("batch_weight", "frame_weight"), [(1.0, 1.0), (0.0, 1.0), (2.0, 0.0)])
def test_the_objective_is_dmd_plus_lambda_times_the_relation_loss(batch_weight, frame_weight):
    config = DistillConfig(relation_weight=0.3, temperature=0.2, batch_weight=batch_weight, frame_weight=frame_weight)
    x, fake, real = scores()
    loss = distillation_loss(x, Scores(fake, real), config)
    (actual,) = torch.autograd.grad(loss.total, x)
    x64, fake64, real64 = x.detach().double().requires_grad_(), fake.double(), real.double()
    relation = reference.relation_loss(x64, real64, fake64, 0.2, batch_weight, frame_weight)[0]
    (expected,) = torch.autograd.grad(reference.dmd_loss(x64, real=real64, fake=fake64) + 0.3 * relation, x64)
    assert float((actual - expected).norm() / expected.norm()) < 1e-5
    torch.testing.assert_close(loss.relation.double(), relation, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss.total, loss.dmd + 0.3 * loss.relation)


def test_gradient_ratio_is_lambda_times_the_norms_and_leaves_the_graph_usable():
    x, fake, real = scores()
    config = DistillConfig(relation_weight=0.3)
    loss = distillation_loss(x, Scores(fake, real), config)
    (dmd,) = torch.autograd.grad(reference.dmd_loss(x, real=real, fake=fake), x)
    (relation,) = torch.autograd.grad(ops.relation_loss(x, real, fake), x)
    torch.testing.assert_close(loss.gradient_ratio(x), 0.3 * relation.norm() / dmd.norm())
    loss.total.backward()
    torch.testing.assert_close(x.grad, dmd + 0.3 * relation)


def test_gradient_ratio_is_zero_when_critic_and_teacher_agree():
    x, fake, _ = scores()
    assert float(distillation_loss(x, Scores(fake, fake), DistillConfig()).gradient_ratio(x)) == 0


def test_the_student_moves_towards_the_teacher_and_only_the_student_gets_a_gradient():
    teacher, critic = GaussianDenoiser(mean=2.0), GaussianDenoiser(mean=0.0)
    x = noise(8).requires_grad_()
    config = DistillConfig(relation_weight=0.0)
    distillation_loss(x, predict_scores(x, teacher, critic, config, generator()), config).total.backward()
    assert float(x.grad.max()) < 0  # descent raises every coordinate towards the teacher's mean
    assert teacher.mean.grad is None
    assert critic.mean.grad is None


@pytest.mark.parametrize("batch_guidance", [True, False])
def test_guidance_extrapolates_from_the_null_condition_in_the_cond_form(batch_guidance):
    class Guided(GaussianDenoiser):
        def forward(self, x_t, sigma, cond=None):
            velocity = super().forward(x_t, sigma)
            return velocity + 0.5 * (cond == 0).float().view(-1, 1, 1, 1, 1)

        def null_cond(self, batch):
            return torch.zeros(batch)

    x, config = noise(4).requires_grad_(), DistillConfig(guidance=3.0, batch_guidance=batch_guidance)
    critic, plain, teacher, cats = GaussianDenoiser(), GaussianDenoiser(mean=1.0), Guided(mean=1.0), torch.ones(4)
    guided = distillation_loss(x, predict_scores(x, teacher, critic, config, generator(5), cats), config)
    assert len(teacher.calls) == (1 if batch_guidance else 2)
    draws = generator(5)
    sigma = sample_sigma(4, config.shift, config.sigma_range, draws, torch.device("cpu"))
    x_t = critic.add_noise(x.detach(), torch.randn(x.shape, generator=draws), sigma)
    fake, cond = (model.predict_x0(x_t, sigma).detach() for model in (critic, plain))
    uncond = cond - 0.5 * sigma.view(-1, 1, 1, 1, 1)
    expected = distillation_loss(x, Scores(fake, cond + 3.0 * (cond - uncond)), config)
    torch.testing.assert_close(guided.total, expected.total)


def test_critic_loss_is_the_mean_squared_error_of_the_velocity():
    critic, x0, config = GaussianDenoiser(mean=0.4), noise(6), DistillConfig()
    draws = generator(7)
    sigma = sample_sigma(6, config.shift, config.sigma_range, draws, torch.device("cpu"))
    eps = torch.randn(x0.shape, generator=draws)
    expected = (critic(critic.add_noise(x0, eps, sigma), sigma) - (eps - x0)).square().mean()
    torch.testing.assert_close(critic_loss(critic, x0, config, generator(7)), expected, rtol=1e-4, atol=1e-6)


# The update rule


def gaussian_distiller(config, seed=0, teacher_mean=2.0, **options):
    return Distiller(GaussianDenoiser(teacher_mean), GaussianDenoiser(), GaussianDenoiser(), config, seed, **options)


@pytest.mark.parametrize("relation_weight", [0.0, 0.1])
def test_a_student_that_can_match_the_teacher_does(relation_weight):
    config = DistillConfig(
        relation_weight=relation_weight, student_lr=0.02, critic_lr=0.05, betas=(0.0, 0.9), batch_size=32
    )
    distiller = gaussian_distiller(config)
    for _ in range(250):
        distiller.cycle()
    assert distiller.student.mean.mean().item() == pytest.approx(2.0, abs=0.25)
    assert distiller.teacher.mean.grad is None


def test_the_critic_follows_the_student():
    config = DistillConfig(critic_lr=0.05, batch_size=32, betas=(0.0, 0.9))
    distiller = gaussian_distiller(config)
    with torch.no_grad():
        distiller.student.mean.fill_(-1.5)
    for _ in range(100):
        with torch.no_grad():
            sample = distiller.draw_sample(None).handed_on
        distiller.critic_update([(sample, None)])
    assert distiller.critic.mean.mean().item() == pytest.approx(-1.5, abs=0.25)


@pytest.mark.parametrize("share", [True, False])
def test_network_evaluations_of_a_cycle_are_the_fewest_that_the_rule_needs(share):
    config = DistillConfig(critic_updates=3, share_rollout=share, batch_size=2)
    distiller = gaussian_distiller(config, seed=11)
    distiller.cycle()
    exits = generator(11)
    rollouts = [draw_exit_step(4, exits) + 1 for _ in range(3 if share else 4)]
    assert len(distiller.student.calls) == sum(rollouts)
    assert distiller.student.calls_with_gradient == 1
    assert len(distiller.teacher.calls) == 1
    assert len(distiller.critic.calls) == 1 + 3


def test_the_shared_sample_is_the_one_of_the_student_update(monkeypatch):
    seen = []
    distiller = gaussian_distiller(DistillConfig(batch_size=2))
    draw, update = distiller.draw_sample, distiller.critic_update
    monkeypatch.setattr(distiller, "draw_sample", lambda cond: seen.append(draw(cond)) or seen[-1])
    monkeypatch.setattr(distiller, "critic_update", lambda batches: seen.append(batches[0][0]) or update(batches))
    distiller.cycle()
    assert torch.equal(seen[0][0], seen[1])
    assert not seen[1].requires_grad


def toy_distiller(config, seed):
    torch.manual_seed(0)
    teacher = ToyDenoiser(ToyConfig(frames=3, channels=2, width=16, blocks=1)).requires_grad_(False)
    nn.init.normal_(teacher.blocks[0].down.weight, std=0.1)
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    return Distiller(teacher, student, critic, config, seed)


def test_training_repeats_bit_for_bit_from_its_seed_and_differs_for_another():
    def trained(seed):
        distiller = toy_distiller(DistillConfig(batch_size=8), seed)
        for _ in range(5):
            distiller.cycle()
        return torch.cat([p.detach().flatten() for p in distiller.student.parameters()])

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


def test_measuring_gradients_does_not_change_training():
    def trained(measure):
        distiller = toy_distiller(DistillConfig(batch_size=8), 0)
        logs = [distiller.cycle(measure_gradients=measure) for _ in range(4)]
        return distiller.student.output[1].weight.detach(), logs[-1].relation_to_dmd

    (plain, unmeasured), (measured, ratio) = trained(False), trained(True)
    assert torch.equal(plain, measured)
    assert unmeasured is None
    assert float(ratio) > 0


def test_the_rows_of_all_processes_are_those_of_one_process_with_the_global_batch():
    def rows(rank, world):
        stream = NoiseStream(generator(3), rank, world)
        like = torch.empty(8 // world, 4, 2, 2, 1)
        return noise_like(like, stream), sample_sigma(len(like), 3.0, (0.02, 0.98), stream, like.device)

    for world in (2, 4):
        for part, whole in zip(
            zip(*(rows(rank, world) for rank in range(world)), strict=True), rows(0, 1), strict=True
        ):
            assert torch.equal(torch.cat(part), whole)


def test_a_rank_outside_its_world_is_refused():
    with pytest.raises(ValueError, match="rank: got 2; expected 0 to 1"):
        NoiseStream(generator(), rank=2, world=2)


def test_conditions_are_taken_one_per_sample_drawn():
    config = DistillConfig(critic_updates=3, batch_size=2)
    conditions = iter(range(100))
    networks = (GaussianDenoiser(2.0), GaussianDenoiser(), GaussianDenoiser())
    Distiller(*networks, config, conditions=conditions).cycle()
    assert next(conditions) == 3  # one of the student update, shared with the first critic update, then two


def test_gradient_clipping_bounds_the_update():
    # With beta1 = 0 Adam's first moment is the gradient itself.
    config = DistillConfig(grad_clip=1e-3, batch_size=4)
    clipped, free = gaussian_distiller(config), gaussian_distiller(replace(config, grad_clip=None))
    for distiller in (clipped, free):
        distiller.cycle()

    def norm(distiller):
        return float(distiller.critic_optimizer.state()["mean.exp_avg"].norm())

    assert norm(clipped) <= 1.01e-3 < norm(free)
