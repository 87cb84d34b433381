"""Score matching of a student that ends above noise level 0, and the steps and levels of each expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from codmd import models
from codmd.distill import DistillConfig, Distiller
from codmd.distill.update.noise import noise_like
from codmd.distill.update.objective import critic_loss, predict_scores
from codmd.distill.update.phased import coefficients, noised, velocity_error
from codmd.distill.update.rollout import euler_step, sample_few_step
from codmd.distill.update.schedule import sample_sigma

SIGMAS = (1.0, 0.9375, 0.8333, 0.625)
RECIPE = DistillConfig(
    sigmas=SIGMAS, expert="high", transition="euler", shift=5.0, batch_size=4, critic_updates=2, guidance=None
)


def toy(seed=0):
    torch.manual_seed(seed)
    model = models.build("toy", weights="random", frames=3, channels=2, width=16, blocks=1)
    torch.nn.init.normal_(model.output[1].weight, std=0.1)
    return model


# The target, against a Gaussian in closed form


def gaussian(t, end, mean, variance):
    """(x_s, noise, weights, x_t, x0 by the score): expectations of x_s ~ N(mean, variance), exact by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    z, noise = (torch.tensor(grid.reshape(-1)) for grid in np.meshgrid(nodes, nodes))
    weight = torch.tensor(np.outer(weights, weights).reshape(-1) / (2 * np.pi))
    x_s = mean + variance**0.5 * z
    a, b = coefficients(torch.tensor(t, dtype=torch.float64), end)
    x_t = a * x_s + b * noise
    score = -(x_t - a * mean) / (a**2 * variance + b**2)
    return x_s, noise, weight, x_t, (x_t + t**2 * score) / (1 - t)


def normal_equations(x0, x_s, noise, weight, x_t, t, end):
    """Gradient of the critic's loss in the offset and the slope of a linear prediction; 0 at its minimum."""
    sigma = torch.full((len(x_s),), t, dtype=torch.float64)
    error = velocity_error(x0, x_s, noise, sigma, end)
    return torch.stack([(weight * error).sum(), (weight * error * x_t).sum()])


@pytest.mark.parametrize(("t", "end"), [(0.9, 0.8333), (0.88, 0.5), (0.99, 0.8333), (0.3, 0.0)])
def test_the_critic_s_minimum_is_the_score_of_a_gaussian(t, end):
    x_s, noise, weight, x_t, x0 = gaussian(t, end, mean=0.7, variance=0.3)
    zeros = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(normal_equations(x0, x_s, noise, weight, x_t, t, end), zeros, rtol=0, atol=1e-12)
    if end > 0:
        assert normal_equations(x0, x_s, noise, weight, x_t, t, 0.0).abs().max() > 0.05


def test_samples_of_the_data_s_own_law_at_the_end_give_the_teacher_s_prediction():
    """x_s = (1 - s) x_0 + s noise of Gaussian data: the critic's minimum is E[x_0 | x_t], and DMD's direction 0."""
    t, s, mean, variance = 0.9, 0.8333, 0.4, 0.25
    *_, x_t, x0 = gaussian(t, s, (1 - s) * mean, (1 - s) ** 2 * variance + s**2)
    marginal = (1 - t) ** 2 * variance + t**2
    expected = mean + (1 - t) * variance / marginal * (x_t - (1 - t) * mean)
    torch.testing.assert_close(x0, expected, rtol=1e-12, atol=1e-12)


def test_the_error_stays_finite_where_the_level_meets_the_end():
    x_s, noise = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64).unbind()
    sigma = torch.tensor([0.8333])
    error = velocity_error(torch.zeros_like(x_s), x_s, noise, sigma, 0.8333)
    torch.testing.assert_close(error, noise / (1 - 0.8333), rtol=1e-5, atol=1e-5)


def test_an_end_at_zero_is_flow_matching_bit_for_bit():
    model, draws = toy(), torch.Generator().manual_seed(0)
    x, noise, x0 = torch.randn(3, 4, *model.latent_shape, generator=draws).unbind()
    sigma = torch.rand(4, generator=draws)
    assert torch.equal(noised(model, x, noise, sigma, 0.0), model.add_noise(x, noise, sigma))
    level = sigma.view(-1, 1, 1, 1, 1)
    assert torch.equal(velocity_error(x0, x, noise, sigma, 0.0), (x0 - x) / level)


# The two objectives


def test_critic_and_scores_see_the_samples_from_the_level_where_they_end():
    teacher, critic = toy(1), toy(2)
    x_s = torch.randn(4, *critic.latent_shape)
    scores = predict_scores(x_s, teacher, critic, RECIPE, torch.Generator().manual_seed(3))
    draws, phase = torch.Generator().manual_seed(3), RECIPE.phase
    sigma = sample_sigma(4, 5.0, phase.sigma_range, draws, x_s.device, drawn=phase.drawn)
    noise = noise_like(x_s, draws)
    x_t = noised(critic, x_s, noise, sigma, phase.end)
    with torch.no_grad():
        assert torch.equal(scores.fake, critic.predict_x0(x_t, sigma))
        assert torch.equal(scores.real, teacher.predict_x0(x_t, sigma))
        error = velocity_error(scores.fake, x_s, noise, sigma, phase.end)
    loss = critic_loss(critic, x_s, RECIPE, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, error.square().mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("expert", "lowest", "highest"), [("high", 0.875, 0.98), ("low", 0.02, 0.875)])
def test_levels_of_an_expert_fill_its_own_range_and_do_not_pile_up_at_its_ends(expert, lowest, highest):
    phase = replace(RECIPE, expert=expert).phase
    draws = torch.Generator().manual_seed(0)
    levels = sample_sigma(10_000, 5.0, phase.sigma_range, draws, torch.device("cpu"), drawn=phase.drawn)
    assert phase.sigma_range == (lowest, highest)
    assert lowest <= levels.min() < lowest + 0.01
    assert highest - 0.01 < levels.max() <= highest
    assert (levels == levels.clamp(lowest + 1e-6, highest - 1e-6)).float().mean() > 0.999


# The loop


class Levels(torch.nn.Module):
    """Notes the levels that a network is asked for."""

    def __init__(self, network):
        super().__init__()
        self.seen = []
        network.register_forward_hook(lambda module, inputs, output: self.seen.append(inputs[1]))

    def __call__(self):
        return torch.cat(self.seen)


@pytest.mark.parametrize("transition", ["renoise", "euler"])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_every_network_works_at_its_own_expert_s_levels(expert, window, transition):
    recipe = replace(RECIPE, expert=expert, transition=transition, micro_batch=2, relation_accumulate=window)
    networks = {name: toy(seed) for seed, name in enumerate(("teacher", "student", "critic", "resting"))}
    levels = {name: Levels(network) for name, network in networks.items()}
    if expert == "high":
        del networks["resting"]
    trainer = Distiller(config=recipe, **networks)
    for _ in range(4):
        assert torch.isfinite(trainer.cycle().critic)
    for name in ("teacher", "critic"):
        seen = levels[name]()
        assert ((seen >= 0.875) if expert == "high" else (seen <= 0.875)).all()
    own, before = (SIGMAS[:2], []) if expert == "high" else (SIGMAS[2:], SIGMAS[:2])
    assert set(levels["student"]().tolist()) == set(torch.tensor(own).tolist())
    assert set(levels["resting"]().tolist() if expert == "low" else []) == set(torch.tensor(before).tolist())


def test_the_high_noise_expert_hands_on_its_euler_step_to_the_next_expert_s_first_level():
    trainer = Distiller(toy(0), toy(1), toy(2), RECIPE)
    x_t = torch.randn(4, *trainer.student.latent_shape)
    x0 = torch.randn_like(x_t)
    torch.testing.assert_close(trainer._handed_on(x_t, x0, 1), euler_step(x_t, x0, 0.9375, 0.8333))
    assert torch.equal(Distiller(toy(0), toy(1), toy(2), replace(RECIPE, expert=None))._handed_on(x_t, x0, 1), x0)


def test_euler_steps_of_a_student_are_the_probability_flow_s():
    student, start = toy(), torch.randn(2, *toy().latent_shape)
    found = sample_few_step(student, start, SIGMAS, torch.Generator(), transition="euler")
    state = start
    with torch.no_grad():
        for sigma, following in zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True):
            state = state + (following - sigma) * student(state, torch.full((2,), sigma))
    torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-5)


# The recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundary": 0.5}, "boundary: got 0.5; expected steps from it on and steps below it"),
        ({"sigma_range": (0.9, 0.98), "expert": "low"}, "sigma_range: got .* both sides of boundary 0.875"),
        ({"method": "rcm"}, "expert, transition: options of method dmd"),
        ({"decoupled": True, "guidance": 3.0, "convention": "dmd2"}, "decoupled: the levels of guidance"),
        ({"diversity_weight": 0.05, "expert": "low"}, "diversity_weight: the first step's path is the high-noise"),
        ({"diversity_weight": 0.05, "diversity_steps": (29, 30)}, "diversity_weight: the first step's path"),
        ({"transition": "heun"}, "transition: got 'heun'; expected one of renoise, euler"),
    ],
)
def test_what_an_expert_cannot_be_trained_with_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **changes)


def test_a_student_that_renoises_is_matched_on_clean_predictions():
    assert replace(RECIPE, transition="renoise").phase.end == 0
    assert RECIPE.phase.end == 0.8333
    assert "high-noise expert, steps 1 to 2, matched at level 0.8333" in RECIPE.summary
