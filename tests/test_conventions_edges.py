"""Every convention against its formula where it is hardest: layouts, strides, masks, overflow, zeros, NaN and Inf."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dmd_cases import BACKENDS, mask_of
from dmd_formulas import FORMULAS, value_and_gradient

from codmd import ops, reference
from codmd.conventions import NAMED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = {"single": torch.float64, "double": torch.float64}
SCALE = 3.5
FUSABLE = [name for name, convention in NAMED.items() if convention.fusable]
DROPPING = [name for name, convention in NAMED.items() if convention.nan == "zero_sample"]


def predictions(layout: str, dtype: torch.dtype, seed: int = 0):
    """(student, fake, conditional, unconditional) of an odd shape."""
    shape = {"bfchw": (3, 7, 3, 5, 9), "bcfhw": (3, 3, 7, 5, 9), "bchw": (3, 3, 5, 9)}[layout]
    generator = torch.Generator().manual_seed(seed)
    x, c, u, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    return [v.to(dtype) for v in (x, c + 0.1 * noise, c, u)]


def ours(name: str, arithmetic: str, function=reference.dmd_loss, **options):
    convention = replace(NAMED[name], arithmetic=arithmetic)

    def loss(x, f, c, u):
        return function(x, real=c, fake=f, real_uncond=u, guidance=SCALE, convention=convention, **options)

    return loss


def formula(name: str, tensors, **options):
    return value_and_gradient(FORMULAS[name], *tensors, SCALE, **options)


def spoil(kind: str, tensors, bad: float = 0.0) -> None:
    """Sample 1 gets a norm of exactly zero, or one bad number in a prediction or in the student."""
    x, f, c, u = tensors
    if kind == "zero norm":
        c[1], u[1] = x[1], x[1]
        f[1, 0] = x[1, 0]
        return
    wrong = {"student": x, "fake": f, "cond": c, "uncond": u}[kind]
    wrong[1].view(-1)[37] = bad


EDGES = [("zero norm", 0.0)] + [(where, bad) for where in ("fake", "cond", "uncond") for bad in (torch.nan, torch.inf)]


def without_its_overflow(name: str, gradient, ours):
    """Two codebases square by a power, whose derivative doubles g: the dtype's largest number overflows in theirs."""
    return torch.where(gradient.isinf(), ours, gradient) if name in ("one_forcing", "fastvideo_streaming") else gradient


def without_the_dropped_sample(name: str, gradient):
    """rCM's own backward pass multiplies the NaN of a dropped sample by zero; ours is zero there."""
    return gradient.nan_to_num(0.0, torch.inf, -torch.inf) if name in DROPPING else gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "bad"), EDGES)
@pytest.mark.parametrize("name", NAMED)
def test_emulation_repeats_zeros_nans_and_infinities(name, kind, bad, dtype):
    tensors = predictions(NAMED[name].layout, dtype)
    spoil(kind, tensors, bad)
    value, gradient = value_and_gradient(ours(name, "emulate"), *tensors)
    expected, expected_gradient = formula(name, tensors)
    # Their sums have another order in float64: without the dropped sample, or sample by sample.
    rounding = 1e-15 if name in DROPPING else 0
    torch.testing.assert_close(value, expected.to(value.dtype), rtol=rounding, atol=0, equal_nan=True)
    expected_gradient = without_its_overflow(name, without_the_dropped_sample(name, expected_gradient), gradient)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "bad"), EDGES)
@pytest.mark.parametrize("name", FUSABLE)
def test_the_fused_pass_repairs_drops_and_shows_what_the_formula_does(name, kind, bad, backend):
    tensors = predictions(NAMED[name].layout, torch.float32)
    spoil(kind, tensors, bad)
    value, gradient = value_and_gradient(ours(name, "float32", ops.dmd_loss, backend=backend), *tensors)
    expected, expected_gradient = formula(name, tensors, double=torch.float32)
    if (name, kind) == ("tdm", "zero norm") or (
        name in ("diffsynth", "simpletuner") and (kind, bad) == ("uncond", torch.inf)
    ):
        # Sums are divided, not elements, and guidance starts from the conditional prediction: other non-finite numbers.
        assert not expected.isfinite()
        assert not value.isfinite()
        assert not gradient[1].isfinite().all()
        torch.testing.assert_close(gradient[::2], expected_gradient[::2], rtol=2e-5, atol=2e-6)
        return
    torch.testing.assert_close(value, expected.float(), rtol=2e-5, atol=0, equal_nan=True)
    expected_gradient = without_its_overflow(name, without_the_dropped_sample(name, expected_gradient), gradient)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("name", NAMED)
def test_float16_overflow_is_emulated_to_the_last_bit(name):
    tensors = [3e4 * v for v in predictions(NAMED[name].layout, torch.float16)]
    value, gradient = value_and_gradient(ours(name, "emulate"), *tensors)
    expected, expected_gradient = formula(name, tensors)
    torch.testing.assert_close(value, expected.to(value.dtype), rtol=0, atol=0, equal_nan=True)
    expected_gradient = without_its_overflow(name, without_the_dropped_sample(name, expected_gradient), gradient)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("arithmetic", ["float64", "emulate"])
@pytest.mark.parametrize("name", [name for name in NAMED if NAMED[name].layout != "bchw"])
def test_layout_and_strides_change_nothing(name, arithmetic):
    own = NAMED[name].layout
    other = {"bfchw": "bcfhw", "bcfhw": "bfchw"}[own]
    dtype, tolerance = (torch.float64, 1e-12) if arithmetic == "float64" else (torch.bfloat16, 1e-2)
    tensors = predictions(own, dtype)
    value, gradient = value_and_gradient(ours(name, arithmetic), *tensors)
    turned = [v.transpose(1, 2) for v in tensors]
    assert not turned[0].is_contiguous()
    again, turned_gradient = value_and_gradient(ours(name, arithmetic, layout=other), *turned)
    torch.testing.assert_close(again, value, rtol=tolerance, atol=0)
    torch.testing.assert_close(turned_gradient.transpose(1, 2), gradient, rtol=tolerance, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["elements", "frames", "one", "all", "nothing"])
@pytest.mark.parametrize("name", FUSABLE)
def test_a_mask_selects_from_the_formula(name, kind, backend):
    convention = NAMED[name]
    tensors = predictions(convention.layout, torch.float64)
    x, f, c, u = tensors
    mask = mask_of(kind, x).expand_as(x)
    _, whole = formula(name, tensors, **WIDE)
    elements = x.numel() if convention.reduction == "mean" else 1
    selected = max(int(mask.sum()), 1) if convention.reduction == "mean" else 1
    expected_gradient = torch.where(mask, whole, 0) * elements / selected
    real = reference.guided(c, u, SCALE, convention.guidance_form)
    residual = f - real if convention.norm_divides == "loss" else whole * elements / (2 * convention.coefficient)
    expected = 0.5 * (expected_gradient * residual).sum()
    value, gradient = value_and_gradient(
        ours(name, "float32", ops.dmd_loss, backend=backend, mask=mask), *(v.float() for v in tensors)
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
    assert not gradient[~mask].any()


@pytest.mark.parametrize("kind", ["elements", "frames", "one", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_self_forcing_is_emulated_to_the_last_bit(dtype, kind):
    tensors = predictions("bfchw", dtype)
    mask = mask_of(kind, tensors[0]).expand_as(tensors[0])

    def masked(x, f, c, u):
        r = c + (c - u) * SCALE
        g = torch.nan_to_num((f - r) / (x - r).abs().mean(dim=[1, 2, 3, 4], keepdim=True).detach())
        target = (x.double() - g.double()).detach()
        return 0.5 * F.mse_loss(x.double()[mask], target[mask], reduction="mean")

    value, gradient = value_and_gradient(ours("self_forcing", "emulate", mask=mask), *tensors)
    expected, expected_gradient = value_and_gradient(masked, *tensors)
    torch.testing.assert_close(value, expected, rtol=1e-15, atol=0)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(), (9,), (5, 1), (3, 1, 1), (7, 1, 1, 9), (3, 1, 1, 1, 1), (1, 7, 1, 5, 9), (3, 7, 3, 5, 9)], ids=str
)
@pytest.mark.parametrize("chosen", ["some", "nothing"])
def test_a_mask_of_any_broadcastable_shape_selects_its_elements(shape, chosen, backend):
    x, f, c, _ = predictions("bfchw", torch.float32)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > (0.4 if shape else 0)
    if chosen == "nothing":
        mask = torch.zeros_like(mask)
    value, gradient = value_and_gradient(lambda x: ops.dmd_loss(x, real=c, fake=f, mask=mask, backend=backend), x)
    g = (f - c) / (x - c).abs().mean((1, 2, 3, 4), keepdim=True)
    selected = mask.expand(x.shape)
    expected = torch.where(selected, g, 0) / max(int(selected.sum()), 1)
    torch.testing.assert_close(value, 0.5 * (g * expected).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)
    if chosen == "nothing":
        assert value == 0
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUSABLE)
def test_weights_of_samples_multiply_their_gradients(name, backend):
    convention = NAMED[name]
    tensors = predictions(convention.layout, torch.float64)
    x, f, c, u = tensors
    weights = torch.tensor([0.5, 0.0, 3.0])
    per_sample = weights.double().reshape(-1, *[1] * (x.ndim - 1))
    _, whole = formula(name, tensors, **WIDE)
    elements = x.numel() if convention.reduction == "mean" else 1
    real = reference.guided(c, u, SCALE, convention.guidance_form)
    residual = f - real if convention.norm_divides == "loss" else whole * elements / (2 * convention.coefficient)
    power = 2 if name in ("fastgen", "modelopt") else 1
    loss = ours(name, "float32", ops.dmd_loss, backend=backend, sample_weight=weights)
    value, gradient = value_and_gradient(loss, *(v.float() for v in tensors))
    torch.testing.assert_close(value.double(), 0.5 * (per_sample**power * whole * residual).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), per_sample * whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
