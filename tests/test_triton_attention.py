"""Attention with tangents by the Triton kernel against the float64 reference, run by Triton's CPU interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, relative_error
from interpreted import INTERPRETED
from test_attention import ABSENT, operands, without

pytest.importorskip("triton")

if INTERPRETED:
    import codmd
    from codmd import reference
    from codmd.kernels import backend, launch
    from codmd.kernels.attention import passes
    from codmd.ops.contract import Attention

    def assert_as_accurate_as_pytorch(arguments):
        """Output and tangent, from one launch, within twice the error of PyTorch in the same dtype."""
        with launch.recording(run=True) as launches:
            found = backend.attention_jvp(Attention(*arguments))
        assert [one.name for one in launches] == ["attention_jvp_kernel"]
        truth = reference.attention_jvp(*(a if a is None else a.double() for a in arguments))
        usual = reference.attention_jvp(*arguments)
        # The interpreter truncates results where the hardware rounds them to bfloat16.
        factor = 3 if arguments[0].dtype == torch.bfloat16 else 2
        for value, plain, exact in zip(found, usual, truth, strict=True):
            assert value.dtype == arguments[0].dtype
            assert relative_error(value, exact) <= factor * relative_error(plain, exact) + 1e-7
        return found

    @pytest.mark.parametrize(
        ("dtype", "lengths"),
        [(dtype, lengths) for dtype in DTYPES[1:] for lengths in [(130, 77), (1, 1), (33, 160)]]
        + [(torch.float32, (35, 21))],
        ids=str,
    )
    def test_any_lengths(dtype, lengths):
        """Around tiles of 128 and 32, or of 32 and 16 in float32."""
        assert_as_accurate_as_pytorch(operands(*lengths, 64, dtype, 1, 2))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head", [128, 72, 20])
    def test_any_head_size_up_to_128(dtype, head):
        assert_as_accurate_as_pytorch(operands(20, 37, head, dtype, 1, 2))

    @pytest.mark.parametrize("absent", ABSENT, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_absent_tangents(absent, dtype):
        assert_as_accurate_as_pytorch(without(operands(20, 37, 64, dtype, 1, 2), absent))

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
    def test_the_tiles_of_every_architecture(architecture):
        with launch.assuming(architecture):
            assert_as_accurate_as_pytorch(operands(140, 70, 128, torch.bfloat16, 1, 1))

    def test_large_scores_do_not_overflow():
        arguments = operands(32, 40, 64, torch.float32, 1, 1)
        arguments[0] *= 60  # exp of such scores is infinite
        assert_as_accurate_as_pytorch(arguments)

    def test_any_strides():
        q, k, v, q_dot, k_dot, v_dot = operands(20, 37, 64, torch.float16, 2, 2)
        interleaved = torch.stack([v, v_dot], -2).transpose(1, 2).contiguous().transpose(1, 2)
        strided = [
            q.transpose(1, 2).contiguous().transpose(1, 2), k[:1].expand_as(k), interleaved[..., 0, :],
            q_dot.mT.contiguous().mT, k_dot.flip(3).contiguous().flip(3), interleaved[..., 1, :],
        ]  # fmt: skip
        out, out_dot = assert_as_accurate_as_pytorch(strided)
        assert out.stride() == out_dot.stride() == strided[0].stride()

    def test_rows_far_apart_are_copied(monkeypatch):
        monkeypatch.setattr(passes, "FARTHEST", 65)
        arguments = operands(20, 37, 64, torch.float16, 1, 2)
        assert passes.addressable(arguments[1]) is arguments[1]
        arguments[1] = torch.stack([arguments[1], arguments[4]], 3)[:, :, :, 0]
        assert passes.addressable(arguments[1]).stride(2) == 64
        assert_as_accurate_as_pytorch(arguments)

    def test_the_same_bits_on_every_call():
        arguments = operands(40, 70, 64, torch.float16, 1, 2)
        first, second = (codmd.ops.attention_jvp(*arguments) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_a_nan_of_one_query_stays_there():
        arguments = operands(40, 37, 64, torch.float16, 1, 2)
        arguments[3][0, 1, 5, 3] = torch.nan
        out, out_dot = backend.attention_jvp(Attention(*arguments))
        assert not out.isnan().any()
        rows = out_dot.isnan().any(-1)
        assert rows[0, 1, 5]
        assert rows.sum() == 1

    def test_wider_heads_go_to_the_reference():
        arguments = operands(5, 4, 160, torch.float32, 1, 1)
        with launch.recording() as launches:
            found = codmd.ops.attention_jvp(*arguments)
        assert not launches
        expected = codmd.ops.attention_jvp(*arguments, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
