"""``dmd_loss``: every backend against the float64 reference, with every convention, mask, weight and layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, relative_error
from dmd_cases import BACKENDS, LAYOUTS, assert_as_good_as_torch, mask_of, run, scores, truth

from codmd import conventions, ops, reference
from codmd.conventions import NAMED

FUSABLE = [name for name, convention in NAMED.items() if convention.fusable]
MASKS = ("none", "elements", "frames", "one", "all", "nothing")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSABLE)
def test_every_convention_is_as_good_as_torch(name, dtype, backend):
    student, arguments = scores(dtype=dtype, layout=NAMED[name].layout)
    assert_as_good_as_torch(student, arguments, backend, convention=name, guidance=4.5, fake_guidance=1.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo", "rcm", "tdm"])
def test_masks(name, kind, layout, backend):
    student, arguments = scores(dtype=torch.bfloat16, layout=layout)
    options = {"convention": name, "layout": layout, "mask": mask_of(kind, student)}
    assert_as_good_as_torch(student, arguments, backend, upstream=3.0, **options)
    value, gradient = run(ops.dmd_loss, student, arguments, backend=backend, **options)
    if kind == "nothing":
        assert value == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))
    if kind == "one":
        assert int((gradient != 0).sum()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastgen"])
def test_raw_network_outputs(name, dtype, layout, backend):
    student, arguments = scores(dtype=dtype, layout=layout, flow=True)
    options = {"convention": name, "layout": layout, "prediction": "flow", "guidance": 4.5}
    assert_as_good_as_torch(student, arguments, backend, **options)
    per_sample = {**arguments, "sigma": arguments["sigma"].reshape(len(student), -1)[:, 0]}
    assert_as_good_as_torch(student, per_sample, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        {"penalty": "huber", "norm_divides": "loss", "nan": "keep", "huber_c": 0.05},
        {"norm_scope": "block", "norm_block": 2, "independent_first_frame": True, "guard": "add", "eps": 0.1},
        {"norm_scope": "block", "norm_block": 100},
        {"norm_scope": "batch", "guard": "clamp", "eps": 10.0},
        {"reduction": "sum", "coefficient": 0.25},
        {"nan": "zero_sample", "guard": "add", "eps": 1e-6, "norm_scope": "block", "norm_block": 3},
    ],
    ids=str,
)
def test_customised_conventions(change, backend):
    convention = replace(conventions.self_forcing, **change)
    student, arguments = scores(dtype=torch.bfloat16)
    weight = torch.tensor([0.3, 2.5])
    mask = mask_of("elements", student)
    assert_as_good_as_torch(student, arguments, backend, convention=convention)
    assert_as_good_as_torch(student, arguments, backend, convention=convention, sample_weight=weight, mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["self_forcing", "fastgen", "fastvideo"])
def test_weights_of_samples(name, backend):
    student, arguments = scores(layout=NAMED[name].layout)
    options = {"convention": name, "sample_weight": torch.tensor([0.0, 2.0], dtype=torch.float64)}
    assert_as_good_as_torch(student, arguments, backend, **options)
    _, gradient = run(ops.dmd_loss, student, arguments, backend=backend, **options)
    assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 2, 5, 1, 41), (1, 4, 16, 3, 104), (2, 3, 1, 17, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(shape, dtype, backend):
    student, arguments = scores(shape, dtype)
    assert_as_good_as_torch(student, arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, backend):
    student, arguments = scores((2, 4, 6, 5, 14), dtype, flow=True)
    options = {"prediction": "flow", "mask": mask_of("elements", student)[..., ::2]}
    student = student[..., ::2]
    arguments = {
        name: value if name == "sigma" else value[..., ::2].transpose(1, 4).contiguous().transpose(1, 4)
        for name, value in arguments.items()
    }
    arguments["real_uncond"] = arguments["real_uncond"][:, :1].expand_as(student)
    assert_as_good_as_torch(student, arguments, backend, **options)
    channels_last = student.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    _, gradient = run(ops.dmd_loss, channels_last, arguments, backend=backend, **options)
    assert gradient.stride() == channels_last.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("perturbation", [1e-2, 1e-4])
def test_a_critic_that_tracks_the_teacher_keeps_its_digits(perturbation, backend):
    student, arguments = scores(perturbation=perturbation)
    arguments.pop("fake_uncond"), arguments.pop("real_uncond")
    value, gradient = run(ops.dmd_loss, student, arguments, backend=backend)
    true_value, true_gradient = truth(student, arguments)
    assert relative_error(value, true_value) < 1e-6
    assert relative_error(gradient, true_gradient) < 1e-6


def test_the_gradient_is_g_over_the_number_of_selected_elements():
    student, arguments = scores((2, 3, 2, 2, 3), torch.float64, flow=True)
    mask = mask_of("elements", student)
    plain = {name: arguments[name] for name in ("fake", "real", "noisy", "sigma")}
    _, gradient = run(ops.dmd_loss, student, plain, prediction="flow", mask=mask)
    sigma = arguments["sigma"].double()[:, :, None, None, None]
    fake, real = (arguments["noisy"] - sigma * arguments[name] for name in ("fake", "real"))
    norm = (student - real).abs().flatten(1).mean(1).reshape(2, 1, 1, 1, 1)
    expected = torch.where(mask, (fake - real) / norm, 0) / mask.sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("arithmetic", ["float64", "emulate"])
@pytest.mark.parametrize("name", NAMED)
def test_stepwise_arithmetic_is_the_reference(name, arithmetic):
    convention = replace(NAMED[name], arithmetic=arithmetic)
    student, arguments = scores(dtype=torch.bfloat16, layout=convention.layout)
    options = {"convention": convention, "guidance": 4.1, "mask": mask_of("elements", student)}
    value, gradient = run(ops.dmd_loss, student, arguments, **options)
    expected, expected_gradient = run(reference.dmd_loss, student, arguments, **options)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo", "tdm"])
def test_terms_report_magnitude_norm_and_guided_real(name, backend):
    assert_terms(replace(NAMED[name], arithmetic="float32"), backend)


@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo", "tdm"])
def test_terms_are_reported_by_emulation_too(name):
    assert_terms(replace(NAMED[name], arithmetic="emulate"), "reference")


def assert_terms(convention, backend):
    """The terms beside the loss, against the reference's direction and guidance and the distances' means."""
    student, arguments = scores((2, 6, 3, 5, 9), dtype=torch.bfloat16, layout=convention.layout)
    arguments.pop("fake_uncond")
    options = {"convention": convention, "backend": backend, "return_terms": True}
    terms = ops.dmd_loss(student, **arguments, **options, return_real=True)
    scalars = ops.dmd_loss(student, **arguments, **options)
    assert scalars.real is None
    assert all(torch.equal(a, b) for a, b in zip(scalars[:3], terms[:3], strict=True))
    alone = ops.dmd_loss(student, **arguments, convention=convention, backend=backend)
    assert torch.equal(terms.loss, alone)
    g = reference.dmd_direction(student, convention=convention, **arguments)
    torch.testing.assert_close(terms.magnitude.float(), g.abs().mean().float(), rtol=1e-2, atol=0)
    guided = reference.guided(
        arguments["real"].float(), arguments["real_uncond"].float(), 3.5, convention.guidance_form
    )
    torch.testing.assert_close(terms.real.float(), guided, rtol=1e-2, atol=3e-2)
    shapes = {"sample": (2,), "batch": (1,), "block": (2, 2)}
    assert terms.norm.shape == shapes[convention.norm_scope]
    distance = (student.float() - guided).abs()
    pieces = {"sample": (2, -1), "batch": (1, -1), "block": (2, 2, -1)}[convention.norm_scope]
    expected = distance.reshape(pieces).mean(-1)
    torch.testing.assert_close(terms.norm.float(), expected, rtol=1e-2, atol=0)
    assert not terms.magnitude.requires_grad
    assert not terms.norm.requires_grad
