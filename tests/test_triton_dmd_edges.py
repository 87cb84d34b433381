"""Edges of the Triton DMD and CoDMD passes: long loops, splits, strides, large offsets, zero norms, broken values.

Run by Triton's CPU interpreter in a session of its own, as ``test_triton_dmd.py``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import far_apart, relative_error
from dmd_cases import run, same_dtype, scores, truth
from interpreted import INTERPRETED

pytest.importorskip("triton")

if INTERPRETED:
    from codmd_cases import by_reference, fused, terms_and_gradient
    from codmd_cases import truth as codmd_truth
    from dmd_cases import mask_of
    from triton_calls import fresh_plans, gradient, objective_call

    from codmd import conventions, ops
    from codmd.conventions import NAMED
    from codmd.kernels import backend, launch, tickets, tiling
    from codmd.kernels.limits import MOST_POOLED
    from codmd.ops.backends import reference
    from codmd.ops.contract import Numbers

    SHAPE = (2, 4, 1, 3, 5)
    UPSTREAM = (0.5, -2.0, 0.7, 3.0)
    SPECIAL = {
        "huber": {"penalty": "huber", "norm_divides": "loss", "nan": "keep", "huber_c": 0.05},
        "one long block": {"norm_scope": "block", "norm_block": 100},
        "clamped batch": {"norm_scope": "batch", "guard": "clamp", "eps": 10.0},
        "sum": {"reduction": "sum", "coefficient": 0.25},
        "dropped blocks": {"nan": "zero_sample", "guard": "add", "eps": 1e-6, "norm_scope": "block", "norm_block": 3},
    }

    def as_good_as_the_reference(call, **upstream):
        """The terms, norms, factors and gradient of ``call``, equal to the reference's within float32."""
        results = []
        for run_by in (backend, reference):
            found = run_by.objective(call, True)
            results.append((found.terms, found.norms, found.factors, gradient(run_by, call, found, **upstream)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9, equal_nan=True)

    @pytest.fixture
    def small_tiles(monkeypatch):
        """Tiles of a few elements: planes are looped over, split and have tails, and programs take two pieces each."""
        monkeypatch.setattr("codmd.kernels.dmd.plans.TILE_BYTES", 64)
        monkeypatch.setattr("codmd.kernels.dmd.plans.TILES", 1)
        monkeypatch.setattr("codmd.kernels.dmd.plans.pieces_of_a_program", lambda *given: min(2, *given[1:]))
        monkeypatch.setattr(tiling, "WAVES", 1)
        return fresh_plans(monkeypatch)

    def assert_dmd(student, arguments, upstream=1.0, **options):
        """Value and gradient within twice the same-dtype PyTorch error, plus one rounding of the output."""
        found = run(ops.dmd_loss, student, arguments, upstream, backend="triton", **options)
        usual = same_dtype(student, arguments, upstream, **options)
        exact = truth(student, arguments, upstream, **options)
        for value, plain, true in zip(found, usual, exact, strict=True):
            assert relative_error(value, true) <= 2 * relative_error(plain, true) + 5e-7
        return found

    def assert_codmd(student, upstream=UPSTREAM, **options):
        """The four terms and the gradient of their weighted sum, by the same rule."""
        found, shares = codmd_of_limits(student, upstream, **options)
        assert max(shares) <= 1
        return found

    def codmd_of_limits(student, upstream=UPSTREAM, **options):
        """Terms and gradient; and the error of each as a share of what the rule allows."""
        options = {"guidance": 4.5, "fake_guidance": 1.2, **options}
        found = terms_and_gradient(fused, student, upstream, backend="triton", **options)
        usual = terms_and_gradient(by_reference, student, upstream, **options)
        exact = codmd_truth(student, **options)(upstream)
        # A relation that is exactly 0, as of one feature, comes out as the square of a rounding.
        shares = [
            float((value.double() - true).abs() / ((2 * relative_error(plain, true) + 2e-5) * true.abs() + 1e-12))
            for value, plain, true in zip(found[0], usual[0], exact[0], strict=True)
        ]
        gradient_limit = 2 * relative_error(usual[1], exact[1]) + 5e-6
        return found, [*shares, float(relative_error(found[1], exact[1]) / gradient_limit)]

    @pytest.mark.parametrize("change", SPECIAL.values(), ids=list(SPECIAL))
    def test_customised_conventions_with_mask_and_weights(change):
        convention = replace(conventions.self_forcing, **change)
        student, arguments = scores(SHAPE)
        options = {"sample_weight": torch.tensor([0.3, 2.5]), "mask": mask_of("elements", student)}
        assert_dmd(student, arguments, upstream=-3.0, convention=convention, **options)

    @pytest.mark.parametrize("kind", ["elements", "one", "all"])
    @pytest.mark.parametrize(("name", "layout"), [("longlive", "bcfhw"), ("fastvideo", "bchw"), ("tdm", "bfchw")])
    def test_the_gradient_is_zero_exactly_where_the_mask_is(name, layout, kind):
        student, arguments = scores(SHAPE, torch.float16, layout)
        mask = mask_of(kind, student)
        _, gradient = assert_dmd(student, arguments, convention=name, layout=layout, mask=mask)
        assert torch.equal(gradient != 0, mask)

    @pytest.mark.parametrize("absent", ["real_uncond", "fake_uncond"])
    @pytest.mark.parametrize("layout", ["bcfhw", "bchw"])
    def test_one_guidance_without_the_other(layout, absent):
        student, arguments = scores(SHAPE, torch.float16, layout, flow=True)
        arguments.pop(absent)
        assert_codmd(student, layout=layout, prediction="flow", **arguments)

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 2, 2, 1, 41), (1, 3, 2, 3, 104), (2, 3, 2, 17, 1)], ids=str)
    def test_lines_columns_and_single_elements(shape):
        student, arguments = scores(shape, torch.float16)
        assert_codmd(student, mask=mask_of("elements", student), **arguments)
        column = torch.arange(shape[4]) % 2 == 0
        assert_dmd(student, arguments, mask=column)

    @pytest.mark.parametrize("norm_scope", ["block", "batch"])
    def test_more_samples_than_one_tile(monkeypatch, norm_scope):
        monkeypatch.setattr("codmd.kernels.dmd.plans.SUMS_TILE", 4)
        fresh_plans(monkeypatch)
        student, arguments = scores((5, 2, 1, 1, 2))
        convention = replace(conventions.self_forcing, norm_scope=norm_scope)
        assert_dmd(student, arguments, convention=convention, sample_weight=torch.linspace(0.1, 2.0, 5))

    @pytest.mark.parametrize("pool", ["mean", (3, 2), (2, 1)])
    @pytest.mark.parametrize("width", [33, 40])
    def test_planes_beyond_one_tile_are_looped_over_and_split(small_tiles, width, pool):
        student, arguments = scores((1, 2, 1, 7, width), torch.float16)
        assert_codmd(student, pool=pool, mask=mask_of("elements", student), **arguments)
        assert all(plan.launch.grid[0] > 3 for plan in small_tiles)

    @pytest.mark.parametrize("pool", ["mean", (1, 2)], ids=["flat", "columns"])
    def test_a_lane_never_meets_more_elements_than_it_counts(small_tiles, monkeypatch, pool):
        """Planes are looped over unsplit but for that limit, with every counter of one lane driven to the top."""
        monkeypatch.setattr(tiling, "MOST_SPLITS", 1)
        student, arguments = scores((1, 1, 1, 2060, 16))
        rule = replace(conventions.self_forcing, nan="keep")
        arguments["fake"][..., 0] = torch.nan
        student[..., 0] = torch.inf
        latents = {"real": arguments["real"], "fake": arguments["fake"]}
        with launch.recording(run=True) as recorded:
            backend.objective(objective_call(student, latents, rule, pool=pool, batch=False), True)
        (pass_,) = recorded
        assert pass_.launcher.grid[0] == 2
        sums = pass_.values["workspace"][pass_.values["sums_at"] :].view(torch.float64)
        selected, nans, wild = sums[3:6].tolist()
        assert (selected, nans, wild) == (2060 * 16, 2060, 2060)

    @pytest.mark.parametrize("kind", ["columns last", "every second column", "misaligned", "constant"])
    @pytest.mark.parametrize("pool", ["mean", (2, 1)])
    def test_strides_of_latents_and_mask_are_honoured(kind, pool):
        student, arguments = scores((2, 3, 2, 4, 16), torch.float16, flow=True)
        tensors = {"student": student, **arguments}
        mask = mask_of("elements", student)
        for name in ("student", "real", "noisy"):
            value = tensors[name]
            if kind == "columns last":
                tensors[name] = value.transpose(1, 4).contiguous().transpose(1, 4)
            elif kind == "every second column":
                tensors[name] = value.repeat_interleave(2, -1)[..., ::2]
            elif kind == "misaligned":
                flat = torch.empty(value.numel() + 1, dtype=value.dtype)
                flat[1:] = value.flatten()
                tensors[name] = flat[1:].view_as(value)
        if kind == "constant":
            tensors["real_uncond"] = tensors["real_uncond"][..., :1, :1].expand_as(student)
            mask = torch.tensor([[True, False, True], [False, True, True]]).reshape(2, 3, 1, 1, 1)
        if kind == "every second column":
            mask = torch.stack([mask, ~mask], -1).flatten(-2)[..., ::2]
        assert_codmd(tensors.pop("student"), prediction="flow", pool=pool, mask=mask, **tensors)

    @pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 2, 16), (16,), (2, 1, 2, 16)], ids=str)
    def test_a_mask_never_narrows_the_vectors_of_the_latents(shape):
        student, arguments = scores((1, 2, 1, 2, 16), torch.float16)
        room = torch.rand(torch.Size(shape).numel() + 1, generator=torch.Generator().manual_seed(3)) > 0.5
        with launch.recording(run=True) as recorded:
            assert_dmd(student, arguments, mask=room[1:].reshape(shape))
        assert [launched.values["VEC"] for launched in recorded] == [8, 8]

    @pytest.mark.parametrize("pool", ["mean", (2, 2)])
    def test_offsets_beyond_31_bits_are_reached(pool):
        """Samples a little over 2³⁰ elements apart, a stride that fits in int32; few pages of each tensor exist."""
        shape, far = (3, 2, 2, 2, 4), (1 << 30) + 64

        def apart(tensor):
            kind = np.bool_ if tensor.dtype == torch.bool else np.float16
            view = torch.from_numpy(np.zeros(2 * far + 48, dtype=kind)).as_strided(shape, (far, 16, 8, 4, 1))
            return view.copy_(tensor)

        student, arguments = scores(shape, torch.float16)
        near, mask = {"student": student, **arguments}, mask_of("elements", student)
        far_away = {name: apart(tensor) for name, tensor in near.items()}
        results = []
        for latents, selected, out in (
            (near, mask, torch.empty_like(student)),
            (far_away, apart(mask), apart(torch.zeros_like(student))),
        ):
            call = objective_call(latents["student"], latents, "longlive", mask=selected, pool=pool)
            found = backend.objective(call, True)
            results.append([*found, gradient(backend, call, found, out, total=1.0)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert results[0][-1].any()

    def test_every_axis_may_pass_31_bits():
        student, arguments = scores((1, 3, 3, 3, 3), torch.float16, flow=True)
        sigma = {"sigma": arguments.pop("sigma")}
        near, mask = {"student": student, **arguments}, mask_of("elements", student)
        far_away = {name: far_apart(tensor) for name, tensor in near.items()}
        results = []
        for latents, selected, out in (
            (near, mask, torch.empty_like(student)),
            (far_away, far_apart(mask), far_apart(student)),
        ):
            call = objective_call(latents["student"], latents | sigma, "longlive", mask=selected, pool=(2, 2))
            found = backend.objective(call, True)
            results.append([*found, gradient(backend, call, found, out, total=1.0)])
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)

    def test_more_columns_than_a_tile_holds():
        """The median of five draws: with two frames of three features, single ones are ill-conditioned."""
        shares = []
        for seed in range(5):
            student, arguments = scores((1, 2, 1, 2, 520), seed=seed)
            shares.append(max(codmd_of_limits(student, pool=(1, 3), **arguments)[1]))
        assert sorted(shares)[2] <= 1

    @pytest.mark.parametrize("perturbation", [1e-2, 1e-4])
    def test_a_critic_that_tracks_the_teacher_keeps_its_digits(perturbation):
        student, arguments = scores((1, 3, 2, 4, 8), perturbation=perturbation)
        arguments = {name: arguments[name] for name in ("fake", "real")}
        found = run(ops.dmd_loss, student, arguments, backend="triton")
        for value, exact in zip(found, truth(student, arguments), strict=True):
            assert relative_error(value, exact) < 1e-6

    @pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo"])
    def test_a_zero_norm_gives_what_nan_to_num_makes_of_infinity(name):
        student, arguments = scores(SHAPE)
        zero = {"fake": arguments["fake"].clone(), "real": student.clone()}
        zero["fake"][..., 0] = student[..., 0]
        options = {"backend": "triton", "convention": name}
        value, gradient = run(ops.dmd_loss, student, zero, **options)
        assert value == torch.inf
        assert not gradient[..., 0].any()
        assert gradient[..., 1:].abs().min() > 1e34
        assert gradient.isfinite().all()
        same, nothing = run(ops.dmd_loss, student, {"fake": student, "real": student}, **options)
        assert same == 0
        assert not nothing.any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("where", ["student", "fake", "real", "real_uncond"])
    @pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo", "rcm", "fastgen"])
    def test_a_broken_value_does_what_the_reference_does(name, where, bad):
        student, arguments = scores(SHAPE, layout=NAMED[name].layout)
        (student if where == "student" else arguments[where])[0, 0, 0, 2, 3] = bad
        as_good_as_the_reference(
            objective_call(student, arguments, name, layout=NAMED[name].layout, related=False), total=0.7
        )

    @pytest.mark.parametrize(
        ("name", "change"), [("self_forcing", {}), ("rcm", {}), ("self_forcing", {"guard": "none"})]
    )
    @pytest.mark.parametrize(("where", "bad"), [("student", torch.inf), ("fake", torch.nan), ("student", None)])
    def test_broken_values_and_zero_norms_outside_of_the_mask_do_what_the_reference_does(name, change, where, bad):
        rule = replace(NAMED[name], **change)
        student, arguments = scores(SHAPE, layout=rule.layout)
        mask = torch.ones(2, 1, 1, 1, 1, dtype=torch.bool).expand_as(student).clone()
        mask[0] = False
        if bad is None:
            arguments["real_uncond"] = arguments["real"].clone()
            student[0] = arguments["real"][0]
        else:
            (student if where == "student" else arguments[where])[0, 0, 0, 2, 3] = bad
        call = objective_call(student, arguments, rule, mask=mask, layout=rule.layout, related=False)
        for found, expected in zip(backend.objective(call, True), reference.objective(call, True), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9, equal_nan=True)

    def test_a_constant_mask_of_flat_regions_is_read_where_it_is():
        student, arguments = scores((2, 3, 1, 4, 8), torch.float16)
        mask = torch.tensor([[True, False, True], [False, True, True]]).reshape(2, 3, 1, 1, 1)
        with launch.recording(run=True) as recorded:
            assert_codmd(student, pool=(2, 1), mask=mask, **arguments)
        assert [launched.values["FLAT"] for launched in recorded] == [True, True]

    def test_the_gradient_of_both_terms_is_rounded_once():
        student, arguments = scores((2, 3, 2, 3, 8), torch.float16)
        single = {name: value.float() for name, value in arguments.items()}
        upstream = (0.0, 1.0, 0.1, 0.3)
        _, found = terms_and_gradient(fused, student, upstream, backend="triton", **arguments)
        _, exact = terms_and_gradient(fused, student.float(), upstream, backend="triton", **single)
        assert (found != exact.half()).float().mean() < 0.01

    def test_what_the_mask_leaves_out_never_leaks():
        student, arguments = scores(SHAPE)
        mask = torch.ones(2, 4, 1, 1, 1, dtype=torch.bool)
        mask[:, -1] = False
        arguments["fake"][:, -1] = torch.nan
        value, gradient = run(ops.dmd_loss, student, arguments, backend="triton", mask=mask)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert not gradient[:, -1].any()

    @pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)], ids=str)
    @pytest.mark.parametrize("shape", [(1, 3, 1, 3, 4), (3, 1, 1, 3, 4)], ids=str)
    def test_terms_that_do_not_exist_are_zero(shape, weights):
        student, arguments = scores(shape)
        options = {"batch_weight": weights[0], "frame_weight": weights[1], **arguments}
        terms, _ = assert_codmd(student, (1.0, 0.0, 0.0, 0.0), **options)
        assert (terms[2] != 0) == (weights[0] > 0 and shape[0] > 1)
        assert (terms[3] != 0) == (weights[1] > 0 and shape[1] > 1)

    @pytest.mark.parametrize(
        ("given", "pool"),
        [
            ((1, 0, 0, 0), "mean"),
            ((0, 1, 0, 0), "mean"),
            ((0, 0, 1, 0), "mean"),
            ((0, 0, 0, 1), "mean"),
            ((1, 1, 1, 1), (2, 3)),
        ],
        ids=str,
    )
    def test_every_upstream_gradient_reaches_its_term(given, pool):
        student, arguments = scores((2, 4, 2, 3, 5))
        names = "total", "dmd", "batch", "frame"
        upstream = {name: g for name, g, wanted in zip(names, UPSTREAM, given, strict=True) if wanted}
        mask, valid = mask_of("elements", student), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)
        call = objective_call(
            student, arguments, "longlive", mask=mask, frame_mask=valid, pool=pool,
            numbers=Numbers(0.1, 0.6, 1.3, 0.3, 3.5, 0.5),
        )  # fmt: skip
        found = backend.objective(call, True)
        for value, expected in zip(found, reference.objective(call, True), strict=True):
            torch.testing.assert_close(value, expected, rtol=3e-5, atol=1e-7)
        outs = [gradient(run_by, call, found, **upstream) for run_by in (backend, reference)]
        torch.testing.assert_close(*outs, rtol=2e-5, atol=1e-9)
        assert outs[0].any()

    def test_a_term_without_upstream_gradient_does_not_spread_its_nan():
        student, arguments = scores(SHAPE)
        arguments["fake"][0, 2, 0, 1, 1] = torch.nan
        terms, gradient = terms_and_gradient(fused, student, (0.0, 1.0, 0.0, 0.0), backend="triton", **arguments)
        assert not terms[3].isfinite()
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("name", ["self_forcing", "fastvideo", "tdm"])
    def test_terms_report_magnitude_and_norm(name):
        student, arguments = scores(SHAPE, layout=NAMED[name].layout)
        found, expected = (
            ops.dmd_loss(student, **arguments, convention=name, backend=backend, return_terms=True)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(found.magnitude, expected.magnitude, rtol=2e-6, atol=0)
        torch.testing.assert_close(found.norm, expected.norm, rtol=2e-6, atol=0)

    @pytest.mark.parametrize(("shape", "forward"), [((1, 3), 1), ((3, 3), 1), ((2, 35), 3), ((35, 2), 3)], ids=str)
    def test_at_most_three_launches_forward_and_one_backward_leave_the_counters_zero(shape, forward):
        student, arguments = scores((*shape, 1, 1, 3), flow=True)
        with launch.recording(run=True) as recorded:
            run(ops.codmd_loss, student, arguments, prediction="flow", backend="triton")
        rows = ["relation_rows_kernel", "rows_gradient_kernel"]
        names = ["moments_kernel", *rows[: forward - 1], "gradient_kernel"]
        assert [launched.name for launched in recorded] == names
        assert all(not buffer.any() for buffer in tickets._buffers.values())

    @pytest.mark.parametrize(("frames", "channels"), [(1, 2), (3, 2), (33, 1)])
    def test_rows_of_several_processes_give_the_loss_of_one_in_three_launches(frames, channels):
        student, arguments = scores((4, frames, channels, 1, 3))
        valid = torch.ones(4, frames, dtype=torch.bool)
        valid[1, frames // 2 :] = frames == 1
        numbers = Numbers(0.1, 0.6, 1.3, 0.3, 3.5, 0.5)
        whole = backend.objective(objective_call(student, arguments, frame_mask=valid, numbers=numbers), True)
        halves = [slice(0, 2), slice(2, 4)]
        calls = [
            objective_call(
                student[half], {name: v[half] for name, v in arguments.items()}, frame_mask=valid[half], numbers=numbers
            )
            for half in halves
        ]
        with launch.recording(run=True) as recorded:
            pending = [backend.features(call) for call in calls]
            rows = torch.cat([one.rows for one in pending])
            found = [backend.gathered(calls[i], pending[i], rows, 2 * i, 2.0) for i in range(2)]
        assert len(recorded) == 6
        for half, (terms, norms, _, frame_grad, batch_grad) in zip(halves, found, strict=True):
            torch.testing.assert_close(terms[2], whole.terms[2], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(terms[0], terms[1] + 0.3 * (0.6 * terms[2] + 1.3 * terms[3]))
            torch.testing.assert_close(norms, whole.norms[half])
            torch.testing.assert_close(batch_grad, 2 * whole.batch_grad[half], rtol=1e-4, atol=1e-7)
            if frames > 1:
                torch.testing.assert_close(frame_grad, 2 * whole.frame_grad[half], rtol=1e-5, atol=1e-9)
        for term in (1, 3, 4):
            mean = torch.stack([one.terms[term] for one in found]).mean()
            torch.testing.assert_close(mean, whole.terms[term], rtol=1e-5, atol=0)
        assert all(not buffer.any() for buffer in tickets._buffers.values())

    @pytest.mark.parametrize("frames", [3, 35])
    @pytest.mark.parametrize("limit", [("LONG_FEATURES", 0), ("MOST_POOLED", 3)], ids=str)
    def test_long_or_many_gathered_rows_take_another_way(monkeypatch, frames, limit):
        monkeypatch.setattr(backend, *limit)
        student, arguments = scores((2, frames, 2, 1, 2))
        call = objective_call(student, arguments, numbers=Numbers(0.1, 0.6, 1.3, 0.3, 3.5, 0.5))
        pending, plain = backend.features(call), reference.features(call)
        others = torch.cat([2 - plain.rows[:, :-1], plain.rows[:, -1:]], 1)
        rows = torch.cat([plain.rows, others])
        found = backend.gathered(call, pending, rows, 2, 2.0)
        for value, expected in zip(found, reference.gathered(call, plain, rows, 2, 2.0), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=max(1e-6, 1e-5 * float(expected.abs().max())))

    def test_a_loss_beyond_the_kernels_is_the_references():
        student, arguments = scores((MOST_POOLED + 1, 1, 1, 1, 2))
        call = objective_call(student, {name: arguments[name] for name in ("real", "fake")}, frame=False)
        for value, expected in zip(backend.objective(call, True), reference.objective(call, True), strict=True):
            torch.testing.assert_close(value, expected)
        pending, plain = backend.features(call), reference.features(call)
        torch.testing.assert_close(pending.rows, plain.rows)
        found = backend.gathered(call, pending, pending.rows, 0, 1.0)
        torch.testing.assert_close(found.terms, reference.gathered(call, plain, plain.rows, 0, 1.0).terms)

    @pytest.mark.parametrize(
        ("shape", "related"), [((2, 3, 2, 3, 4), True), ((2, 3, 2, 3, 4), False), ((1, 33, 1, 1, 2), True)]
    )
    def test_numbers_on_the_device_are_loaded_by_the_kernels(shape, related):
        student, arguments = scores(shape)
        numbers = Numbers(0.2, 0.6, 1.3, 0.3, 3.5, 0.5)
        call = objective_call(student, arguments, related=related, numbers=numbers)
        for factor in (1, 2):
            call = call._replace(numbers=Numbers(*(factor * n for n in numbers)))
            scheduled = call._replace(numbers=torch.tensor(call.numbers))
            found = backend.objective(call, True)
            same = backend.objective(scheduled, True)
            assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
            upstream = {"total": 0.7, "dmd": 0.3, "batch": -0.2, "frame": 0.4}
            assert torch.equal(*(gradient(backend, one, found, **upstream) for one in (call, scheduled)))

    def test_pieces_of_one_allocation_hold_what_separate_results_do():
        student, arguments = scores((2, 3, 2, 3, 4))
        call = objective_call(student, arguments)
        apart, pieces = backend.objective(call, True), backend.objective(call, False)
        assert len({v.untyped_storage().data_ptr() for v in pieces}) == 1
        assert len({v.untyped_storage().data_ptr() for v in apart}) == len(apart)
        assert all(torch.equal(a.flatten(), b[: a.numel()]) for a, b in zip(apart, pieces, strict=True))
        assert torch.equal(*(gradient(backend, call, found, total=1.0) for found in (apart, pieces)))

    @pytest.mark.parametrize("scale", [1e37, 1e13, 1e-15, 1e-23, 1e-26, 1e-33])
    @pytest.mark.parametrize("penalty", ["l2", "huber"])
    @pytest.mark.parametrize("scope", ["sample", "batch"])
    def test_latents_far_from_one_give_the_right_loss_or_none(scale, penalty, scope):
        """Right at every scale, or not finite; never a finite wrong number."""
        huber = (
            {"penalty": "huber", "norm_divides": "loss", "nan": "keep", "huber_c": 0.05} if penalty == "huber" else {}
        )
        rule = replace(NAMED["self_forcing"], guard="none", eps=0.0, norm_scope=scope, **huber)
        student, arguments = scores((2, 3, 2, 4, 8))
        student, arguments = student.clamp(-2, 2), {name: arguments[name].clamp(-2, 2) for name in ("real", "fake")}
        # The gradient is as small as the latents are large.
        scaled = {name: value.double() * scale for name, value in arguments.items()}
        exact = truth(student.double() * scale, scaled, scale, convention=rule)
        made = {name: value.float() for name, value in scaled.items()}
        found = run(ops.dmd_loss, student * scale, made, scale, backend="triton", convention=rule)
        for value, expected in zip(found, exact, strict=True):
            assert not value.isfinite().all() or relative_error(value, expected) < 1e-5
        assert found[0].isfinite() or not 1e-25 < scale < 1e13

    def test_magnitude_weighs_the_direction_as_the_loss_does():
        student, arguments = scores((2, 3, 2, 3, 4))
        weight = torch.tensor([2.0, 4.0])
        for name in ("fastgen", "self_forcing"):
            rule = replace(NAMED[name], layout="bfchw")
            found, expected = (
                ops.dmd_loss(
                    student, **arguments, convention=rule, sample_weight=weight, backend=backend, return_terms=True
                ).magnitude
                for backend in ("triton", "reference")
            )
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
