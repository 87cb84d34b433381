"""``attention_jvp`` and ``attention``: softmax attention that carries tangents of forward-mode differentiation.

PyTorch's fused attention has no forward mode: a Jacobian-vector product of a network with attention, as continuous-time
consistency models (arXiv 2410.11081), MeanFlow (arXiv 2505.13447) and rCM (arXiv 2510.08431) train with, falls back to
``N x M`` scores in memory. These operators keep O(N + M). There is no backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from codmd import backends, private
from codmd.ops import checks
from codmd.ops.contract import Attention
from codmd.ops.operator import is_traced
from codmd.ops.shapes import empty_attention


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention O = softmax(Q Kᵀ/√D) V and its Jacobian-vector product Ȯ, in one pass over the keys.

    With P the softmax and Ṡ = (Q̇ Kᵀ + Q K̇ᵀ)/√D: Ȯ = P V̇ + (P ∘ Ṡ) V - rowsum(P ∘ Ṡ) ∘ O. Equal to
    ``torch.func.jvp(torch.nn.functional.scaled_dot_product_attention, (q, k, v), (q_dot, k_dot, v_dot))``. Neither mask
    nor dropout, and no backward pass.

    Args:
        q: queries ``[B, H, N, D]``, float32, bfloat16, float16 (float64 on the reference); any strides.
        k: keys ``[B, H, M, D]``, like ``q``.
        v: values ``[B, H, M, D]``, like ``q``.
        q_dot: tangent of ``q``, of its shape and dtype, or None where it has none, which saves its products.
        k_dot: tangent of ``k``, likewise.
        v_dot: tangent of ``v``, likewise. One of the three is a tensor.
        backend: ``"auto"``, ``"triton"`` (heads of up to 128) or ``"reference"`` (by chunks of queries, on any device);
            ``"cpp"`` and ``"cuda"`` have no kernel of their own and take the chunks.

    Returns:
        ``(out, out_dot)``, each ``[B, H, N, D]``, in the dtype of ``q`` and in its memory order. Products are of the
        inputs' dtype with float32 sums, float32 in IEEE arithmetic; the same bits on every call. Memory beyond the
        results: none in the kernels, O(chunk · M) in the reference.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. A dual number is refused, as its
            tangent would be lost (:func:`attention` takes it), and so is a tensor that requires a gradient.

    Source: the forward pass of flash attention (arXiv 2205.14135), differentiated.
    """
    call = Attention(q, k, v, q_dot, k_dot, v_dot)
    backends.check_name(backend)
    _check(call)
    return _jvp(call, backend)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """Softmax attention of plain tensors, or of dual numbers.

    Plain tensors go to ``torch.nn.functional.scaled_dot_product_attention``, with its gradients. Where one of the three
    is a dual number, under ``torch.autograd.forward_ad.dual_level`` or ``torch.func.jvp``, the result is a dual number
    from :func:`attention_jvp`: run it under ``torch.no_grad()``, as it has no backward pass.

    Args:
        q: queries ``[B, H, N, D]``.
        k: keys ``[B, H, M, D]``.
        v: values ``[B, H, M, D]``.
        backend: of dual numbers, as in :func:`attention_jvp`.

    Returns:
        ``[B, H, N, D]``.

    Raises:
        TypeError, ValueError: dual numbers that :func:`attention_jvp` does not take.
    """
    backends.check_name(backend)
    if not private.dual_level_active():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    duals = [forward_ad.unpack_dual(tensor) for tensor in (q, k, v)]
    primals = [dual.primal for dual in duals]
    tangents = [None if d.tangent is None or private.is_zero(d.tangent) else d.tangent for d in duals]
    if all(tangent is None for tangent in tangents):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return forward_ad.make_dual(*attention_jvp(*primals, *tangents, backend=backend))


def _jvp(call: Attention, backend: str) -> tuple[Tensor, Tensor]:
    if is_traced(call.q) or private.transforms_active():
        return torch.ops.codmd.attention_jvp(*call, backend)
    return backends.select(backend, call.q).attention_jvp(call)


def _check(call: Attention) -> None:
    for name, value in zip(Attention._fields, call, strict=True):
        if value is not None or name in ("q", "k", "v"):
            _check_operand(name, value)
    q, k = call.q, call.k
    if q.dtype not in checks.DTYPES:
        raise TypeError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    if q.ndim != 4 or q.numel() == 0:
        raise ValueError(f"q must have 4 axes (batch, heads, queries, head size), none empty, got {tuple(q.shape)}")
    keys = (*q.shape[:2], k.shape[2] if k.ndim == 4 else 0, q.shape[3])
    if k.shape != keys or k.numel() == 0:
        raise ValueError(
            f"k must have 4 axes (batch, heads, keys, head size), the batch, heads and head size of q "
            f"{tuple(q.shape)} and at least one key, got {tuple(k.shape)}"
        )
    shapes = {"q": q.shape, "k": k.shape, "v": k.shape}
    for name, value in zip(Attention._fields[1:], call[1:], strict=True):
        if value is None:
            continue
        expected = shapes[name.removesuffix("_dot")]
        if value.shape != expected:
            raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(value.shape)}")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q {q.dtype}, got {value.dtype}")
        if value.device != q.device:
            raise ValueError(f"{name} must be on the device of q {q.device}, got {value.device}")
    if all(tangent is None for tangent in call[3:]):
        raise ValueError("q_dot, k_dot and v_dot are None: pass a tangent, or call scaled_dot_product_attention")


def _check_operand(name: str, value: Any) -> None:
    """A tensor of plain memory, or what a torch.func transform made of one; no dual number, no gradient."""
    checks.check_memory(name, value, transformed=True)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, but attention_jvp has no backward pass: call it under torch.no_grad()"
        )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.select(backend, q).attention_jvp(Attention(q, k, v, q_dot, k_dot, v_dot))


_operator = torch.library.custom_op(
    "codmd::attention_jvp",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, str backend)"
    " -> (Tensor, Tensor)",
)
_operator.register_fake(lambda q, *_: empty_attention(q))
