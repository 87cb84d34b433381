"""Attention and its Jacobian-vector product, dense: ``[..., N, M]`` scores in the dtype of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    """O = P V, P = softmax_row(Q Kᵀ/√D), and Ȯ = P V̇ + (P ∘ Ṡ) V - rowsum(P ∘ Ṡ) ∘ O.

    Ṡ = (Q̇ Kᵀ + Q K̇ᵀ)/√D is the tangent of the scores, whose softmax moves by Ṗ = P ∘ (Ṡ - rowsum(P ∘ Ṡ)).

    Args:
        q: queries ``[..., N, D]``.
        k: keys ``[..., M, D]``.
        v: values ``[..., M, D]``.
        q_dot, k_dot, v_dot: their tangents, None where there is none.

    Returns:
        (O, Ȯ), each ``[..., N, D]``.
    """
    scale = q.shape[-1] ** -0.5
    p = (q @ k.mT * scale).softmax(-1)
    out = p @ v
    out_dot = torch.zeros_like(out) if v_dot is None else p @ v_dot
    scores_dot = [a @ b.mT * scale for a, b in ((q_dot, k), (q, k_dot)) if a is not None and b is not None]
    if scores_dot:
        moved = p * sum(scores_dot)
        out_dot = out_dot + moved @ v - moved.sum(-1, keepdim=True) * out
    return out, out_dot
