"""The decoupled loss (arXiv 2511.22677): matching at one noise level, guidance at another, each with its own norm."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from dmd_cases import mask_of
from dmd_formulas import value_and_gradient

from codmd import conventions, reference

SHAPE = (3, 6, 4, 5, 7)


def levels():
    """A student, a critic and a teacher at one level, and the teacher's two predictions at another."""
    generator = torch.Generator().manual_seed(4)
    x, noise, c1, c2, u2 = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(5))
    return x, c1 + 0.2 * noise, c1, c2, u2


def decoupled(x, f, c1, c2, u2, convention="helios", guidance=2.5, **options):
    rule = replace(conventions.resolve(convention), arithmetic="float64")
    return reference.dmd_loss(
        x, real=c1, fake=f, augment_real=c2, augment_uncond=u2, guidance=guidance, convention=rule, **options
    )


def quotient(difference, x, r):
    return torch.nan_to_num(difference / (x - r).abs().mean((1, 2, 3, 4), keepdim=True))


def test_the_decoupled_loss_is_the_sum_of_its_two_halves():
    x, f, c1, c2, u2 = levels()
    g = quotient(f - c1, x, c1) - quotient(2.5 * (c2 - u2), x, c2)
    value, gradient = value_and_gradient(decoupled, x, f, c1, c2, u2)
    torch.testing.assert_close(value, 0.5 * g.square().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, g / g.numel(), rtol=1e-10, atol=1e-16)
    direction = reference.dmd_direction(x, real=c1, fake=f, augment_real=c2, augment_uncond=u2, guidance=2.5)
    torch.testing.assert_close(direction, g, rtol=1e-10, atol=1e-14)


def test_the_decoupled_gradient_is_that_of_two_regressions_as_helios_writes_them():
    x, f, c1, c2, u2 = levels()

    def helios(x):
        matching, augmentation = quotient(c1 - f, x, c1).detach(), quotient(2.5 * (c2 - u2), x, c2).detach()
        return sum(0.5 * ((x - (x + half).detach()) ** 2).mean() for half in (matching, augmentation))

    _, gradient = value_and_gradient(decoupled, x, f, c1, c2, u2)
    _, expected = value_and_gradient(helios, x)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-16)


def test_the_papers_scale_w_is_one_more_than_the_cond_form():
    x, f, c1, c2, u2 = levels()
    w = 3.5
    uncond = replace(conventions.helios, guidance_form="uncond")
    paper = quotient(f - c1, x, c1) - quotient((w - 1) * (c2 - u2), x, c2)
    for rule, scale in ((uncond, w), (conventions.helios, conventions.helios.guidance_scale(w, "uncond"))):
        _, gradient = value_and_gradient(decoupled, x, f, c1, c2, u2, convention=rule, guidance=scale)
        torch.testing.assert_close(gradient, paper / paper.numel(), rtol=1e-10, atol=1e-16)


def test_decoupled_at_one_level_is_the_guided_difference_over_the_unguided_norm():
    x, f, c1, _, u2 = levels()
    _, gradient = value_and_gradient(decoupled, x, f, c1, c1, u2)
    guided = reference.guided(c1, u2, 2.5)
    torch.testing.assert_close(gradient, quotient(f - guided, x, c1) / x.numel(), rtol=1e-9, atol=1e-15)


def test_the_policies_of_a_convention_hold_for_either_half():
    x, f, c1, c2, u2 = levels()
    mask, weight = mask_of("elements", x), torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    rule = replace(conventions.fastgen, layout="bfchw", guidance_form="cond")
    options = {"convention": rule, "mask": mask, "sample_weight": weight}
    value, gradient = value_and_gradient(decoupled, x, f, c1, c2, u2, **options)

    def half(difference, r):
        return difference / ((x - r).abs().mean((1, 2, 3, 4), keepdim=True) + 1e-6)

    g = weight.reshape(3, 1, 1, 1, 1) * (half(f - c1, c1) - 2.5 * half(c2 - u2, c2)) * mask
    torch.testing.assert_close(gradient, g / mask.sum(), rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(value, 0.5 * g.square().sum() / mask.sum(), rtol=1e-10, atol=0)
    c2[1, 2, 3, 1, 4] = torch.nan  # repaired in the second half, the first is untouched
    _, repaired = value_and_gradient(decoupled, x, f, c1, c2, u2)
    torch.testing.assert_close(repaired[1], quotient(f - c1, x, c1)[1] / x.numel(), rtol=1e-10, atol=1e-16)


def test_a_decoupled_loss_in_float32_is_right_to_float32_rounding():
    tensors = levels()
    expected, expected_gradient = value_and_gradient(decoupled, *tensors)
    x, f, c1, c2, u2 = (v.float() for v in tensors)

    def single(x):
        options = {"augment_real": c2, "augment_uncond": u2, "guidance": 2.5}
        return reference.dmd_loss(x, real=c1, fake=f, convention="helios", **options)

    value, gradient = value_and_gradient(single, x)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    assert (gradient.double() - expected_gradient).norm() < 2e-6 * expected_gradient.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment_uncond": None}, "augment_uncond is missing"),
        ({"augment_real": None}, "augment_real is missing"),
        ({"real_uncond": torch.zeros(SHAPE)}, "real_uncond does not go with augment_real"),
        ({"prediction": "flow"}, "prediction='flow' does not go with augment_real: allowed: x0"),
        ({"convention": "tdm", "layout": "bfchw"}, "no decoupled loss: norm_divides='loss'"),
        ({"convention": "lightx2v_pdmd"}, "no decoupled loss: projected=True"),
        (
            {"convention": replace(conventions.self_forcing, arithmetic="emulate")},
            "no decoupled loss: arithmetic='emulate'",
        ),
    ],
)
def test_what_a_decoupled_loss_cannot_be_is_named(change, message):
    x, f, c1, c2, u2 = levels()
    arguments = {"real": c1, "fake": f, "augment_real": c2, "augment_uncond": u2, "convention": "helios"}
    with pytest.raises(ValueError, match=re.escape(message)):
        reference.dmd_loss(x, **{**arguments, **change})
