"""Each axis of a convention beyond guidance, norm and guard, against its equation; magnitudes; provenance."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from dmd_cases import mask_of
from dmd_formulas import FORMULAS, cosmos, fastvideo_streaming, lightx2v_pdmd, one_forcing, value_and_gradient

from codmd import conventions, ops, reference
from codmd.conventions import NAMED, SOURCES
from codmd.reference import dmd as equations

WIDE = {"single": torch.float64, "double": torch.float64}
SHAPE = (3, 6, 4, 5, 7)


def draw(count: int = 4, shape: tuple[int, ...] = SHAPE, seed: int = 0):
    """``count`` float64 tensors of a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def predictions(perturbation: float = 0.2):
    """(student, critic, teacher with and without the condition)."""
    x, c, noise, other = draw()
    return x, c + perturbation * noise, c, c + 0.3 * other


def loss_of(convention, guidance: float = 3.5, **options):
    """The reference's loss as a function of (x, f, c, u), in float64."""
    rule = replace(conventions.resolve(convention), arithmetic="float64")

    def loss(x, f, c, u):
        return reference.dmd_loss(x, real=c, fake=f, real_uncond=u, guidance=guidance, convention=rule, **options)

    return loss


def agree(found, expected):
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-15)


def test_rcm_sums_what_its_code_sums_since_2026_02():
    generator = torch.Generator().manual_seed(0)
    x, n, c, e = (torch.randn(2, 4, 6, 6, 8, generator=generator) for _ in range(4))
    options = {"real": c, "fake": c + 0.2 * n, "real_uncond": c + 0.3 * e, "guidance": 5.0}
    for name in ("rcm", "turbodiffusion"):
        assert float(reference.dmd_loss(x, convention=name, **options)) == pytest.approx(1531.6, abs=0.05)
        assert float(ops.dmd_loss(x, convention=name, **options)) == pytest.approx(1531.6, abs=0.05)
    older = reference.dmd_loss(x, convention="rcm_2025", **{**options, "guidance": 4.0})
    assert float(older) == pytest.approx(1531.6, abs=0.05)


@pytest.mark.parametrize("arithmetic", ["float32", "float64", "emulate"])
@pytest.mark.parametrize(("name", "scale"), [("rcm", 1.0), ("rcm", 0.3), ("dmdr", 0.5), ("videox_fun_z_image", 0.0)])
def test_below_its_bound_a_convention_does_not_guide(name, scale, arithmetic):
    x, f, c, u = predictions()
    rule = replace(NAMED[name], arithmetic=arithmetic, layout="bfchw")
    found = reference.dmd_loss(x, real=c, fake=f, real_uncond=u, guidance=scale, convention=rule)
    expected = reference.dmd_loss(x, real=c, fake=f, convention=rule)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert rule.cond_scale(scale) == 0
    fused = replace(rule, arithmetic="float32")
    options = {"fake": f.float(), "convention": fused}
    bare = ops.dmd_loss(x.float(), real=c.float(), **options)
    given = ops.dmd_loss(x.float(), real=c.float(), real_uncond=u.float(), guidance=scale, **options)
    assert torch.equal(given, bare)


def test_a_scale_in_a_tensor_is_compared_like_a_number():
    x, f, c, u = predictions()
    for scale in (0.5, 5.0):
        number = loss_of("rcm", scale)(x, f, c, u)
        tensor = loss_of("rcm", torch.tensor(scale, dtype=torch.float64))(x, f, c, u)
        torch.testing.assert_close(tensor, number, rtol=1e-14, atol=0)
        assert conventions.rcm.cond_scale(torch.tensor(scale)) == conventions.rcm.cond_scale(scale)


def test_a_scale_at_which_a_convention_does_not_guide_has_no_name_in_it():
    assert conventions.rcm.guidance_scale(4.5, "uncond") == 4.5
    assert conventions.rcm.guidance_scale(1.0, "uncond") == 1.0
    with pytest.raises(ValueError, match=r"scale=0.5 \(uncond form\) is 0.5 .*, which guides only above 1"):
        conventions.rcm.guidance_scale(0.5, "uncond")


def test_the_norm_of_the_difference_of_scores():
    tensors = predictions()
    rule = replace(conventions.one_forcing, norm_of="fake")
    found = value_and_gradient(loss_of(rule), *tensors)
    agree(found, value_and_gradient(one_forcing, *tensors, 3.5, of_the_difference=True, **WIDE))
    g = reference.dmd_direction(tensors[0], real=tensors[2], fake=tensors[1], convention=rule)
    torch.testing.assert_close(g.abs().mean((1, 2, 3, 4)), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["frames", "elements", "one", "nothing"])
def test_the_mask_of_cosmos_restricts_the_norm_and_not_the_mean(kind):
    tensors = predictions()
    mask = mask_of(kind, tensors[0]).expand_as(tensors[0])
    agree(
        value_and_gradient(loss_of("cosmos", mask=mask), *tensors),
        value_and_gradient(cosmos, *tensors, 3.5, mask=mask, **WIDE),
    )
    if kind == "frames":
        whole = replace(conventions.cosmos, norm_over="all")
        _, gradient = value_and_gradient(loss_of(whole, mask=mask), *tensors)
        _, wanted = value_and_gradient(cosmos, *tensors, 3.5, mask=mask, **WIDE)
        assert (gradient - wanted).norm() > 1e-3 * wanted.norm()


def test_the_norm_over_selected_elements_follows_its_scope():
    x, _, r, _ = predictions()
    mask = mask_of("elements", x)
    for scope, first in (("sample", False), ("batch", False), ("block", False), ("block", True)):
        rule = replace(
            conventions.self_forcing,
            norm_scope=scope,
            norm_block=3,
            norm_over="selected",
            independent_first_frame=first,
        )
        norm = equations.guard(reference.norm.mean_distance(x, r, rule, "bfchw", mask), rule).expand(3, 6, 1, 1, 1)
        for sample, frame in ((0, 0), (1, 2), (2, 5)):
            segment = {"sample": slice(None), "batch": slice(None)}.get(scope)
            if segment is None:
                starts = rule.segments(6)
                start = max(edge for edge in starts if edge <= frame)
                segment = slice(start, starts[starts.index(start) + 1])
            samples = slice(None) if scope == "batch" else slice(sample, sample + 1)
            chosen = (x - r).abs()[samples, segment][mask[samples, segment]]
            expected = 1.0 if first and frame == 0 else float(chosen.mean())
            assert float(norm[sample, frame]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["frames", "none"])
def test_streaming_long_tuning_of_fastvideo_takes_the_masked_mean(kind):
    tensors = predictions()
    mask = None if kind == "none" else torch.tensor([False, False, True, True, True, True]).reshape(1, 6, 1, 1, 1)
    agree(
        value_and_gradient(loss_of("fastvideo_streaming", mask=mask), *tensors),
        value_and_gradient(fastvideo_streaming, *tensors, 3.5, mask=mask, **WIDE),
    )


def test_a_projected_direction_has_no_part_along_the_critics_residual():
    x, f, c, _ = predictions()
    rule = replace(conventions.lightx2v_pdmd, layout="bfchw", loss_cap=None)
    g = reference.dmd_direction(x, real=c, fake=f, convention=rule)
    along = (g * (x - f)).sum((1, 2, 3, 4))
    assert along.abs().max() < 1e-9 * g.norm() * (x - f).norm()
    whole = reference.dmd_direction(x, real=c, fake=f, convention=replace(rule, projected=False))
    assert (whole * (x - f)).sum((1, 2, 3, 4)).abs().min() > 1e-3
    same = reference.dmd_direction(f, real=c, fake=f, convention=rule)
    torch.testing.assert_close(
        same, reference.dmd_direction(f, real=c, fake=f, convention=replace(rule, projected=False))
    )


def test_a_projection_onto_a_small_residual_is_guarded_as_its_formula_says():
    """<e, e> is of the size of the 1e-8 that is added to it."""
    x, f, c, u = predictions()
    f = x + 1e-6 * (f - x)
    assert 1e-10 < float((x - f).square().sum((1, 2, 3, 4)).max()) < 1e-7
    agree(
        value_and_gradient(loss_of("lightx2v_pdmd", layout="bfchw"), x, f, c, u),
        value_and_gradient(lightx2v_pdmd, x, f, c, u, 3.5, **WIDE),
    )


@pytest.mark.parametrize("scale", [1e4, 1e7])
def test_a_projection_does_not_cancel_where_the_critic_is_far_from_the_others(scale):
    """d and e are then f and -f, but for the part that is left; of the formula in float32 at 1e7 nothing is right."""
    x, f, c, u = (v.float() for v in predictions())
    expected = value_and_gradient(lightx2v_pdmd, *(v.double() for v in (x, scale * f, c, u)), 3.5, **WIDE)
    found = value_and_gradient(
        reference.dmd_loss, x, real=c, fake=scale * f, real_uncond=u, convention="lightx2v_pdmd", layout="bfchw"
    )
    for value, exact in zip(found, expected, strict=True):
        assert (value.double() - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("policy", ["to_num", "zero", "zero_sample", "keep"])
@pytest.mark.parametrize("scale", [3e-44, 3e38])
def test_a_norm_out_of_range_is_not_repaired_step_by_step(scale, policy):
    """3e-44 is 21 of float32's steps; the mean of distances up to 6e38 has no number there."""
    rule = replace(conventions.self_forcing, nan=policy, norm_over="selected")
    assert not rule.fusable
    student, real = torch.full((2, 1, 2, 2, 2, 2), scale).unbind()
    real, fake = -real, 0.5 * real
    for level in ({}, {"augment_real": 0.5 * student, "augment_uncond": student, "guidance": 1.0}):
        leaf = student.clone().requires_grad_()
        terms = ops.dmd_loss(leaf, real=real, fake=fake, convention=rule, return_terms=True, **level)
        terms.loss.backward()
        assert not terms.loss.isfinite()
        assert not leaf.grad.isfinite().any()


def test_the_cap_of_a_loss_stops_its_gradient():
    tensors = predictions()
    below, gradient = value_and_gradient(loss_of("lightx2v_pdmd", layout="bfchw"), *tensors)
    capped = replace(conventions.lightx2v_pdmd, layout="bfchw", loss_cap=float(below) / 2)
    value, nothing = value_and_gradient(loss_of(capped), *tensors)
    assert value == float(below) / 2
    assert gradient.any()
    assert not nothing.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_zero_policy_turns_every_non_finite_direction_into_zero(bad):
    x, f, c, u = predictions()
    rule = replace(conventions.self_forcing, nan="zero")
    f[1, 2, 3, 1, 4] = bad
    _, gradient = value_and_gradient(loss_of(rule), x, f, c, u)
    assert gradient[1, 2, 3, 1, 4] == 0
    gradient[1, 2, 3, 1, 4] = 1
    assert (gradient != 0).all()


def test_a_mean_over_everything_differs_from_the_mean_by_the_part_selected():
    tensors = predictions()
    mask = mask_of("elements", tensors[0])
    value, gradient = value_and_gradient(loss_of("self_forcing", mask=mask), *tensors)
    everything = replace(conventions.self_forcing, reduction="mean_all")
    part = float(mask.double().mean())
    agree(value_and_gradient(loss_of(everything, mask=mask), *tensors), (part * value, part * gradient))
    agree(value_and_gradient(loss_of(everything), *tensors), value_and_gradient(loss_of("self_forcing"), *tensors))


@pytest.mark.parametrize("name", ["cosmos", "lightx2v_pdmd"])
def test_the_public_operators_run_what_no_single_pass_knows_step_by_step(name):
    x, f, c, u = (v.float() for v in predictions())
    rule = replace(NAMED[name], layout="bfchw")
    options = {"guidance": 2.0, "mask": mask_of("frames", x), "sample_weight": torch.tensor([1.0, 0.5, 2.0])}
    options |= {"real": c, "fake": f, "real_uncond": u, "convention": rule}
    value, gradient = value_and_gradient(ops.dmd_loss, x, **options)
    expected, expected_gradient = value_and_gradient(reference.dmd_loss, x, **options)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    both = value_and_gradient(ops.codmd_loss, x, **options, relation_weight=0.0)
    torch.testing.assert_close(both, (value, gradient))
    with pytest.raises(ValueError, match=r"the one pass does not know it"):
        ops.dmd_loss(x, **options, backend="cpp")


def test_reward_forcing_weighs_a_sample_by_the_exponential_of_its_reward():
    tensors = predictions()
    rewards = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    found = value_and_gradient(loss_of("reward_forcing", sample_weight=torch.exp(0.5 * rewards)), *tensors)
    each = [
        value_and_gradient(FORMULAS["reward_forcing"], *(v[i : i + 1] for v in tensors), 3.5, **WIDE) for i in range(3)
    ]
    weights = torch.exp(0.5 * rewards) / 3
    agree(
        found,
        (
            sum(w * value for w, (value, _) in zip(weights, each, strict=True)),
            torch.cat([w * gradient for w, (_, gradient) in zip(weights, each, strict=True)]),
        ),
    )


@pytest.mark.parametrize("arithmetic", ["float32", "float64", "emulate"])
def test_the_mean_magnitude_is_that_of_the_weighted_direction(arithmetic):
    x = torch.zeros(2, 3, 2, 4, 4)
    real, fake = x - 1, x - 1 + (1 + 1e-6)
    rule = replace(conventions.fastgen, arithmetic=arithmetic)
    prediction = [reference.x0_prediction(v, None, 1.0, rule, "bcfhw") for v in (fake, real)]
    found = equations.direction(x, *prediction, 1.0, rule, "bcfhw", sample_weight=torch.tensor([2.0, 4.0]))
    assert float(equations.mean_magnitude(found, None)) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("exponent", [-23, 20, 37])
def test_a_loss_of_latents_of_any_magnitude_is_right_or_not_finite(name, exponent):
    rule = replace(NAMED[name], guard="none", eps=0.0, layout="bfchw", loss_cap=None)
    x, f, c, u = (10.0**exponent * v for v in predictions())

    def loss(x, f, c, u, arithmetic="float32"):
        convention = replace(rule, arithmetic=arithmetic)
        return reference.dmd_loss(x, real=c, fake=f, real_uncond=u, guidance=1.5, convention=convention)

    value, gradient = value_and_gradient(loss, *(v.float() for v in (x, f, c, u)))
    expected, expected_gradient = value_and_gradient(loss, x, f, c, u, arithmetic="float64")
    if (name, exponent) == ("tdm", 37):  # this loss alone grows with the latents: its sum overflows
        assert not value.isfinite()
    else:
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=0)
    assert (gradient.double() - expected_gradient).norm() < 2e-5 * expected_gradient.norm()


def test_a_sample_out_of_range_does_not_touch_the_others():
    x, f, c, _ = (v.float() for v in predictions())
    expected, _ = value_and_gradient(reference.dmd_loss, x[1:], real=c[1:], fake=f[1:])
    scale = torch.tensor([1e39, 1e37, 1e37]).reshape(3, 1, 1, 1, 1)
    direction = reference.dmd_direction(x * scale, real=c * scale, fake=f * scale)
    torch.testing.assert_close(0.5 * direction[1:].square().mean(), expected)


def test_every_name_says_which_code_it_was_checked_against():
    assert list(SOURCES) == list(NAMED)
    for source in SOURCES.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repository)
        assert re.fullmatch(r"(after )?20\d\d-\d\d-\d\d", source.date)
        assert re.fullmatch(r"[0-9a-f]{7,9}", source.commit)
        assert source.path.endswith(".py")
        assert source.function
        assert source.url == f"https://github.com/{source.repository}/blob/{source.commit}/{source.path}"
