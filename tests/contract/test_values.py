"""Values and gradients: as accurate as PyTorch in the same dtype, for every shape, layout, dtype, pool and option."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, LAYOUTS, POOLS, relative_error
from interpreted import INTERPRETED
from losses import (
    CODMD,
    DMD,
    LOSSES,
    RELATION,
    SHAPE,
    assert_same,
    distributional,
    evaluate,
    every_loss,
    every_number,
    related,
    widened,
)

from codmd import conventions
from codmd.conventions import NAMED

# One element; one frame, prime sizes; one sample; Wan's 21 frames; rows longer than a vector; columns; one pixel
SHAPES = [(1, 1, 1, 1, 1), (3, 1, 3, 7, 13), (1, 5, 3, 4, 4), (2, 21, 4, 3, 5), (2, 3, 2, 1, 41), (4, 2, 5, 41, 3)]
AWKWARD = [(1, 127, 2, 1, 3), (41, 2, 3, 5, 1), (1, 2, 127, 3, 1), (2, 2, 2, 1, 1271), (127, 1, 2, 2, 2)]
if INTERPRETED:
    SHAPES, AWKWARD = [(1, 1, 1, 1, 1), (3, 1, 2, 7, 13), (1, 5, 2, 4, 4)], [(1, 41, 2, 1, 3), (2, 2, 2, 1, 1271)]
FUSABLE = [name for name in NAMED if NAMED[name].fusable]
ACCURATE = SHAPE if INTERPRETED else (2, 5, 4, 7, 9)

CUSTOMISED = [
    {"penalty": "huber", "norm_divides": "loss", "nan": "keep", "huber_c": 0.05},
    {"norm_scope": "block", "norm_block": 2, "independent_first_frame": True, "guard": "add", "eps": 0.1},
    {"norm_scope": "block", "norm_block": 100},
    {"norm_scope": "batch", "guard": "clamp", "eps": 10.0},
    {"reduction": "sum", "coefficient": 0.25},
    {"nan": "zero_sample", "guard": "add", "eps": 1e-6, "norm_scope": "block", "norm_block": 3},
]


def pools(loss, shape):
    """The pools that a loss takes on ``shape``, as options."""
    if loss is DMD:
        return [{}]
    regions = (min(2, shape[3]), min(3, shape[4]))
    return [{"pool": pool} for pool in (("mean", regions) if loss is CODMD else ("mean", regions, None))]


@every_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_at_most_twice_that_of_pytorch(shape, dtype, loss, call):
    for layout in LAYOUTS:
        for options in pools(loss, shape):
            call.assert_accurate(loss, *loss.inputs(shape, dtype, layout), layout=layout, **options)


@every_loss
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_awkward_sizes_are_as_accurate(shape, loss, call):
    for dtype in (torch.float32, torch.bfloat16):
        call.assert_accurate(loss, *loss.inputs(shape, dtype), **pools(loss, shape)[0])


@related
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("perturbation", [1e-4, 1e-2, 1.0])
def test_the_error_holds_over_temperatures_and_perturbations(temperature, perturbation, loss, call):
    inputs = loss.inputs(ACCURATE, perturbation=perturbation)
    if loss is CODMD:  # the guided predictions would lie as far apart as the unguided ones
        del inputs[1]["real_uncond"], inputs[1]["fake_uncond"]
    for options in pools(loss, SHAPE):
        call.assert_accurate(loss, *inputs, temperature=temperature, **options)


@every_loss
@pytest.mark.parametrize("perturbation", [1e-3, 1e-5])
def test_a_critic_that_tracks_the_teacher_keeps_its_digits(perturbation, loss, call):
    student, arguments = loss.inputs(ACCURATE, perturbation=perturbation)
    arguments = {name: arguments[name] for name in ("real", "fake")}
    found = call(loss, student, arguments, loss.total)
    options = {} if loss is RELATION else {"guidance": 1.0, "fake_guidance": 1.0}
    exact = evaluate(loss.reference, student.double(), loss.total, **widened(arguments), **options)
    assert relative_error(found.terms[0], exact.terms[0]) < 3e-6
    assert relative_error(found.gradient, exact.gradient) < 3e-6


@related
@pytest.mark.parametrize("weights", [(0, 0), (1, 0), (0, 1), (0.3, 2.0)], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE[1:]), (3, 1, *SHAPE[2:])], ids=str)
def test_weights_select_and_scale_the_terms(shape, weights, loss, call):
    options = {"batch_weight": weights[0], "frame_weight": weights[1]}
    for upstream in (loss.total, loss.upstream):
        terms = call.assert_accurate(loss, *loss.inputs(shape), upstream, **options).terms
    expected = weights[0] * terms[-2] + weights[1] * terms[-1]
    if loss is CODMD:
        expected = terms[1] + 0.1 * expected
    torch.testing.assert_close(terms[0], expected, rtol=1e-6, atol=0)
    assert (terms[-2] == 0) == (not weights[0] or shape[0] == 1)
    assert (terms[-1] == 0) == (not weights[1] or shape[1] == 1)


@related
def test_one_frame_of_one_sample_has_no_relation(loss, call):
    student, arguments = loss.inputs((1, 1, 2, 4, 6))
    terms, gradient = call(loss, student, arguments, (*[0.0] * (len(loss.upstream) - 2), 1.0, 1.0))
    assert terms[-2:].tolist() == [0, 0]
    assert not gradient.any()


@every_loss
@pytest.mark.parametrize("options", [{}, {"frame_weight": 2.0}, {"batch_weight": 0.0}, {"pool": None}], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_the_loss_alone_is_the_total_of_its_terms(samples, options, loss, call):
    options = {} if loss is DMD else options
    student, arguments = loss.inputs((samples, *SHAPE[1:]))
    found = call.of(loss.alone, student, (1.0,), **arguments, **options)
    expected = call(loss, student, arguments, loss.total, **options)
    assert torch.equal(found.terms[0], expected.terms[0])
    assert torch.equal(found.gradient, expected.gradient)


@distributional
@pytest.mark.parametrize("name", FUSABLE)
def test_every_fusable_convention_is_as_accurate(name, loss, call):
    for dtype in DTYPES:
        layout = NAMED[name].layout
        call.assert_accurate(loss, *loss.inputs((2, 4, 2, 3, 5), dtype, layout), convention=name)


@distributional
@pytest.mark.parametrize("change", CUSTOMISED, ids=str)
def test_customised_conventions_are_as_accurate(change, loss, call):
    options = {"convention": replace(conventions.self_forcing, **change)}
    student, arguments = loss.inputs((2, 7, 2, 3, 5), torch.bfloat16)
    call.assert_accurate(loss, student, arguments, **options)
    mask = torch.rand(student.shape, generator=torch.Generator().manual_seed(3)) > 0.4
    call.assert_accurate(loss, student, arguments, sample_weight=torch.tensor([0.3, 2.5]), mask=mask, **options)


@distributional
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bfchw", "bcfhw", "bchw"])
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastgen"])
def test_velocities_give_what_their_x0_predictions_do(name, layout, dtype, loss, call):
    student, arguments = loss.inputs(SHAPE, dtype, layout, flow=True)
    options = {"convention": name, "layout": layout, "prediction": "flow"}
    call.assert_accurate(loss, student, arguments, **options)
    arguments["sigma"] = arguments["sigma"].reshape(len(student), -1)[:, 0]
    call.assert_accurate(loss, student, arguments, **options)


@distributional
@pytest.mark.parametrize("missing", [("real_uncond",), ("fake_uncond",), ("real_uncond", "fake_uncond")], ids=str)
def test_without_an_unconditional_prediction_there_is_no_guidance(missing, loss, call):
    student, arguments = loss.inputs(SHAPE)
    kept = {name: value for name, value in arguments.items() if name not in missing}
    found = call.assert_accurate(loss, student, kept)
    scales = {"guidance" if name == "real_uncond" else "fake_guidance": 0.0 for name in missing}
    assert_same(call(loss, student, {**arguments, **scales}), found, 1e-6, 1e-6)


@distributional
def test_cond_form_guidance_is_uncond_form_guidance_of_one_more(loss, call):
    student, arguments = loss.inputs(SHAPE)
    found = call(loss, student, arguments, convention=conventions.self_forcing)
    more = {"guidance": arguments["guidance"] + 1, "fake_guidance": arguments["fake_guidance"] + 1}
    uncond = replace(conventions.self_forcing, guidance_form="uncond")
    assert_same(call(loss, student, {**arguments, **more}, convention=uncond), found, 1e-6, 1e-6)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_codmd_is_dmd_plus_lambda_times_the_relation(pool, call):
    student, arguments = CODMD.inputs(SHAPE)
    plain = {name: arguments[name] for name in ("real", "fake")}
    options = {"pool": pool, "temperature": 0.2, "batch_weight": 0.7, "frame_weight": 1.9}
    both = call(CODMD, student, plain, CODMD.total, relation_weight=0.3, **options)
    dmd = call(DMD, student, plain, DMD.total)
    relation = call(RELATION, student, plain, RELATION.total, **options)
    assert relative_error(both.terms[0], dmd.terms[0] + 0.3 * relation.terms[0]) < 2e-6
    assert relative_error(both.gradient, dmd.gradient + 0.3 * relation.gradient) < 5e-6


def test_without_a_relation_weight_codmd_is_the_dmd_loss(call):
    student, arguments = CODMD.inputs(SHAPE, torch.bfloat16)
    found = call(CODMD, student, arguments, CODMD.total, relation_weight=0.0)
    expected = call(DMD, student, arguments, DMD.total)
    assert found.terms.tolist() == [expected.terms.item(), expected.terms.item(), 0.0, 0.0]
    assert torch.equal(found.gradient, expected.gradient)


def test_regions_of_one_pixel_are_every_pixel(call):
    inputs = RELATION.inputs(SHAPE)
    assert_same(call(RELATION, *inputs, pool=SHAPE[3:]), call(RELATION, *inputs, pool=None), 1e-5, 1e-5)


def test_images_are_videos_of_one_frame(call):
    for loss in (DMD, CODMD):
        student, arguments = loss.inputs((3, 1, 2, 4, 6), layout="bchw")
        videos = {n: v.unsqueeze(1) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        terms, gradient = call(loss, student, arguments, layout="bchw")
        expected = call(loss, student.unsqueeze(1), videos)
        assert_same((terms, gradient.unsqueeze(1)), expected, 1e-6, 1e-6)


@every_number
def test_a_number_may_be_a_tensor_without_axes(loss, name, call):
    student, arguments = loss.inputs(SHAPE)
    expected = call(loss, student, {**arguments, name: 0.75})
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = call(loss, student, {**arguments, name: torch.tensor(0.75, dtype=dtype)})
        assert_same(found, expected, 1e-6, 1e-6)


def test_float64_runs_on_the_reference_whatever_is_compiled():
    for loss in LOSSES:
        student, arguments = loss.inputs(SHAPE, torch.float64)
        found = evaluate(loss.operator, student, loss.upstream, **arguments)
        assert_same(found, evaluate(loss.reference, student, loss.upstream, **arguments), 1e-12, 1e-12)
