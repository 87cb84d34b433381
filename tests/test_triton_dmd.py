"""The Triton kernels of the DMD and CoDMD losses against the float64 reference, run by Triton's CPU interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, frame_mask, relative_error
from dmd_cases import run, same_dtype, scores, truth
from interpreted import INTERPRETED

pytest.importorskip("triton")

if INTERPRETED:
    from codmd_cases import by_reference, terms_and_gradient
    from codmd_cases import truth as codmd_truth

    from codmd import ops
    from codmd.conventions import NAMED, replace

    FUSABLE = sorted(name for name, convention in NAMED.items() if convention.fusable)

    def triton_dmd(*args, **kwargs):
        return ops.dmd_loss(*args, backend="triton", **kwargs)

    def triton_codmd(student, **options):
        return ops.codmd_loss(student, return_terms=True, backend="triton", **options)

    def assert_as_accurate_as_pytorch(student, arguments, **options):
        """Error against float64 at most twice that of PyTorch in the same dtype, plus float32 rounding."""
        options = {"guidance": 3.5, "fake_guidance": 1.5, "layout": "bfchw"} | options
        if "sigma" in arguments:
            options["prediction"] = "flow"
        expected = truth(student, arguments, 0.7, **options)
        usual = same_dtype(student, arguments, 0.7, **options)
        found = run(triton_dmd, student, arguments, 0.7, **options)
        # The interpreter truncates where the hardware rounds to bfloat16: twice the error on average.
        factors = 2, 3 if student.dtype == torch.bfloat16 else 2
        for value, exact, other, factor in zip(found, expected, usual, factors, strict=True):
            error, allowed = relative_error(value, exact), factor * relative_error(other, exact) + 1e-6
            assert error <= allowed, f"{error:.1e} > {allowed:.1e} for {tuple(student.shape)} {options}"

    @pytest.mark.parametrize("number", range(len(FUSABLE)), ids=FUSABLE)
    def test_every_fusable_convention_matches_float64(number):
        layout = ("bfchw", "bcfhw", "bchw")[number % 3]
        shape = (2, 1, 2, 4, 8) if layout == "bchw" else (2, 4, 1, 3, 8)
        inputs = scores(shape, DTYPES[number % 3], layout, flow=number % 2 == 1, seed=number)
        assert_as_accurate_as_pytorch(*inputs, convention=FUSABLE[number], layout=layout)

    @pytest.mark.parametrize("scope", ["sample", "batch", "block"])
    @pytest.mark.parametrize("guard", ["none", "clamp", "add"])
    @pytest.mark.parametrize("nan", ["to_num", "keep"])
    def test_scopes_guards_and_policies_combine(scope, guard, nan):
        rule = replace(
            NAMED["self_forcing"], norm_scope=scope, norm_block=2, independent_first_frame=scope == "block",
            guard=guard, eps=0.0 if guard == "none" else 0.5, nan=nan,
        )  # fmt: skip
        assert_as_accurate_as_pytorch(*scores((2, 4, 1, 3, 5)), convention=rule)

    @pytest.mark.parametrize("shape", [(2, 3, 2, 4, 6), (2, 3, 2, 1, 1), (1, 3, 1, 1, 6), (2, 1, 1, 1, 1), ()])
    def test_masks_of_any_broadcastable_shape_select(shape):
        student, arguments = scores((2, 3, 2, 4, 6))
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
        assert_as_accurate_as_pytorch(student, arguments, mask=mask)

    def test_nothing_selected_gives_zero_and_no_gradient():
        student, arguments = scores((2, 3, 1, 4, 6))
        value, gradient = run(triton_dmd, student, arguments, guidance=2.0, mask=torch.zeros((), dtype=torch.bool))
        assert value == 0
        assert not gradient.any()

    @pytest.mark.parametrize("name", ["self_forcing", "fastgen", "rcm"])
    def test_sample_weights_scale_each_sample(name):
        weight = torch.tensor([0.0, 2.5])
        assert_as_accurate_as_pytorch(*scores((2, 2, 1, 4, 6)), convention=name, sample_weight=weight)

    @pytest.mark.parametrize("name", ["self_forcing", "rcm", "fastgen"])
    @pytest.mark.parametrize("where", ["student", "fake", "real"])
    def test_non_finite_values_do_what_the_policy_says(name, where):
        student, arguments = scores((3, 2, 1, 2, 4))
        broken = student if where == "student" else arguments[where]
        broken[1, 0, 0, 0, 1] = torch.nan
        options = {"guidance": 3.5, "fake_guidance": 1.5, "convention": name, "layout": "bfchw"}
        expected = run(ops.dmd_loss, student, arguments, backend="reference", **options)
        found = run(triton_dmd, student, arguments, **options)
        for value, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(value, exact, rtol=2e-5, atol=1e-9, equal_nan=True)

    @pytest.mark.parametrize("kind", ["every second column", "transposed", "expanded"])
    def test_any_strides_give_the_contiguous_result(kind):
        student, arguments = scores((2, 2, 2, 4, 6))

        def strided(tensor):
            if kind == "transposed":
                return tensor.mT.contiguous().mT
            if kind == "expanded":
                return tensor[:, :, :1].expand_as(tensor)
            wide = tensor.new_full((*tensor.shape[:-1], 12), torch.nan)
            wide[..., ::2] = tensor
            return wide[..., ::2]

        arguments = {name: strided(value) for name, value in arguments.items()}
        assert_as_accurate_as_pytorch(student if kind == "expanded" else strided(student), arguments)

    UPSTREAM = (0.5, -2.0, 0.7, 3.0)

    @pytest.mark.parametrize(
        ("shape", "pool", "convention", "masked"),
        [
            ((2, 3, 2, 3, 8), "mean", "self_forcing", False),
            ((3, 4, 2, 3, 8), "mean", "rcm", True),
            ((2, 3, 1, 5, 7), (2, 2), "longlive", False),
            ((1, 33, 2, 1, 2), "mean", "fastvideo", False),
            ((3, 1, 2, 4, 4), (2, 1), "fastgen", False),
        ],
    )
    @pytest.mark.parametrize("flow", [False, True])
    def test_codmd_is_both_terms_in_one_pass(shape, pool, convention, masked, flow):
        student, arguments = scores(shape, flow=flow)
        options = arguments | {
            "guidance": 3.5, "fake_guidance": 1.5, "convention": convention, "layout": "bfchw", "pool": pool,
            "frame_mask": frame_mask(*shape[:2]) if masked else None, "prediction": "flow" if flow else "x0",
        }  # fmt: skip
        expected = codmd_truth(student, **options)(UPSTREAM)
        usual = terms_and_gradient(by_reference, student, UPSTREAM, **options)
        found = terms_and_gradient(triton_codmd, student, UPSTREAM, **options)
        for value, exact, other in zip(found, expected, usual, strict=True):
            assert relative_error(value, exact) <= 2 * relative_error(other, exact) + 2e-6

    def test_calls_repeat_bit_for_bit():
        student, arguments = scores((2, 3, 2, 3, 8))
        options = {"guidance": 3.5, "layout": "bfchw"}
        first, second = (terms_and_gradient(triton_codmd, student, UPSTREAM, **arguments, **options) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
