"""Numbers at the edges: non-finite values, zero vectors, zero norms, and the ends of float32's range."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import POOLS, plain_relation, relative_error
from dmd_cases import run, same_dtype
from dmd_formulas import FORMULAS
from losses import (
    CODMD,
    DMD,
    RELATION,
    SHAPE,
    Calls,
    assert_same,
    distributional,
    evaluate,
    every_form,
    every_loss,
    every_number,
    related,
    widened,
)
from torch import Tensor

from codmd import conventions, ops, reference
from codmd.conventions import NAMED

BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("which", ["student", "real", "fake"])
def test_a_non_finite_latent_reaches_every_term_of_the_relation(which, value, pool, call):
    student, arguments = RELATION.inputs(SHAPE)
    {"student": student, **arguments}[which][1, 2, 1, 2, 3] = value
    for options in ({}, {"frame_weight": 0.0}, {"batch_weight": 0.0}):
        terms, _ = call(RELATION, student, arguments, pool=pool, **options)
        assert not terms[0].isfinite()
        assert not terms[1:].isfinite()[[options.get("batch_weight") != 0, options.get("frame_weight") != 0]].any()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("which", ["student", "real", "fake", "real_uncond", "fake_uncond"])
def test_a_non_finite_latent_reaches_the_total_of_codmd(which, value, call):
    student, arguments = CODMD.inputs(SHAPE)
    {"student": student, **arguments}[which][1, 2, 1, 2, 3] = value
    terms, _ = call(CODMD, student, arguments)
    assert not terms[[0, 2, 3]].isfinite().any()


@related
def test_a_term_without_upstream_gradient_does_not_spread_its_nan(loss, call):
    student, arguments = loss.inputs(SHAPE)
    arguments["fake"][0, 2, 1, 0, 0] = torch.nan
    if loss is CODMD:
        _, gradient = call(loss, student, arguments, (0.0, 1.0, 0.0, 0.0))
        assert gradient.isfinite().all()
    frame = (*[0.0] * (len(loss.upstream) - 1), 1.0)
    _, gradient = call(loss, student, arguments, frame)
    assert gradient[1:].isfinite().all()


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("which", ["student", "real", "fake"])
def test_zero_vectors_follow_the_reference(which, pool, call):
    """u = φ / max(‖φ‖, 1e-12) is 0 for them, and their gradient the longer."""
    student, arguments = RELATION.inputs(SHAPE)
    {"student": student, **arguments}[which][0, 1] = 0
    {"student": student, **arguments}[which][1] = 0
    exact = evaluate(RELATION.reference, student.double(), RELATION.upstream, pool=pool, **arguments)
    assert_same(call(RELATION, student, arguments, pool=pool), exact, 5e-6, 5e-6)


@every_loss
def test_latents_that_are_zero_throughout_have_a_finite_loss(loss, call):
    student, arguments = loss.inputs(SHAPE)
    for where in (student, arguments["real"], arguments["fake"]):
        where.zero_()
        terms, gradient = call(loss, student, arguments)
        assert terms.isfinite().all()
        assert gradient.isfinite().all()


@every_form
@pytest.mark.parametrize("scale", [3e-44, 1e-36, 1e-30, 1e-23, 1e-14, 1e20, 1e25, 1e37])
def test_a_value_is_right_or_not_finite_at_the_ends_of_the_range(scale, loss, call):
    least = torch.finfo(torch.float32).tiny
    student, arguments = loss.inputs(SHAPE)
    student, arguments = student * scale, {n: v * scale if isinstance(v, Tensor) else v for n, v in arguments.items()}
    pooled, batch_norm = [{"pool": pool} for pool in ("mean", None)], [{}, {"convention": "fastvideo"}]
    for options in pooled if loss is RELATION else batch_norm:
        exact = evaluate(loss.reference, student.double(), loss.total, **widened(arguments), **options)
        found = call(loss, student, arguments, loss.total, **options)
        for value, true in zip(found, exact, strict=True):
            right = (value - true).abs() <= 2e-3 * true.abs().max() + least
            assert (right | ~value.isfinite()).all(), (options, value, true)


@pytest.mark.parametrize("pool", ["mean", None], ids=str)
def test_scores_on_either_side_of_the_floor_are_right_or_not_finite(pool, call):
    """|r| under 1e-12 and |f| above it: the clamped norm is not what f - r changes."""
    student, arguments = RELATION.inputs(SHAPE, perturbation=1.0)
    size = 5e-13 / reference.frame_features(arguments["real"], "bfchw", pool).norm(dim=-1).mean()
    real, fake = arguments["real"] * size, arguments["fake"] * 4 * size
    exact = evaluate(
        RELATION.reference, student.double(), RELATION.total, real=real.double(), fake=fake.double(), pool=pool
    )
    found = call(RELATION, student, {"real": real, "fake": fake}, RELATION.total, pool=pool)
    for value, true in zip(found, exact, strict=True):
        right = (value - true).abs() <= 2e-3 * true.abs().max()
        assert (right | ~value.isfinite()).all(), (value, true)


@related
@pytest.mark.parametrize("which", ["real", "fake"])
@pytest.mark.parametrize("scale", [1e-14, 1e-12, 1e-9, 1e-5, 1e5, 1e9, 1e14])
def test_scores_far_from_the_others_are_right_or_not_finite(scale, which, loss, call):
    student, arguments = RELATION.inputs(SHAPE, perturbation=0.3)
    arguments[which][0, 1] *= scale
    arguments[which][1] *= scale
    for pool in ("mean", None) if loss is RELATION else ("mean",):
        exact = plain_relation(student, **arguments, pool=pool)[0][1:]
        terms = call(loss, student, arguments, loss.total, pool=pool).terms[-2:]
        right = (terms - exact).abs() <= 1e-2 * exact + 1e-7
        assert (right | ~terms.isfinite()).all(), (pool, terms, exact)


@related
@pytest.mark.parametrize("scale", [1e7, 1e9, 1e11])
def test_a_gradient_between_scores_far_apart_is_right_or_not_finite(scale, loss, call):
    """A fake far under real has few digits in real + (fake - real), even in double."""
    others = [0.0] * (len(loss.upstream) - 2)
    for seed in range(3):
        student, arguments = RELATION.inputs(SHAPE, perturbation=0.3, seed=seed)
        arguments["real"] *= scale
        for place, alone in ((-2, (1.0, 0.0)), (-1, (0.0, 1.0))):
            terms, gradient = plain_relation(student, **arguments, upstream=(0.0, *alone))
            found = call(loss, student, arguments, (*others, *alone))
            for value, exact in ((found.terms[place], terms[place]), (found.gradient, gradient)):
                assert not value.isfinite().all() or relative_error(value, exact) < 1e-5


@every_number
def test_an_integer_too_large_for_a_float_is_refused_by_name(loss, name, call):
    student, arguments = loss.inputs(SHAPE)
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        call(loss, student, {**arguments, name: 10**400})


@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo"])
def test_a_zero_norm_gives_what_nan_to_num_makes_of_infinity(name, call):
    student, arguments = DMD.inputs(SHAPE, torch.bfloat16)
    plain = {"fake": arguments["fake"], "real": student.clone()}
    plain["fake"][:, :, 0] = student[:, :, 0]
    terms, gradient = call(DMD, student, plain, DMD.total, convention=name)
    f, c = plain["fake"].float(), plain["real"].float()
    _, expected = run(FORMULAS[name], student.float(), {"f": f, "c": c, "u": c}, s=3.5)
    assert terms == torch.inf
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-2, atol=0)
    assert not gradient[:, :, 0].any()
    assert gradient[plain["fake"] != student].abs().min() > 1e34


def test_a_zero_norm_adds_nothing_to_the_reported_magnitude(call: Calls):
    """g = 0/0 is repaired to 0."""
    student, arguments = DMD.inputs(SHAPE)
    latents = {"student": student, "real": arguments["real"], "fake": arguments["fake"]}
    latents["real"][0] = latents["fake"][0] = student[0]
    with call.ambient():
        found = ops.dmd_loss(**latents, backend=call.backend, return_terms=True)
        rest = ops.dmd_loss(**{n: v[1:] for n, v in latents.items()}, backend=call.backend, return_terms=True)
    torch.testing.assert_close(found.magnitude, rest.magnitude * (len(student) - 1) / len(student), rtol=1e-5, atol=0)


def test_a_zero_norm_without_repair_is_not_hidden(call):
    student, arguments = DMD.inputs(SHAPE)
    arguments |= {"real": student, "real_uncond": student}
    terms, gradient = call(DMD, student, arguments, convention=replace(conventions.self_forcing, nan="keep"))
    assert not terms.isfinite().any()
    assert not gradient.isfinite().any()


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e18])
def test_a_loss_that_its_norm_divides_grows_with_all_latents(scale, call):
    student, arguments = DMD.inputs(SHAPE)
    arguments = {name: arguments[name] for name in ("real", "fake", "real_uncond")}
    scaled = {name: value * scale for name, value in arguments.items()}
    rule = {"convention": "tdm", "layout": "bfchw"}
    (expected,), gradient = call(DMD, student, arguments, **rule)
    (found,), of_scaled = call(DMD, student * scale, scaled, **rule)
    if call.backend == "triton" and not found.isfinite():
        return  # its sums are float32
    torch.testing.assert_close(found / scale, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(of_scaled, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["fake", "real", "real_uncond"])
@pytest.mark.parametrize("name", ["self_forcing", "rcm", "fastgen", "videox_fun_z_image"])
def test_a_bad_prediction_in_one_sample_does_what_the_policy_says(name, where, bad, call):
    student, arguments = DMD.inputs((2, *SHAPE[1:]), layout=NAMED[name].layout)
    arguments[where][0, 0, 1, 2, 3] = bad
    terms, gradient = call(DMD, student, arguments, DMD.total, convention=name)
    expected, expected_gradient = same_dtype(student, arguments, convention=name)
    torch.testing.assert_close(terms[0], expected.float(), rtol=1e-5, atol=0, equal_nan=True)
    rounding = 1e-6 * float(expected_gradient[1].abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=rounding, equal_nan=True)
    assert gradient[1].isfinite().all()
    if name == "rcm" and where != "fake" and bad is torch.nan:
        assert not gradient[0].any()


@pytest.mark.parametrize("name", ["rcm", "rcm_2025"])
def test_an_unconditional_prediction_that_guides_nothing_is_not_read(name, call):
    """0 times its NaN would be one."""
    student, arguments = DMD.inputs(SHAPE, layout="bcfhw")
    scales = {"guidance": NAMED[name].guided_above, "fake_guidance": NAMED[name].guided_above}
    absent = {**arguments, "real_uncond": None, "fake_uncond": None, **scales}
    for which in ("real_uncond", "fake_uncond"):
        arguments[which][:, 1] = torch.nan
    assert_same(
        call(DMD, student, {**arguments, **scales}, convention=name), call(DMD, student, absent, convention=name)
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["self_forcing", "fastvideo", "fastgen"])
def test_a_bad_student_reaches_the_loss(name, bad, call):
    student, arguments = DMD.inputs(SHAPE, layout=NAMED[name].layout)
    student[0, 0, 1, 2, 3] = bad
    terms, gradient = call(DMD, student, arguments, convention=name)
    assert terms.isnan().all()
    assert gradient[0, 0, 1, 2, 3].isnan()
    if name != "fastvideo":
        assert gradient[1:].isfinite().all()


def test_a_bad_sample_is_dropped_under_zero_sample(call):
    student, arguments = DMD.inputs(SHAPE, layout="bcfhw")
    student[0, 0, 1, 2, 3] = torch.nan
    found = call(DMD, student, arguments, convention="rcm")
    rest = {n: v[1:] if isinstance(v, Tensor) else v for n, v in arguments.items()}
    expected = call(DMD, student[1:], rest, convention="rcm")
    assert_same((found.terms, found.gradient[1:]), expected, 1e-6, 1e-6)
    assert not found.gradient[0].any()


@distributional
def test_float16_that_overflows_in_its_own_dtype_does_not_in_float32(loss, call):
    student, arguments = loss.inputs(SHAPE, torch.float16)
    large = {
        n: (v * 3e4).clamp(-6e4, 6e4) for n, v in {"student": student, **arguments}.items() if isinstance(v, Tensor)
    }
    assert not (large["real"] - large["student"]).isfinite().all()
    call.assert_accurate(loss, large.pop("student"), {**arguments, **large})


@pytest.mark.parametrize("name", ["fastgen", "modelopt", "diffsynth"])
@pytest.mark.parametrize("arithmetic", ["float32", "float64", "emulate"])
def test_the_magnitude_is_of_what_the_convention_weights(arithmetic, name, call: Calls):
    """Of g = 1 and weights 2 and 4, mean|g| is 3 where g is weighted and 1 where its square is."""
    ones = torch.ones(2, 1, 3, 2, 2)
    arguments = {"student": ones * 2, "real": ones, "fake": ones * 2, "sample_weight": torch.tensor([2.0, 4.0])}
    convention = replace(NAMED[name], arithmetic=arithmetic, layout="bfchw")
    backend = call.backend if convention.fusable else "auto"
    with call.ambient():
        terms = ops.dmd_loss(**arguments, convention=convention, backend=backend, return_terms=True)
    torch.testing.assert_close(float(terms.magnitude), 1.0 if name == "diffsynth" else 3.0, rtol=1e-5, atol=0)
