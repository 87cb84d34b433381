"""Whole latents of bfloat16 and float16: products of parts that are exact, against float64, in Triton's interpreter.

The parts and their products are the GPU's, bit for bit; the interpreter adds in float32 and in another order.
"""

from __future__ import annotations

import pytest
import torch
from cases import latents, loss_and_gradient, relative_error, same_dtype_errors, truth
from interpreted import INTERPRETED

pytest.importorskip("triton")

if INTERPRETED:
    import triton
    import triton.language as tl

    from codmd.kernels.whole import cores
    from codmd.ops import relation_loss

    HALVES = [torch.bfloat16, torch.float16]
    BITS = {torch.bfloat16: 8, torch.float16: 11}
    """Significant ones."""

    @triton.jit
    def parts_kernel(real, fake, parts, HALF: tl.constexpr):
        at = tl.arange(0, 4096)
        d = tl.load(fake + at).to(tl.float32) - tl.load(real + at).to(tl.float32)
        high, low = cores.two_parts(d, HALF)
        tl.store(parts + at, high.to(tl.float32))
        tl.store(parts + 4096 + at, low.to(tl.float32))

    def two_parts(real, fake):
        parts = torch.empty(2, 4096)
        parts_kernel[(1,)](real, fake, parts, real.dtype == torch.float16)
        return parts

    def pairs(dtype, ratio):
        """Real and fake [4096] of any significands and signs, the one up to ``ratio`` times the other."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.where(torch.rand(2, 4096, generator=generator) < 0.5, -1.0, 1.0)
        larger, smaller = signs * (1 + torch.rand(2, 4096, generator=generator))
        smaller = smaller / ratio ** torch.rand(4096, generator=generator)
        larger[::16] = larger[::16].sign()  # A power of two: numbers below it are twice as close as those above.
        swap = torch.rand(4096, generator=generator) < 0.5
        return torch.where(swap, larger, smaller).to(dtype), torch.where(swap, smaller, larger).to(dtype)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("ratio", [2.0, 2.0**8, 2.0**14, 2.0**24])
    def test_two_parts_of_their_dtype_are_the_difference_exactly(dtype, ratio):
        real, fake = pairs(dtype, ratio)
        parts = two_parts(real, fake)
        assert torch.equal(parts.to(dtype).float(), parts)
        assert parts[1].any()
        assert torch.equal(parts.double().sum(0), (fake.float() - real.float()).double())

    def test_a_difference_beyond_float16_has_two_parts():
        real = torch.linspace(-65504, 65504, 4096).half()
        parts = two_parts(real, -real.flip(0).roll(7))
        exact = -real.flip(0).roll(7).double() - real.double()
        assert exact.abs().max() > 1e5
        assert torch.equal(parts.double().sum(0), exact)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_no_part_hides_a_difference_that_is_not_finite(dtype, value):
        real = torch.full((4096,), 1.0, dtype=dtype)
        assert not two_parts(real, torch.full_like(real, value))[1].isfinite().any()

    def triton_loss(*arguments, **options):
        return relation_loss(*arguments, return_terms=True, backend="triton", **options)

    CLOSE = [
        ((1, 5, 2, 6, 48), torch.bfloat16, 1e-2),
        ((1, 5, 2, 6, 48), torch.bfloat16, 1e-4),
        ((3, 4, 2, 6, 48), torch.bfloat16, 1e-3),
        ((3, 4, 2, 6, 48), torch.float16, 1e-4),
        ((1, 40, 1, 4, 24), torch.bfloat16, 1e-4),
        ((1, 70, 1, 4, 24), torch.float16, 1e-2),
        ((2, 40, 1, 2, 16), torch.bfloat16, 1e-3),
        ((20, 1, 2, 6, 24), torch.bfloat16, 1e-4),
        ((1, 5, 2, 6, 48), torch.bfloat16, 1.0),
        ((1, 40, 1, 4, 24), torch.float16, 1.0),
    ]
    """One sample and several, up to 32 frames and more, samples of one frame."""

    def close_to(real, perturbation):
        """``real``, its last bit moved in so many elements that ‖fake - real‖ is about ``perturbation``·‖real‖."""
        unit = 2.0 ** (1 - BITS[real.dtype])
        generator = torch.Generator().manual_seed(1)
        steps = torch.randn(real.shape, generator=generator).sign() * max(1, round(perturbation / unit))
        moved = torch.rand(real.shape, generator=generator) < (perturbation / unit) ** 2
        moved.flatten(2)[..., 0] = True
        return torch.where(moved, real.float() * (1 + steps * unit), real.float()).to(real.dtype)

    @pytest.mark.parametrize(("shape", "dtype", "perturbation"), CLOSE, ids=str)
    def test_a_critic_has_at_most_twice_the_error_of_pytorch(shape, dtype, perturbation):
        """Close to the teacher, or so far that differences have more bits than the scores."""
        student, real, fake = latents(shape, dtype, perturbation=perturbation)
        if perturbation < 1:
            fake = close_to(real, perturbation)
        assert perturbation / 3 < relative_error(fake, real) < 20 * perturbation
        upstream = (0.7, 0.3, -0.2)
        exact = truth(student, real, fake, pool=None, upstream=upstream)
        found = loss_and_gradient(triton_loss, student, real, fake, pool=None, upstream=upstream)
        *usual, gradient = same_dtype_errors(student, real, fake, *exact, pool=None, upstream=upstream)
        for value, true, other in zip(found[0], exact[0], usual, strict=True):
            assert relative_error(value, true) <= 2 * other + 2e-6
        # The interpreter truncates where the hardware rounds to bfloat16.
        assert relative_error(found[1], exact[1]) <= (4 if dtype is torch.bfloat16 else 2) * gradient + 1e-6
