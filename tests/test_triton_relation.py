"""The Triton kernels of the relation loss against the float64 reference, run by Triton's CPU interpreter.

The interpreter must be chosen before triton is imported: a session of its own, see interpreted.py. It executes programs
one after another: numerics, masks and addresses are tested here, races can not be.
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
from interpreted import INTERPRETED

pytest.importorskip("triton")

if INTERPRETED:
    import triton
    import triton.language as tl
    from triton_calls import fresh_plans, gradient, relation_call

    from codmd.kernels import backend, launch, limits, tickets, tiling
    from codmd.kernels.pooled.algebra import feature_norms, relation_tile, validity
    from codmd.kernels.whole import plans as whole_plans
    from codmd.kernels.whole import together
    from codmd.ops import relation_loss
    from codmd.ops.backends import reference
    from codmd.ops.contract import Numbers

    UPSTREAM = (0.7, 0.3, -0.2)

    @pytest.fixture
    def small_tiles(monkeypatch):
        """Tiles of a few elements, so that small planes are looped over, split and have tails."""
        monkeypatch.setattr("codmd.kernels.pooled.plans.TILE_BYTES", 64)
        monkeypatch.setattr(tiling, "WAVES", 1)
        return fresh_plans(monkeypatch)

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
        """Error against float64 at most twice that of PyTorch in the same dtype, plus three roundings of S over τ.

        They are those of a product's sum, of the norms' product and of their quotient. A loss that is exactly 0 comes
        out as the square of that rounding.
        """
        inputs, rounding = (student, real, fake), 1e-6 + 9e-8 / temperature
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
            ((2, 35, 2, 1, 2), "mean"),
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

    @pytest.mark.parametrize("columns", [16, 256])
    @pytest.mark.parametrize("shape", [(1, 35, 5, 2, 2), (33, 1, 5, 2, 2)], ids=str)
    def test_rows_of_many_vectors_by_tiles_and_features_by_steps(monkeypatch, shape, columns):
        """Beyond one tile S, Δ and G go through memory; 20 features take two steps."""
        monkeypatch.setattr("codmd.kernels.pooled.plans.COLUMNS", columns)
        fresh_plans(monkeypatch)
        mask = frame_mask(*shape[:2]) if shape[1] > 1 else None
        assert_as_accurate_as_pytorch(*latents(shape), pool=(2, 2), frame_mask=mask)

    @pytest.mark.parametrize("pool", ["mean", (3, 2), (2, 1)])
    @pytest.mark.parametrize("width", [33, 40])
    @pytest.mark.parametrize("most_splits", [16, 2])
    def test_planes_beyond_one_tile_are_looped_over_and_split(small_tiles, monkeypatch, width, pool, most_splits):
        monkeypatch.setattr(tiling, "MOST_SPLITS", most_splits)
        student, real, fake = latents((1, 2, 1, 7, width), torch.float16)
        assert_as_accurate_as_pytorch(student, real, fake, pool=pool)
        plan, *_ = small_tiles
        assert plan.tiling.splits > 1

    @pytest.mark.parametrize(("pool", "masked"), [("mean", True), ((3, 2), False)])
    @pytest.mark.parametrize("per", [2, 3, 100])
    def test_programs_of_several_pieces_find_what_programs_of_one_do(small_tiles, monkeypatch, pool, masked, per):
        """To the bit: pieces are added up one by one, in the same order."""
        inputs = [v.detach() for v in latents((2, 3, 2, 7, 33), torch.float16)]
        call = relation_call(inputs, pool, frame_mask(2, 3) if masked else None)
        found = []
        for each in (1, per):
            monkeypatch.setattr(
                "codmd.kernels.pooled.plans.pieces_of_a_program", lambda _, pieces, *rest, each=each: min(each, pieces)
            )
            small_tiles.clear()
            found.append(backend.relation(call))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)

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

    @pytest.mark.parametrize("seed", range(4))
    def test_a_small_temperature_leaves_strided_latents_their_digits(seed):
        inputs = [strided("every second column", v) for v in latents((1, 3, 2, 4, 6), seed=seed)]
        assert_as_accurate_as_pytorch(*inputs, temperature=0.01)

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
        near = relation_call((student.detach(), real, fake), pool)
        wide = relation_call([apart(v) for v in (student, real, fake)], pool)
        found, same = backend.relation(near), backend.relation(wide)
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True) if a is not None)
        distant = gradient(backend, wide, found, apart(torch.zeros_like(real)), total=1.0)
        assert torch.equal(gradient(backend, near, found, total=1.0), distant)

    @pytest.mark.parametrize(("samples", "pool"), [(1, (2, 2)), (1, None), (2, None)])
    def test_every_axis_may_pass_31_bits(samples, pool):
        near = [v.detach() for v in latents((samples, 3, 3, 3, 3), torch.float16)]
        results = []
        for scores, out in ((near, torch.empty_like(near[0])), ([far_apart(v) for v in near], far_apart(near[0]))):
            call = relation_call(scores, pool)
            found = backend.relation(call)
            written = gradient(backend, call, found, out, total=1.0)
            results.append((found.terms, found.frame_grad, found.batch_grad, written))
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
        found = backend.relation(relation_call(inputs, pool))
        assert not found.terms[0].isfinite()
        assert not found.frame_grad.isfinite().all()

    @pytest.mark.parametrize("pool", ["mean", None])
    def test_one_valid_frame_has_no_relation_whatever_it_holds(pool):
        inputs = [v.detach().clone() for v in latents((1, 3, 1, 2, 3))]
        inputs[0][0, 1] = torch.nan
        mask = torch.tensor([[False, True, False]])
        assert backend.relation(relation_call(inputs, pool, mask)).terms.eq(0).all()

    @pytest.mark.parametrize(("samples", "pool"), [(2, "mean"), (2, (2, 2)), (2, None), (1, None)])
    def test_masked_frames_never_leak(samples, pool):
        inputs = [v.detach().clone() for v in latents((samples, 4, 1, 3, 4))]
        mask = torch.ones(samples, 4, dtype=torch.bool)
        mask[:, 2] = False
        call = relation_call(inputs, pool, mask)
        clean = backend.relation(call)
        for tensor in inputs:
            tensor[:, 2] = torch.nan
        poisoned = backend.relation(call)
        assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True) if a is not None)
        out = gradient(backend, call, clean, total=1.0)
        assert out[:, 2].eq(0).all()
        assert out.isfinite().all()

    @pytest.mark.parametrize("pool", ["mean", (2, 1), None])
    @pytest.mark.parametrize("long", [False, True])
    def test_gathered_rows_give_the_terms_and_gradients_of_one_process(monkeypatch, pool, long):
        monkeypatch.setattr(backend, "LONG_FEATURES", 4 if long else 1 << 20)
        inputs = [v.detach() for v in latents((4, 3, 1, 3, 5))]
        mask = frame_mask(4, 3)
        whole = backend.relation(relation_call(inputs, pool, mask, weights=(0.6, 1.3)))
        expected = averages_gradient(whole.batch_grad, inputs[0], mask)
        calls = [
            relation_call([v[i : i + 2] for v in inputs], pool, mask[i : i + 2], weights=(0.6, 1.3)) for i in (0, 2)
        ]
        stages = [backend.features(call) for call in calls]
        rows = torch.cat([pending.rows for pending in stages])
        frames = []
        for rank, (call, pending) in enumerate(zip(calls, stages, strict=True)):
            found = backend.gathered(call, pending, rows, 2 * rank, 2.0)
            total, batch, frame = found.terms
            torch.testing.assert_close(batch, whole.terms[1], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(total, 0.6 * batch + 1.3 * frame)
            torch.testing.assert_close(found.batch_grad, 2 * expected[2 * rank : 2 * rank + 2], rtol=1e-4, atol=1e-7)
            frames.append(frame)
        torch.testing.assert_close(torch.stack(frames).mean(), whole.terms[2], rtol=1e-6, atol=0)

    @pytest.mark.parametrize(("pool", "tables"), [("mean", False), (None, False), (None, True)])
    @pytest.mark.parametrize(
        "given", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
    )
    def test_every_upstream_gradient_reaches_its_term(monkeypatch, given, pool, tables):
        monkeypatch.setattr(together, "DOTS_OF_EIGHT", not tables)
        inputs = [v.detach() for v in latents((2, 2, 1, 3, 5))]
        upstream = dict(zip(("total", "batch", "frame"), (0.5, -0.7, 0.9), strict=True))
        upstream = {name: value for wanted, (name, value) in zip(given, upstream.items(), strict=True) if wanted}
        call = relation_call(inputs, pool, weights=(0.6, 1.3))
        found = backend.relation(call)
        plain = found._replace(batch_grad=averages_gradient(found.batch_grad, inputs[0]))
        written, expected = gradient(backend, call, found, **upstream), gradient(reference, call, plain, **upstream)
        torch.testing.assert_close(written, expected, rtol=2e-5, atol=1e-9)

    @pytest.mark.parametrize(("batch_weight", "frame_weight"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
    @pytest.mark.parametrize("pool", ["mean", None])
    def test_a_term_without_weight_is_not_computed(batch_weight, frame_weight, pool):
        inputs = [v.detach() for v in latents((2, 3, 2, 3, 4))]
        call = relation_call(inputs, pool, weights=(batch_weight, frame_weight))
        found = backend.relation(call)
        assert (found.frame_grad.numel() > 0, found.batch_grad.numel() > 0) == (frame_weight > 0, batch_weight > 0)
        assert found.terms[1].item() == 0 or batch_weight
        assert found.terms[2].item() == 0 or frame_weight
        out = gradient(backend, call, found, total=1.0)
        assert out.isfinite().all()
        assert bool(out.any()) == (batch_weight + frame_weight > 0)

    @pytest.mark.parametrize(
        ("shape", "pool"), [((2, 3, 2, 3, 4), "mean"), ((1, 35, 1, 1, 3), "mean"), ((2, 3, 2, 3, 4), None)]
    )
    def test_calls_repeat_bit_for_bit_and_leave_the_counters_zero(shape, pool):
        inputs = [v.detach() for v in latents(shape)]
        first, second = (backend.relation(relation_call(inputs, pool)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)
        assert all(not buffer.any() for buffer in tickets._buffers.values())

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
            ((2, 35, 1, 2, 8), WITH_TABLES),
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
        assert not backend.relation(relation_call((student, real, fake), pool)).terms[2].isfinite()

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
        kept = fresh_plans(monkeypatch)
        student, real, fake = (v.detach() for v in latents((3, 4, 2, 12, 25)))
        if strided_height:
            student, fake = (torch.nn.functional.pad(v, (0, 3))[..., :25] for v in (student, fake))
        assert_as_accurate_as_pytorch(student, real, fake, pool=None)
        plan, *_ = kept
        splits_x, splits_s, *_ = plan.grams.constants
        assert min(splits_x, splits_s) > 4
        assert plan.counters > 4

    def test_splits_and_groups_of_one_sample_add_up(monkeypatch):
        monkeypatch.setattr(whole_plans, "GROUP", 2)
        kept = fresh_plans(monkeypatch)
        assert_as_accurate_as_pytorch(*latents((1, 4, 2, 12, 25)), pool=None)
        plan, *_ = kept
        splits_x, splits_s, group, *_ = plan.launch.constants
        assert min(splits_x, splits_s) > 2 * group

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("masked", [False, True])
    def test_images_relate_whole_in_one_launch(layout, masked):
        student, real, fake = latents((5, 1, 2, 3, 6), torch.float16, layout)
        mask = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0], [1, 1]], dtype=torch.bool)[:, :1] if masked else None
        with launch.recording(run=True) as recorded:
            weights = {"batch_weight": 0.6, "frame_weight": 1.3}
            assert_as_accurate_as_pytorch(student, real, fake, pool=None, layout=layout, frame_mask=mask, **weights)
        assert [launched.name for launched in recorded] == ["gram_kernel", "apply_kernel"]

    @pytest.mark.parametrize("shape", [(4, 1, 2, 3, 6), (4, 2, 2, 3, 6), (1, 2, 2, 3, 6), (129, 1, 1, 1, 2)], ids=str)
    def test_the_shape_told_of_a_whole_relations_gradient_is_the_one_found(shape):
        found = backend.relation(relation_call([v.detach() for v in latents(shape)], None))
        features = torch.Size(shape[2:]).numel()
        assert tuple(found.batch_grad.shape) == (
            backend.whole_batch_grad(*shape[:2], features) if shape[0] > 1 else (0,)
        )

    def test_calls_beyond_the_kernels_go_to_the_reference_with_a_reason(caplog):
        limits.log.cache_clear()
        call = relation_call([v.detach() for v in latents((1, 129, 1, 1, 2))], None)
        with caplog.at_level(logging.WARNING, "codmd"):
            found = backend.relation(call)
        expected = reference.relation(call)
        torch.testing.assert_close(found.terms, expected.terms)
        assert "129 frames, at most 128" in caplog.text
        written = gradient(backend, call, found, total=1.0)
        torch.testing.assert_close(written, gradient(reference, call, expected, total=1.0), rtol=1e-4, atol=1e-7)

    def test_gathered_rows_beyond_the_kernels_go_to_the_reference_with_a_reason(monkeypatch, caplog):
        limits.log.cache_clear()
        monkeypatch.setattr(backend, "MOST_POOLED", 3)
        call = relation_call([v.detach() for v in latents((2, 3, 2, 3, 5))])
        pending, plain = backend.features(call), reference.features(call)
        others = torch.cat([2 - plain.rows[:, :-1], plain.rows[:, -1:]], 1)
        rows = torch.cat([plain.rows, others])
        with caplog.at_level(logging.WARNING, "codmd"):
            found = backend.gathered(call, pending, rows, 2, 0.5)
        expected = reference.gathered(call, plain, rows, 2, 0.5)
        torch.testing.assert_close(found.terms, expected.terms, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(found.batch_grad, expected.batch_grad)
        assert "4 gathered rows of 7" in caplog.text

    @pytest.mark.parametrize(
        ("shape", "pool"),
        [
            ((2, 3, 2, 3, 4), "mean"),
            ((2, 35, 2, 1, 2), "mean"),
            *(((n, f, 2, 3, 4), None) for n, f in ((1, 3), (2, 3), (3, 1))),
        ],
    )
    def test_numbers_on_the_device_are_loaded_by_the_kernels(shape, pool):
        call = relation_call([v.detach() for v in latents(shape)], pool, weights=(0.6, 1.3), temperature=0.2)
        scheduled = call._replace(numbers=torch.tensor(call.numbers))
        found, same = backend.relation(call), backend.relation(scheduled)
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True) if a is not None)
        upstream = {"total": 0.7, "batch": -0.2, "frame": 0.4}
        assert torch.equal(*(gradient(backend, one, found, **upstream) for one in (call, scheduled)))
        scheduled.numbers.mul_(2)
        doubled = call._replace(numbers=Numbers(*(2 * n for n in call.numbers)))
        found, same = backend.relation(doubled), backend.relation(scheduled)
        assert torch.equal(found.terms, same.terms)

    @pytest.mark.parametrize(("frames", "pool"), [(3, "mean"), (35, "mean"), (3, None)])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_features_beyond_the_range_of_their_norms_give_no_finite_loss(frames, pool, which):
        """Scaled to 1e20 the squares of features leave float32; a unit vector of such a norm would be a finite 0."""
        inputs = [v.detach() for v in latents((2, frames, 2, 2, 3))]
        inputs[which] = inputs[which] * 1e20
        call = relation_call(inputs, pool)
        found = backend.relation(call)
        assert not found.terms[0].isfinite()
        assert not gradient(backend, call, found, total=1.0).isfinite().all()

    @pytest.mark.parametrize("pool", ["mean", None])
    @pytest.mark.parametrize("scale", [1e16, 1e-9])
    def test_features_far_from_one_give_the_relation_of_their_directions(scale, pool):
        student, real, fake = (v.detach() * scale for v in latents((2, 3, 2, 2, 3)))
        assert_as_accurate_as_pytorch(student, real, fake, pool=pool)

    @triton.jit
    def tile_kernel(table, similarity, difference, count, features):
        i = tl.arange(0, 16)[:, None]
        valid = validity(table, i, count, features)
        norms = feature_norms(table, i, valid, features, 16)
        s, delta = relation_tile(table, i, i, valid, valid, norms, norms, features, 16)
        tl.store(similarity + i * 16 + tl.trans(i), s)
        tl.store(difference + i * 16 + tl.trans(i), delta)

    def test_a_vector_is_similar_to_itself_exactly():
        """S_ii = 1 and Δ_ii = 0: a rounding there, over a small τ, would shift the whole row's KL."""
        table = torch.cat([torch.randn(16, 3 * 7, generator=torch.Generator().manual_seed(0)), torch.ones(16, 1)], 1)
        similarity, difference = torch.empty(16, 16), torch.empty(16, 16)
        tile_kernel[(1,)](table, similarity, difference, 16, 7)
        assert similarity.diagonal().eq(1).all()
        assert difference.diagonal().eq(0).all()
        x, r, d = (part.double() for part in table[:, :-1].chunk(3, 1))
        unit = [torch.nn.functional.normalize(v) for v in (x, r, r + d)]
        torch.testing.assert_close(similarity.double(), unit[0] @ unit[0].t(), rtol=0, atol=3e-7)
        torch.testing.assert_close(
            difference.double(), unit[2] @ unit[2].t() - unit[1] @ unit[1].t(), rtol=0, atol=1e-6
        )

    @pytest.mark.parametrize("pool", [None, (1, 7)])
    def test_scores_that_differ_in_length_alone_ask_for_nothing(pool):
        """Of orthogonal vectors, Δ is 0 but for a rounding of its diagonal: loss and gradient are 0 exactly."""
        generator = torch.Generator().manual_seed(0)
        axes, student = torch.eye(7).view(1, 7, 1, 1, 7), torch.randn(1, 7, 1, 1, 7, generator=generator)
        real, fake = (axes * torch.rand(1, 7, 1, 1, 1, generator=generator) for _ in range(2))
        call = relation_call((student, real, fake), pool, temperature=0.5)
        found = backend.relation(call)
        assert found.terms.eq(0).all()
        assert found.frame_grad.eq(0).all()
