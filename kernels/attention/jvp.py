"""Attention and its Jacobian-vector product in one pass over the keys.

With S = Q Kᵀ/√D, Ṡ = (Q̇ Kᵀ + Q K̇ᵀ)/√D, P = softmax_row(S):

    O = P V,    Ȯ = P V̇ + (P ∘ Ṡ) V - rowsum(P ∘ Ṡ) ∘ O.

A program owns rows of one head. Beside the running maximum m, l = Σ p and Σ p v of flash attention
(arXiv 2205.14135) it keeps r = Σ p ṡ and Σ (p v̇ + p ṡ v); all are relative to m, so one factor rescales them:
six products a tile of keys instead of two. A tangent that is None costs neither loads nor products.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    base, first, count, stride, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    VEC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``[ROWS, WIDTH]`` of a head from (first, column) on, 0 beyond ``count`` rows and HEAD columns; None of None."""
    values = None
    if base is not None:
        stride *= VEC
        rows, columns = tl.arange(0, ROWS)[:, None], column + tl.arange(0, WIDTH)[None, :]
        mask = first + rows < count
        if HEAD % WIDTH:
            mask = mask & (columns < HEAD)
        values = tl.load(base + tl.cast(first, tl.int64) * stride + (rows * stride + columns), mask=mask, other=0.0)
        if UPCAST:
            values = values.to(tl.float32)
    return values


@triton.jit
def store_rows(base, values, first, count, stride, HEAD: tl.constexpr, VEC: tl.constexpr):
    """Columns 0 to HEAD of ``values`` into a head's rows from ``first`` on, rounded to the tensor's dtype."""
    stride *= VEC
    rows, columns = tl.arange(0, values.shape[0])[:, None], tl.arange(0, values.shape[1])[None, :]
    mask = (first + rows < count) & (columns < HEAD)
    tl.store(base + tl.cast(first, tl.int64) * stride + (rows * stride + columns), values, mask=mask)


@triton.jit
def add_scores(
    scores, scores_dot, queried, queried_dot, k, k_dot, first, keys, k_n, k_dot_n, column,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, VEC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Q Kᵀ and Q̇ Kᵀ + Q K̇ᵀ over WIDTH columns, added to ``scores`` and ``scores_dot``."""
    key = load_rows(k, first, keys, k_n, column, ROWS, WIDTH, HEAD, VEC, UPCAST)
    scores = tl.dot(queried, tl.trans(key), scores, input_precision="ieee")
    if queried_dot is not None:
        scores_dot = tl.dot(queried_dot, tl.trans(key), scores_dot, input_precision="ieee")
    if k_dot is not None:
        key_dot = load_rows(k_dot, first, keys, k_dot_n, column, ROWS, WIDTH, HEAD, VEC, UPCAST)
        scores_dot = tl.dot(queried, tl.trans(key_dot), scores_dot, input_precision="ieee")
    return scores, scores_dot


@triton.jit
def attention_jvp_kernel(
    q, k, v, q_dot, k_dot, v_dot, out, out_dot,  # [B, H, N or M, D] each, None for an absent tangent
    scale, heads, queries, keys, blocks,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, q_dot_b, q_dot_h, q_dot_n, k_dot_b, k_dot_h, k_dot_n,
    v_dot_b, v_dot_h, v_dot_n, out_b, out_h, out_n, out_dot_b, out_dot_h, out_dot_n,
    HEAD: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VEC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M queries of one head; those of a head follow one another, so that K and V stay in the L2.

    Strides are in units of VEC elements. WIDTH < COLUMNS: Q and Q̇ do not fit in registers and are read again for every
    tile of keys. UPCAST: operands of a product are float32, for the interpreter, whose bfloat16 products are wrong.
    """
    program = tl.program_id(0)
    b = (program // blocks // heads).to(tl.int64)
    h = (program // blocks % heads).to(tl.int64)
    row = program % blocks * BLOCK_M
    q += (b * q_b + h * q_h) * VEC
    k += (b * k_b + h * k_h) * VEC
    v += (b * v_b + h * v_h) * VEC
    if q_dot is not None:
        q_dot += (b * q_dot_b + h * q_dot_h) * VEC
    if k_dot is not None:
        k_dot += (b * k_dot_b + h * k_dot_h) * VEC
    if v_dot is not None:
        v_dot += (b * v_dot_b + h * v_dot_h) * VEC
    if WIDTH == COLUMNS:
        queried = load_rows(q, row, queries, q_n, 0, BLOCK_M, COLUMNS, HEAD, VEC, UPCAST)
        queried_dot = load_rows(q_dot, row, queries, q_dot_n, 0, BLOCK_M, COLUMNS, HEAD, VEC, UPCAST)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    drift = tl.zeros((BLOCK_M,), tl.float32)
    value = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    tangent = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for first in range(0, keys, BLOCK_N):
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if WIDTH == COLUMNS:
            scores, scores_dot = add_scores(
                scores, scores_dot, queried, queried_dot, k, k_dot, first, keys, k_n, k_dot_n, 0,
                BLOCK_N, COLUMNS, HEAD, VEC, UPCAST,
            )  # fmt: skip
        else:
            for column in range(0, HEAD, WIDTH):
                part = load_rows(q, row, queries, q_n, column, BLOCK_M, WIDTH, HEAD, VEC, UPCAST)
                part_dot = load_rows(q_dot, row, queries, q_dot_n, column, BLOCK_M, WIDTH, HEAD, VEC, UPCAST)
                scores, scores_dot = add_scores(
                    scores, scores_dot, part, part_dot, k, k_dot, first, keys, k_n, k_dot_n, column,
                    BLOCK_N, WIDTH, HEAD, VEC, UPCAST,
                )  # fmt: skip
        valid = first + tl.arange(0, BLOCK_N) < keys
        scores = tl.where(valid[None, :], scores * (scale * LOG2_E), float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, 1))
        rescale = tl.exp2(largest - highest)
        largest = highest
        p = tl.exp2(scores - highest[:, None])
        mass = mass * rescale + tl.sum(p, 1)
        values = load_rows(v, first, keys, v_n, 0, BLOCK_N, COLUMNS, HEAD, VEC, UPCAST)
        weights = p.to(values.dtype)
        value = tl.dot(weights, values, value * rescale[:, None], input_precision="ieee")
        tangent *= rescale[:, None]
        if q_dot is not None or k_dot is not None:
            p *= scores_dot * scale
            drift = drift * rescale + tl.sum(p, 1)
            tangent = tl.dot(p.to(values.dtype), values, tangent, input_precision="ieee")
        if v_dot is not None:
            values_dot = load_rows(v_dot, first, keys, v_dot_n, 0, BLOCK_N, COLUMNS, HEAD, VEC, UPCAST)
            tangent = tl.dot(weights, values_dot, tangent, input_precision="ieee")

    value /= mass[:, None]
    tangent = tangent / mass[:, None] - (drift / mass)[:, None] * value
    store_rows(out + (b * out_b + h * out_h) * VEC, value, row, queries, out_n, HEAD, VEC)
    store_rows(out_dot + (b * out_dot_b + h * out_dot_h) * VEC, tangent, row, queries, out_dot_n, HEAD, VEC)
