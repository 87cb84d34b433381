"""Attention with tangents: its equations, its checks, and duals in PyTorch's two forward modes, on the CPU."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, relative_error
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import codmd
from codmd import reference
from codmd.ops.backends import reference as by_reference

ABSENT = [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2)]
"""Which of the tangents of q, k and v are None."""


def operands(queries=7, keys=5, head=8, dtype=torch.float64, batch=2, heads=3):
    """q, k, v and their tangents."""
    lengths = 2 * (queries, keys, keys)
    return [torch.randn(batch, heads, length, head, dtype=torch.float64).to(dtype) for length in lengths]


def by_autograd(arguments):
    """Output and tangent by ``torch.func.jvp`` through PyTorch's own attention; None is a tangent of zeros."""
    values = tuple(arguments[:3])
    tangents = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(values, arguments[3:], strict=True))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(scaled_dot_product_attention, values, tangents)


def without(arguments, absent):
    return [None if place - 3 in absent else value for place, value in enumerate(arguments)]


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_the_reference_is_the_derivative_of_attention(absent):
    arguments = without(operands(), absent)
    for found, expected in zip(reference.attention_jvp(*arguments), by_autograd(arguments), strict=True):
        assert relative_error(found, expected) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [1, 2 * 3 * 5 * 3, 1 << 24], ids=["one query", "three queries", "all at once"])
def test_chunks_of_queries_are_as_accurate_as_pytorch(monkeypatch, dtype, most):
    monkeypatch.setattr(by_reference, "MOST_SCORES", most)
    arguments = operands(dtype=dtype)
    truth = reference.attention_jvp(*(a.double() for a in arguments))
    usual = reference.attention_jvp(*arguments)
    found = codmd.ops.attention_jvp(*arguments, backend="reference")
    for value, plain, exact in zip(found, usual, truth, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, exact) <= 2 * relative_error(plain, exact)


def test_chunks_hold_no_more_scores_than_they_may(monkeypatch):
    most, seen = 2 * 3 * 5 * 2, []
    monkeypatch.setattr(by_reference, "MOST_SCORES", most)
    dense = reference.attention_jvp

    def recorded(q, k, *rest):
        seen.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return dense(q, k, *rest)

    monkeypatch.setattr(reference, "attention_jvp", recorded)
    codmd.ops.attention_jvp(*operands(queries=7), backend="reference")
    assert seen == [most, most, most, most // 2]


def test_duals_give_the_same_in_both_forward_modes():
    arguments = operands()
    expected = by_autograd(arguments)
    found = torch.func.jvp(codmd.ops.attention, tuple(arguments[:3]), tuple(arguments[3:]))
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(arguments[:3], arguments[3:], strict=True)]
        level = forward_ad.unpack_dual(codmd.ops.attention(*duals))
        partly = forward_ad.unpack_dual(codmd.ops.attention(duals[0], *arguments[1:3]))
        plain = codmd.ops.attention(*arguments[:3])
    for one, other, exact in zip(found, level, expected, strict=True):
        assert relative_error(one, exact) < 1e-14
        assert relative_error(other, exact) < 1e-14
    assert relative_error(partly.tangent, by_autograd(without(arguments, (1, 2)))[1]) < 1e-14
    assert relative_error(plain, expected[0]) < 1e-14


def test_a_jvp_of_a_function_around_attention_carries_through():
    q, k, v, q_dot, *_ = operands()

    def around(x):
        return codmd.ops.attention(x.sin(), k * x.mean(), v).square()

    def around_math(x):
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(x.sin(), k * x.mean(), v).square()

    found, expected = (torch.func.jvp(f, (q,), (q_dot,)) for f in (around, around_math))
    assert relative_error(found[1], expected[1]) < 1e-14


def test_plain_tensors_have_pytorch_s_gradients():
    q, k, v, upstream, *_ = operands()
    q.requires_grad_()
    codmd.ops.attention(q, k, v).backward(upstream)
    found, q.grad = q.grad, None
    scaled_dot_product_attention(q, k, v).backward(upstream)
    assert torch.equal(found, q.grad)


def test_autocast_of_duals_is_that_of_plain_attention():
    arguments = operands(dtype=torch.float32)
    with torch.no_grad(), forward_ad.dual_level(), torch.autocast("cpu", torch.bfloat16):
        duals = [forward_ad.make_dual(*pair) for pair in zip(arguments[:3], arguments[3:], strict=True)]
        found = forward_ad.unpack_dual(codmd.ops.attention(*duals))
    assert found.primal.dtype == found.tangent.dtype == torch.bfloat16
    assert relative_error(found.tangent, by_autograd([a.double() for a in arguments])[1]) < 0.02


def test_attention_jvp_refuses_duals():
    arguments = operands()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[1], arguments[4])
        with pytest.raises(TypeError, match=r"k must be a torch\.Tensor of plain memory, got a dual number"):
            codmd.ops.attention_jvp(arguments[0], dual, *arguments[2:])
    with pytest.raises(TypeError, match=r"q must be .* a dual number"):
        torch.func.jvp(lambda q: codmd.ops.attention_jvp(q, *arguments[1:]), (arguments[0],), (arguments[3],))


def test_attention_jvp_refuses_tensors_that_require_a_gradient():
    arguments = operands()
    arguments[5].requires_grad_()
    with pytest.raises(ValueError, match="v_dot requires a gradient, but attention_jvp has no backward pass"):
        codmd.ops.attention_jvp(*arguments)
    with torch.no_grad():
        codmd.ops.attention_jvp(*arguments)
    with pytest.raises(ValueError, match="q requires a gradient"):
        torch.func.grad(lambda q: codmd.ops.attention_jvp(q, *operands()[1:])[0].sum())(arguments[0])


@pytest.mark.parametrize(
    ("place", "change", "error", "said"),
    [
        (0, lambda t: t[0], ValueError, r"q must have 4 axes .* got \(3, 7, 8\)"),
        (0, lambda t: t[:, :, :0], ValueError, r"q must have 4 axes .* none empty"),
        (0, lambda t: t.long(), TypeError, "q must be float32, bfloat16, float16 or float64, got torch.int64"),
        (1, lambda t: t[:, :, :0], ValueError, "k must have .* at least one key"),
        (1, lambda t: t[:, :1], ValueError, "k must have .* the batch, heads and head size of q"),
        (2, lambda t: t[:, :, 1:], ValueError, r"v must have shape \(2, 3, 5, 8\), got \(2, 3, 4, 8\)"),
        (3, lambda t: t[:, :, 1:], ValueError, r"q_dot must have shape \(2, 3, 7, 8\)"),
        (4, lambda t: t.float(), TypeError, "k_dot must have the dtype of q torch.float64, got torch.float32"),
        (5, lambda t: t.to("meta"), ValueError, "v_dot must be on the device of q cpu, got meta"),
        (5, lambda t: t.to_sparse(), TypeError, "v_dot must be .* got a tensor of layout torch.sparse_coo"),
        (5, lambda t: t.tolist(), TypeError, "v_dot must be a torch.Tensor, got list"),
    ],
)
def test_a_wrong_operand_is_named(place, change, error, said):
    arguments = operands()
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=said):
        codmd.ops.attention_jvp(*arguments)


def test_no_tangent_at_all_and_an_unknown_backend_are_refused():
    arguments = operands()
    with pytest.raises(ValueError, match="q_dot, k_dot and v_dot are None"):
        codmd.ops.attention_jvp(*arguments[:3], None, None, None)
    with pytest.raises(ValueError, match="backend='flash' is not known"):
        codmd.ops.attention_jvp(*arguments, backend="flash")


@pytest.mark.parametrize("absent", [(), (1, 2)], ids=str)
def test_the_operator_passes_opcheck(absent):
    q, *rest = without(operands(dtype=torch.float32), absent)
    for queries in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q.mT.contiguous().mT):
        torch.library.opcheck(torch.ops.codmd.attention_jvp.default, (queries, *rest, "auto"))


def test_compiled_calls_agree_without_a_break():
    arguments = operands()
    compiled = torch.compile(codmd.ops.attention_jvp, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*arguments), codmd.ops.attention_jvp(*arguments), strict=True):
        assert torch.equal(found, expected)
