"""``dmd_loss``: its gradient in closed form, the arithmetic that runs step by step, and what it reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dmd_cases import BACKENDS, mask_of, run, scores

from codmd import ops, reference
from codmd.conventions import NAMED


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
