"""The decoupled loss by the Triton kernels against the float64 reference, run by Triton's CPU interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, frame_mask, relative_error
from dmd_cases import mask_of, run
from interpreted import INTERPRETED
from test_decoupled import FUSABLE, decoupled

pytest.importorskip("triton")

if INTERPRETED:
    from triton_calls import gradient, objective_call

    from benchmarks.traffic import traffic
    from codmd import conventions, reference
    from codmd.conventions import NAMED
    from codmd.kernels import backend, launch, plans, tiling
    from codmd.ops.backends import reference as by_reference
    from codmd.ops.contract import Numbers

    SHAPE = (2, 4, 1, 3, 5)
    GUIDANCE, CRITIC = 3.5, 1.5
    TWO_READS = ["moments_kernel", "decoupled_kernel", "gradient_kernel"]

    def decoupled_call(student, arguments, rule, **options):
        scales = Numbers(0.2, 0.7, 1.3, 0.1, rule.cond_scale(GUIDANCE), rule.cond_scale(CRITIC))
        call = objective_call(student, arguments, rule, **{"numbers": scales, **options})
        return call._replace(augment_real=arguments["augment_real"], augment_uncond=arguments["augment_uncond"])

    def served(call, separate=True, **upstream):
        """(what was found, gradient, names of the launches)."""
        with launch.recording(run=True) as launches:
            found = backend.objective(call, separate)
            out = gradient(backend, call, found, **upstream)
        return found, out, [one.name for one in launches]

    def assert_as_accurate_as_pytorch(student, arguments, convention="self_forcing", layout="bfchw", **options):
        """Loss and gradient within twice the error of PyTorch in the same dtype; the reference serves nothing."""
        rule = conventions.resolve(convention) if isinstance(convention, str) else convention
        call = decoupled_call(student, arguments, rule, related=False, layout=layout, **options)
        found, out, launched = served(call, dmd=0.7)
        assert launched == TWO_READS
        assert found.terms[0] == found.terms[1]
        given = {"guidance": GUIDANCE, "fake_guidance": CRITIC, "convention": rule, "layout": layout, **options}
        usual = run(reference.dmd_loss, student, arguments, 0.7, **given)
        wide = {name: value.double() for name, value in arguments.items()}
        exact = run(reference.dmd_loss, student.double(), wide, 0.7, **given)
        # The interpreter truncates where the hardware rounds to bfloat16: twice the error on average.
        factors = 2, 3 if student.dtype == torch.bfloat16 else 2
        for value, plain, true, factor in zip((found.terms[1], out), usual, exact, factors, strict=True):
            assert relative_error(value, true) <= factor * relative_error(plain, true) + 1e-6

    def assert_as_the_reference(call, separate=True, **upstream):
        """Terms with mean|g|, norms, factors and gradient are the reference backend's within float32 rounding."""
        found, out, _ = served(call, separate, **upstream)
        expected = by_reference.objective(call, True)
        theirs = gradient(by_reference, call, expected, **upstream)
        norms = found.norms[: expected.norms.numel()].view_as(expected.norms)
        ours = found.terms[:5], norms, found.factors[: len(call.student)], out
        for value, other in zip(ours, (expected.terms, expected.norms, expected.factors, theirs), strict=True):
            # The halves of a direction cancel in some elements.
            largest = float(other.abs().nan_to_num(0, 0, 0).max())
            torch.testing.assert_close(value, other, rtol=5e-6, atol=2e-6 * largest, equal_nan=True)

    @pytest.mark.parametrize("number", range(len(FUSABLE)), ids=FUSABLE)
    def test_every_fusable_convention_matches_float64(number):
        layout = ("bfchw", "bcfhw")[number % 2]
        inputs = decoupled((2, 4, 1, 3, 8), DTYPES[number % 3], layout, seed=number)
        assert_as_accurate_as_pytorch(*inputs, FUSABLE[number], layout)

    @pytest.mark.parametrize("scope", ["sample", "batch", "block"])
    @pytest.mark.parametrize("guard", ["none", "clamp", "add"])
    @pytest.mark.parametrize("nan", ["to_num", "keep"])
    def test_scopes_guards_and_policies_combine(scope, guard, nan):
        rule = replace(
            NAMED["self_forcing"], norm_scope=scope, norm_block=2, independent_first_frame=scope == "block",
            guard=guard, eps=0.0 if guard == "none" else 0.5, nan=nan,
        )  # fmt: skip
        assert_as_accurate_as_pytorch(*decoupled(SHAPE), rule)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(2, 2, 2, 1, 41), (1, 3, 2, 17, 1), (3, 2, 1, 3, 26)], ids=str)
    def test_every_dtype_and_odd_sizes(shape, dtype):
        assert_as_accurate_as_pytorch(*decoupled(shape, dtype))

    def test_one_element():
        assert_as_accurate_as_pytorch(*decoupled((1, 1, 1, 1, 1)))

    @pytest.mark.parametrize("kind", ["elements", "frames", "one", "empty"])
    @pytest.mark.parametrize("name", ["self_forcing", "fastgen", "rcm"])
    def test_masks_and_sample_weights(kind, name):
        student, arguments = decoupled(SHAPE)
        weight = torch.tensor([0.5, 2.0])
        mask = mask_of(kind, student).expand_as(student)
        call = decoupled_call(student, arguments, NAMED[name], related=False, mask=mask, sample_weight=weight)
        assert_as_the_reference(call, dmd=-3.0)
        if kind == "elements":
            assert_as_accurate_as_pytorch(student, arguments, name, mask=mask, sample_weight=weight)

    def test_the_critic_is_guided_too():
        student, arguments = decoupled(SHAPE)
        arguments["fake_uncond"] = arguments["fake"] + 0.3 * torch.randn(SHAPE)
        assert_as_accurate_as_pytorch(student, arguments)

    @pytest.mark.parametrize("tile_bytes", [64, 2048])
    def test_planes_are_split_and_have_tails(monkeypatch, tile_bytes):
        monkeypatch.setattr("codmd.kernels.dmd.plans.TILE_BYTES", tile_bytes)
        plans.PLANS.clear()
        monkeypatch.setattr(plans.PLANS, "_new", {})
        monkeypatch.setattr(tiling, "WAVES", 64)
        student, arguments = decoupled((2, 2, 1, 9, 40))
        assert_as_accurate_as_pytorch(student, arguments)
        wide = {name: torch.empty(2, 2, 1, 9, 80)[..., ::2].copy_(value) for name, value in arguments.items()}
        assert_as_accurate_as_pytorch(student, wide)

    @pytest.mark.parametrize("name", ["self_forcing", "rcm", "fastgen"])
    @pytest.mark.parametrize("where", ["student", "fake", "augment_real", "augment_uncond"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_each_half_is_repaired_as_the_policy_says(name, where, value):
        student, arguments = decoupled((3, 2, 1, 2, 4))
        (student if where == "student" else arguments[where])[1, 0, 0, 0, 1] = value
        assert_as_the_reference(decoupled_call(student, arguments, NAMED[name], related=False), dmd=1.0)

    def test_a_level_without_a_norm_leaves_the_other():
        student, arguments = decoupled(SHAPE)
        arguments["augment_real"] = student.clone()
        arguments["augment_uncond"] = student.clone()
        rule = replace(NAMED["self_forcing"], guard="none", eps=0.0)
        call = decoupled_call(student, arguments, rule, related=False)
        assert_as_the_reference(call, dmd=1.0)
        assert served(call, dmd=1.0)[0].terms[1] > 0

    @pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e30])
    def test_the_loss_is_right_at_every_magnitude(scale):
        student, arguments = decoupled(SHAPE)
        scaled = {name: value.clamp(-2, 2) * scale for name, value in arguments.items()}
        rule = replace(NAMED["self_forcing"], guard="none", eps=0.0)
        assert_as_accurate_as_pytorch(student.clamp(-2, 2) * scale, scaled, rule)

    @pytest.mark.parametrize(
        ("shape", "pool", "separate"),
        [((2, 3, 2, 3, 8), (1, 1), False), ((2, 3, 1, 5, 7), (2, 2), True), ((1, 33, 2, 1, 2), (1, 1), True)],
        ids=str,
    )
    def test_the_relation_takes_the_matching_level_alone(shape, pool, separate):
        student, arguments = decoupled(shape)
        options = {"pool": pool, "frame_mask": frame_mask(*shape[:2])}
        call = decoupled_call(student, arguments, NAMED["longlive"], **options)
        assert_as_the_reference(call, separate, total=0.5, batch=-2.0, frame=0.7, dmd=3.0)
        assert_as_the_reference(call, separate, frame=0.7)

    def test_scheduled_numbers_are_loaded():
        student, arguments = decoupled(SHAPE)
        call = decoupled_call(student, arguments, NAMED["self_forcing"])
        scheduled = call._replace(numbers=torch.tensor(call.numbers))
        for value, other in zip(served(call, total=1.0)[:2], served(scheduled, total=1.0)[:2], strict=True):
            torch.testing.assert_close(value, other)

    def test_several_processes_gather_the_same_rows():
        student, arguments = decoupled((3, 2, 1, 2, 3))
        call = decoupled_call(student, arguments, NAMED["self_forcing"])
        pending, theirs = backend.features(call), by_reference.features(call)
        torch.testing.assert_close(pending.rows, theirs.rows, rtol=1e-5, atol=1e-7)
        found, expected = (
            run_by.gathered(call, left, torch.cat([left.rows, left.rows]), 3, 2.0)
            for run_by, left in ((backend, pending), (by_reference, theirs))
        )
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=5e-6, atol=1e-8)

    @pytest.mark.parametrize(("related", "reads"), [(False, 7), (True, 8)])
    def test_each_pass_reads_a_latent_once(related, reads):
        student, arguments = decoupled((2, 2, 2, 5, 8))
        call = decoupled_call(student, arguments, NAMED["self_forcing"], related=related)
        with launch.recording(run=True) as launches:
            found = backend.objective(call, True)
            assert traffic(launches).latents == reads * 4 * student.numel()
            forward = len(launches)
            gradient(backend, call, found, total=1.0)
        assert traffic(launches[forward:]).latents == 5 * 4 * student.numel()
