"""The Triton kernels of the relation loss against the float64 reference, run by Triton's CPU interpreter.

The interpreter must be chosen before triton is imported, so this file runs itself again in a process of its own. It
executes programs one after another: numerics, masks and addresses are tested here, races can not be.
"""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    far_apart,
    frame_mask,
    latents,
    loss_and_gradient,
    relative_error,
    same_dtype,
    truth,
)
from interpreted import INTERPRETED, run_interpreted

pytest.importorskip("triton")

if not INTERPRETED:

    def test_the_kernels_match_float64_under_the_interpreter():
        run_interpreted(__file__)

else:
    from codmd.kernels import launch, tiling
    from codmd.kernels.pooled import passes as pooled_passes
    from codmd.kernels.whole import passes as whole_passes
    from codmd.kernels.whole import plans as whole_plans
    from codmd.kernels.whole import together

    from codmd import kernels
    from codmd.ops import relation_loss
    from codmd.ops.backends import old as _reference

    UPSTREAM = (0.7, 0.3, -0.2)

    @pytest.fixture
    def small_tiles(monkeypatch):
        """Tiles of a few elements, so that small planes are looped over, split and have tails."""
        monkeypatch.setattr(tiling, "TILE_BYTES", 64)
        monkeypatch.setattr(tiling, "WAVES", 1)
        for plans in (pooled_passes._forward_plans, pooled_passes._backward_plans):
            monkeypatch.setattr(pooled_passes, "_forward_plans", {})
            monkeypatch.setattr(pooled_passes, "_backward_plans", {})
            plans.clear()

    def triton_loss(*args, **kwargs):
        return relation_loss(*args, return_terms=True, backend="triton", **kwargs)

    def pixel_orders(height, width, pool):
        """Row and column orders that leave every region's mean, and so the loss, unchanged."""
        yield torch.arange(height), torch.arange(width)
        rows, columns = pool if isinstance(pool, tuple) else (1, 1)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)

            def shuffled(size, regions, generator=generator):
                edges = [i * size // regions for i in range(regions + 1)]
                parts = [a + torch.randperm(b - a, generator=generator) for a, b in itertools.pairwise(edges)]
                return torch.cat(parts)

            yield shuffled(height, rows), shuffled(width, columns)

    def usual_errors(inputs, expected, pool, **kwargs):
        """PyTorch's largest errors in the same dtype over orders of the pixels: one order may round luckily."""
        errors = []
        for rows, columns in pixel_orders(*inputs[0].shape[3:], pool):
            ordered = [v.detach()[..., rows, :][..., columns] for v in inputs]
            terms, gradient = same_dtype(*ordered, pool=pool, **kwargs)
            exact = expected[1][..., rows, :][..., columns]
            errors.append((relative_error(terms, expected[0]), relative_error(gradient, exact)))
        return [max(column) for column in zip(*errors, strict=True)]

    def assert_as_accurate_as_pytorch(student, real, fake, temperature=0.1, pool="mean", **kwargs):
        """Error against float64 at most twice that of PyTorch in the same dtype, plus one rounding of S/temperature.

        A loss that is exactly 0 comes out as the square of that rounding.
        """
        inputs, rounding = (student, real, fake), 1e-6 + 3e-8 / temperature
        kwargs |= {"temperature": temperature, "upstream": UPSTREAM}
        expected = truth(*inputs, pool=pool, **kwargs)
        found = loss_and_gradient(triton_loss, *inputs, pool=pool, **kwargs)
        usual = usual_errors(inputs, expected, pool, **kwargs)
        # The interpreter truncates where the hardware rounds to bfloat16: about twice the error of few distinct values.
        factors = 2, 4 if student.dtype == torch.bfloat16 else 2
        for value, exact, factor, other in zip(found, expected, factors, usual, strict=True):
            error = (value.double() - exact).norm()
            allowed = (factor * other + rounding) * exact.norm() + rounding**2
            assert error <= allowed, f"{error:.1e} > {allowed:.1e}: {tuple(student.shape)} {pool} {kwargs}"

    def averages_gradient(batch_grad, student, mask=None):
        """∂(batch term)/∂ψ ``[B, K]``, which whole latents may keep as its matrix M ``[1, B, B]``."""
        if batch_grad.ndim != 3:
            return batch_grad
        valid = torch.ones(student.shape[:2]) if mask is None else mask.float()
        totals = torch.einsum("bf,bfk->bk", valid, student.detach().float().flatten(2))
        return batch_grad[0] @ (totals / valid.sum(1, keepdim=True).clamp(min=1))

    CASES = [(dtype, layout, pool) for dtype in DTYPES for layout in LAYOUTS for pool in ("mean", (2, 1), (3, 2), None)]

    @pytest.mark.parametrize("number", range(len(CASES)))
    def test_values_and_gradients_match_float64(number):
        dtype, layout, pool = CASES[number]
        shape = [(2, 3, 1, 5, 9), (3, 3, 1, 4, 16), (1, 5, 2, 3, 7)][number % 3]
        student, real, fake = latents(shape, dtype, layout, seed=number)
        mask = frame_mask(*shape[:2], seed=number) if (number + number // 4) % 2 else None
        temperature = (0.1, 0.01, 10.0, 1.0)[number // 4 % 4]
        assert_as_accurate_as_pytorch(student, real, fake, temperature, layout=layout, pool=pool, frame_mask=mask)

    @pytest.mark.parametrize(
        ("shape", "pool"),
        [
            ((1, 1, 3, 4, 4), "mean"),
            ((3, 1, 2, 4, 4), "mean"),
            ((1, 3, 1, 1, 1), "mean"),
            ((1, 35, 1, 1, 3), "mean"),
            ((34, 1, 2, 1, 2), "mean"),
            ((1, 2, 1, 9, 3), (9, 3)),
            ((1, 2, 2, 2, 6), (2, 1)),
            ((1, 1, 2, 3, 5), None),
            ((3, 1, 2, 3, 5), None),
            ((1, 70, 1, 2, 9), None),
        ],
    )
    def test_degenerate_and_large_relations(shape, pool):
        student, real, fake = latents(shape)
        assert_as_accurate_as_pytorch(student, real, fake, pool=pool)
        if shape[1] > 2:
            assert_as_accurate_as_pytorch(student, real, fake, pool=pool, frame_mask=frame_mask(*shape[:2]))

    @pytest.mark.parametrize("pool", ["mean", (3, 2), (2, 1)])
    @pytest.mark.parametrize("width", [33, 40])
    def test_planes_beyond_one_tile_are_looped_over_and_split(small_tiles, width, pool):
        student, real, fake = latents((1, 2, 1, 7, width), torch.float16)
        assert_as_accurate_as_pytorch(student, real, fake, pool=pool)
        plan = next(iter(pooled_passes._forward_plans.values()))
        assert plan.tiling.splits > 1

    @pytest.mark.parametrize("perturbation", [1e-2, 1e-4])
    @pytest.mark.parametrize(("samples", "pool"), [(1, "mean"), (1, None), (3, None)])
    def test_a_critic_close_to_the_teacher_keeps_its_digits(perturbation, samples, pool):
        student, real, fake = latents((samples, 5, 4, 4, 8), perturbation=perturbation)
        expected = truth(student, real, fake, pool=pool)
        found = loss_and_gradient(triton_loss, student, real, fake, pool=pool)
        assert relative_error(found[0], expected[0]) < 2e-6
        assert relative_error(found[1], expected[1]) < 3e-6

    @pytest.mark.parametrize("pool", ["mean", None])
    def test_a_critic_far_from_the_teacher_reaches_past_the_range_of_exp(pool):
        student, real, fake = latents((2, 6, 2, 2, 3), perturbation=10.0)
        assert_as_accurate_as_pytorch(student, real, fake, temperature=0.01, pool=pool)

    def strided(kind: str, tensor: torch.Tensor) -> torch.Tensor:
        if kind == "every second column":
            wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
            wide[..., ::2] = tensor.detach()
            return wide[..., ::2]
        if kind == "columns first":
            return tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == "channels last":
            return tensor.detach().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        if kind == "misaligned":
            flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
            flat[1:] = tensor.detach().flatten()
            return flat[1:].view_as(tensor)
        if kind == "constant planes":
            return tensor.detach()[..., :1, :1].expand_as(tensor)
        return tensor.detach()[:, :, :, :1].expand_as(tensor)

    @pytest.mark.parametrize("pool", ["mean", (2, 1), (3, 2), None])
    @pytest.mark.parametrize(
        "kind",
        ["every second column", "columns first", "channels last", "misaligned", "expanded", "constant planes"],
    )
    def test_strides_are_honoured(kind, pool):
        student, real, fake = latents((1, 3, 2, 4, 6))
        assert_as_accurate_as_pytorch(strided(kind, student), real, strided(kind, fake), pool=pool)

    @pytest.mark.parametrize(("padding", "pool"), [(3, "mean"), (2, "mean"), (2, None)])
    def test_padded_lines_narrow_the_vectors(padding, pool):
        """Lines of 6 elements, 9 apart: every other axis steps in fours; or 8 apart, where only their ends do not."""
        inputs = [torch.nn.functional.pad(v.detach(), (0, padding), value=torch.nan) for v in latents((1, 3, 2, 4, 6))]
        assert_as_accurate_as_pytorch(*(v[..., :6] for v in inputs), pool=pool)

    @pytest.mark.parametrize("pool", ["mean", (2, 2), None])
    def test_offsets_beyond_31_bits_are_reached(pool):
        """Three samples 2³⁰ elements apart: 4 GB of address space a tensor, of which a few pages exist.

        The stride fits 32 bits and its product with the sample's index does not; it is odd, so that nothing is
        counted in vectors.
        """
        shape, far = (3, 2, 2, 2, 4), (1 << 30) + 1

        def apart(tensor):
            room = torch.from_numpy(np.zeros(2 * far + 32, dtype=np.float16))
            view = room.as_strided(shape, (far, 16, 8, 4, 1))
            view.copy_(tensor.detach())
            return view

        student, real, fake = latents(shape, torch.float16)
        arguments = None, "bfchw", pool, 0.1, 1.0, 1.0
        near = kernels.relation_forward(student.detach(), real, fake, *arguments)
        distant = [apart(v) for v in (student, real, fake)]
        wide = kernels.relation_forward(*distant, *arguments)
        for a, b in zip(near, wide, strict=True):
            assert torch.equal(a, b)
        gradients = []
        for out, x in ((torch.empty_like(real), student.detach()), (apart(torch.zeros_like(real)), distant[0])):
            one = torch.ones(())
            kernels.relation_backward(out, one, None, None, x, None, *near[1:], "bfchw", pool, 1.0, 1.0)
            gradients.append(out)
        assert torch.equal(*gradients)

    @pytest.mark.parametrize(("samples", "pool"), [(1, (2, 2)), (1, None), (2, None)])
    def test_every_axis_may_pass_31_bits(samples, pool):
        near = [v.detach() for v in latents((samples, 3, 3, 3, 3), torch.float16)]
        results = []
        for scores, out in ((near, torch.empty_like(near[0])), ([far_apart(v) for v in near], far_apart(near[0]))):
            found = kernels.relation_forward(*scores, None, "bfchw", pool, 0.1, 1.0, 1.0)
            tail = scores[0], None, *found[1:], "bfchw", pool, 1.0, 1.0
            kernels.relation_backward(out, torch.ones(()), None, None, *tail)
            results.append((*found, out))
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)

    def test_more_columns_than_a_tile_holds():
        student, real, fake = latents((1, 2, 1, 2, 520))
        assert_as_accurate_as_pytorch(student, real, fake, pool=(1, 3))

    @pytest.mark.parametrize("pool", ["mean", None])
    @pytest.mark.parametrize("which", ["student", "real", "fake", "all"])
    def test_zero_vectors_match_the_reference(which, pool):
        inputs = dict(zip(("student", "real", "fake"), latents((2, 3, 2, 3, 4)), strict=True))
        for name in inputs if which == "all" else (which,):
            inputs[name] = inputs[name].detach().clone()
            inputs[name][:, 1] = 0
        assert_as_accurate_as_pytorch(*inputs.values(), pool=pool)

    @pytest.mark.parametrize(("frames", "pool"), [(3, "mean"), (33, "mean"), (3, None)])
    def test_vectors_below_the_floor_of_the_norm_are_not_normalised(frames, pool):
        student, real, fake = (v.detach().clone() for v in latents((1, frames, 2, 1, 3)))
        student[:, 0] *= 3e-13
        real[:, 1] *= 3e-13
        assert_as_accurate_as_pytorch(student, real, fake, pool=pool)

    @pytest.mark.parametrize("pool", ["mean", None])
    def test_the_range_of_float16_is_no_limit(pool):
        student, real, fake = latents((2, 3, 2, 4, 8), torch.float16)
        large = [(v.detach().float().clamp(-2, 2) * 3e4).half() for v in (student, real, fake)]
        assert_as_accurate_as_pytorch(*large, pool=pool)

    @pytest.mark.parametrize("pool", ["mean", None])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("index", [0, 1, 2])
    @pytest.mark.parametrize("samples", [1, 2])
    def test_non_finite_values_travel_to_the_loss(samples, index, value, pool):
        inputs = [v.detach().clone() for v in latents((samples, 3, 1, 3, 4))]
        inputs[index][0, 1, 0, 0, 0] = value
        terms, frame_grad, _ = kernels.relation_forward(*inputs, None, "bfchw", pool, 0.1, 1.0, 1.0)
        assert not terms[0].isfinite()
        assert not frame_grad.isfinite().all()

    @pytest.mark.parametrize("pool", ["mean", None])
    def test_one_valid_frame_has_no_relation_whatever_it_holds(pool):
        inputs = [v.detach().clone() for v in latents((1, 3, 1, 2, 3))]
        inputs[0][0, 1] = torch.nan
        mask = torch.tensor([[False, True, False]])
        terms, _, _ = kernels.relation_forward(*inputs, mask, "bfchw", pool, 0.1, 1.0, 1.0)
        assert terms.eq(0).all()

    @pytest.mark.parametrize(("samples", "pool"), [(2, "mean"), (2, (2, 2)), (2, None), (1, None)])
    def test_masked_frames_never_leak(samples, pool):
        inputs = [v.detach().clone() for v in latents((samples, 4, 1, 3, 4))]
        mask = torch.ones(samples, 4, dtype=torch.bool)
        mask[:, 2] = False
        clean = kernels.relation_forward(*inputs, mask, "bfchw", pool, 0.1, 1.0, 1.0)
        for tensor in inputs:
            tensor[:, 2] = torch.nan
        poisoned = kernels.relation_forward(*inputs, mask, "bfchw", pool, 0.1, 1.0, 1.0)
        for a, b in zip(clean, poisoned, strict=True):
            assert torch.equal(a, b)
        out = torch.empty_like(inputs[0])
        kernels.relation_backward(out, torch.ones(()), None, None, inputs[0], mask, *clean[1:], "bfchw", pool, 1.0, 1.0)
        assert out[:, 2].eq(0).all()
        assert out.isfinite().all()

    @pytest.mark.parametrize("pool", ["mean", (2, 1), None])
    @pytest.mark.parametrize("long", [False, True])
    def test_gathered_rows_give_the_terms_and_gradients_of_one_process(monkeypatch, pool, long):
        monkeypatch.setattr("codmd.kernels.relation.LONG_FEATURES", 4 if long else 1 << 20)
        inputs = [v.detach() for v in latents((4, 3, 1, 3, 5))]
        mask = frame_mask(4, 3)
        whole = kernels.relation_forward(*inputs, mask, "bfchw", pool, 0.1, 0.6, 1.3)
        expected = averages_gradient(whole[2], inputs[0], mask)
        stages = [
            kernels.relation_frames(*(v[i : i + 2] for v in inputs), mask[i : i + 2], "bfchw", pool, 0.1, 1.3)
            for i in (0, 2)
        ]
        rows = torch.cat([pooled for _, _, pooled in stages])
        for rank, (frame, _, _) in enumerate(stages):
            terms, gradient = kernels.relation_batch(rows, frame, 2 * rank, 2, 0.1, 0.6, 1.3, 2.0)
            torch.testing.assert_close(terms[1], whole[0][1], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(terms[2], frame[0])
            torch.testing.assert_close(terms[0], 0.6 * terms[1] + 1.3 * frame[0])
            torch.testing.assert_close(gradient, 2 * expected[2 * rank : 2 * rank + 2], rtol=1e-4, atol=1e-7)
        frames = torch.stack([frame for frame, _, _ in stages]).mean()
        torch.testing.assert_close(frames, whole[0][2], rtol=1e-6, atol=0)

    @pytest.mark.parametrize(("pool", "tables"), [("mean", False), (None, False), (None, True)])
    @pytest.mark.parametrize(
        "given", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
    )
    def test_every_upstream_gradient_reaches_its_term(monkeypatch, given, pool, tables):
        monkeypatch.setattr(together, "DOTS_OF_EIGHT", not tables)
        inputs = [v.detach() for v in latents((2, 2, 1, 3, 5))]
        upstream = [torch.tensor(g) if wanted else None for g, wanted in zip((0.5, -0.7, 0.9), given, strict=True)]
        _, *grads = kernels.relation_forward(*inputs, None, "bfchw", pool, 0.1, 0.6, 1.3)
        found, expected = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
        tail = "bfchw", pool, 0.6, 1.3
        kernels.relation_backward(found, *upstream, inputs[0], None, *grads, *tail)
        grads[1] = averages_gradient(grads[1], inputs[0])
        _reference.relation_backward(expected, *upstream, inputs[0], None, *grads, *tail)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-9)

    @pytest.mark.parametrize(("batch_weight", "frame_weight"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
    @pytest.mark.parametrize("pool", ["mean", None])
    def test_a_term_without_weight_is_not_computed(batch_weight, frame_weight, pool):
        inputs = [v.detach() for v in latents((2, 3, 2, 3, 4))]
        weights = batch_weight, frame_weight
        terms, frame_grad, batch_grad = kernels.relation_forward(*inputs, None, "bfchw", pool, 0.1, *weights)
        assert (frame_grad.numel() > 0, batch_grad.numel() > 0) == (frame_weight > 0, batch_weight > 0)
        assert terms[1].item() == 0 or batch_weight
        assert terms[2].item() == 0 or frame_weight
        out = torch.empty_like(inputs[0])
        tail = None, frame_grad, batch_grad, "bfchw", pool, *weights
        kernels.relation_backward(out, torch.ones(()), None, None, inputs[0], *tail)
        assert out.isfinite().all()
        assert bool(out.any()) == (batch_weight + frame_weight > 0)

    @pytest.mark.parametrize(
        ("shape", "pool"), [((2, 3, 2, 3, 4), "mean"), ((1, 35, 1, 1, 3), "mean"), ((2, 3, 2, 3, 4), None)]
    )
    def test_calls_repeat_bit_for_bit_and_leave_the_counters_zero(shape, pool):
        inputs = [v.detach() for v in latents(shape)]
        first, second = (kernels.relation_forward(*inputs, None, "bfchw", pool, 0.1, 1.0, 1.0) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        assert all(not buffer.any() for buffer in launch._counters.values())

    TOGETHER = ["gram_batch_kernel", "relations_kernel", "apply_batch_kernel"]
    WITH_TABLES = ["gram_kernel", "gram_kernel", "apply_kernel", "apply_kernel"]

    @pytest.mark.parametrize(
        ("shape", "names"),
        [
            ((2, 5, 2, 3, 7), TOGETHER),
            ((3, 20, 1, 3, 8), TOGETHER),
            ((7, 17, 2, 1, 9), TOGETHER),
            ((8, 18, 1, 3, 3), TOGETHER),
            ((9, 3, 1, 2, 8), TOGETHER),
            ((2, 35, 1, 2, 8), TOGETHER),
            ((9, 17, 1, 2, 8), WITH_TABLES),
            ((3, 33, 1, 2, 8), WITH_TABLES),
            ((17, 2, 1, 2, 8), WITH_TABLES),
        ],
    )
    @pytest.mark.parametrize("number", [0, 1])
    def test_samples_whose_grams_fit_one_program_keep_no_averages(shape, names, number):
        layout, dtype = LAYOUTS[number], (torch.float32, torch.float16)[number]
        student, real, fake = latents(shape, dtype, layout, seed=number)
        mask = frame_mask(*shape[:2]) if number else None
        with launch.recording(run=True) as recorded:
            assert_as_accurate_as_pytorch(student, real, fake, pool=None, layout=layout, frame_mask=mask)
        assert [launched.name for launched in recorded] == names

    @pytest.mark.parametrize("pool", ["mean", None])
    def test_a_broken_critic_of_a_zero_teacher_travels_to_the_loss(pool):
        student, real, fake = (v.detach().clone() for v in latents((1, 3, 1, 3, 4)))
        real[0, 1], fake[0, 1, 0, 0, 0] = 0, torch.nan
        terms, *_ = kernels.relation_forward(student, real, fake, None, "bfchw", pool, 0.1, 1.0, 1.0)
        assert not terms[2].isfinite()

    def test_averages_alone_are_those_of_the_valid_frames(monkeypatch):
        monkeypatch.setattr(together, "DOTS_OF_EIGHT", False)
        student, real, fake = latents((3, 3, 1, 5, 9))
        mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
        with launch.recording(run=True) as recorded:
            assert_as_accurate_as_pytorch(student, real, fake, pool=None, frame_mask=mask, frame_weight=0.0)
        assert [launched.values.get("GRAMS") for launched in recorded] == [False, True, None, None]

    @pytest.mark.parametrize("number", [0, 1])
    def test_older_releases_of_triton_keep_tables_of_averages(monkeypatch, number):
        monkeypatch.setattr(together, "DOTS_OF_EIGHT", False)
        student, real, fake = latents((3, 3, 1, 5, 9), seed=number)
        mask = frame_mask(3, 3) if number else None
        with launch.recording(run=True) as recorded:
            assert_as_accurate_as_pytorch(student, real, fake, pool=None, frame_mask=mask)
        assert [launched.name for launched in recorded] == WITH_TABLES

    @pytest.mark.parametrize("strided_height", [False, True])
    def test_splits_and_groups_of_a_long_axis_add_up(monkeypatch, strided_height):
        monkeypatch.setattr(together, "GROUP", 2)
        monkeypatch.setattr(together, "_plans", {})
        student, real, fake = (v.detach() for v in latents((3, 4, 2, 12, 25)))
        if strided_height:
            student, fake = (torch.nn.functional.pad(v, (0, 3))[..., :25] for v in (student, fake))
        assert_as_accurate_as_pytorch(student, real, fake, pool=None)
        plan = next(iter(together._plans.values()))
        splits_x, splits_s, *_ = plan.grams.constants
        assert min(splits_x, splits_s) > 4
        assert plan.counters > 4

    def test_splits_and_groups_of_one_sample_add_up(monkeypatch):
        monkeypatch.setattr(whole_plans, "GROUP", 2)
        monkeypatch.setattr(whole_passes, "_plans", {})
        assert_as_accurate_as_pytorch(*latents((1, 4, 2, 12, 25)), pool=None)
        plan = next(iter(whole_passes._plans.values()))
        splits_x, splits_s, group, *_ = plan.launch.constants
        assert min(splits_x, splits_s) > 2 * group

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("masked", [False, True])
    def test_images_relate_whole_in_one_launch(layout, masked):
        student, real, fake = latents((5, 1, 2, 3, 6), torch.float16, layout)
        mask = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0], [1, 1]], dtype=torch.bool)[:, :1] if masked else None
        with launch.recording(run=True) as recorded:
            assert_as_accurate_as_pytorch(student, real, fake, pool=None, layout=layout, frame_mask=mask)
        assert [launched.name for launched in recorded] == ["gram_kernel", "apply_kernel"]

    @pytest.mark.parametrize("shape", [(4, 1, 2, 3, 6), (4, 2, 2, 3, 6), (1, 2, 2, 3, 6), (129, 1, 1, 1, 2)], ids=str)
    def test_traced_calls_are_told_the_shapes_of_whole_relations(shape):
        options = None, 0.1, 1.0, 1.0, "bfchw", None, "", "global", "triton"
        scores = [v.detach() for v in latents(shape)]
        found = torch.ops.codmd.relation_loss(*scores, *options)
        with torch._subclasses.FakeTensorMode() as mode:
            told = torch.ops.codmd.relation_loss(*(mode.from_tensor(v) for v in scores), *options)
        assert [(v.shape, v.stride()) for v in found] == [(v.shape, v.stride()) for v in told]

    def test_calls_beyond_the_kernels_go_to_the_reference_with_a_reason(caplog):
        inputs = [v.detach() for v in latents((1, 129, 1, 1, 2))]
        with caplog.at_level(logging.WARNING, "codmd"):
            found = kernels.relation_forward(*inputs, None, "bfchw", None, 0.1, 1.0, 1.0)
        expected = _reference.relation_forward(*inputs, None, "bfchw", None, 0.1, 1.0, 1.0)
        assert torch.equal(found[0], expected[0])
        assert "129 frames, at most 128" in caplog.text
