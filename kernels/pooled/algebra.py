"""The relation of n feature vectors: loss and gradient, from features in memory.

Features lie in one table ``base[i·stride_i + row·stride_k]``, i < n, whose rows are x (K of them: student),
r (K: real), d (K: fake - real) and one row of validity (> 0: the vector takes part). With n = max(‖·‖, 1e-12):

    x̂ = x/n_x    r̂ = r/n_r    e = (d - r̂·(‖f‖ - ‖r‖))/n_f    f̂ = r̂ + e
    S = x̂ x̂ᵀ     Δ = e f̂ᵀ + r̂ eᵀ     G = (q - p)/(τ n)     ĝ = (G + Gᵀ) x̂     ∂L/∂x_i = (ĝ_i - x̂_i (x̂_i·ĝ_i))/n_x

Products are sums of outer products whose factors come from the cache one row at a time. That keeps IEEE float32
(TF32 would cost three digits of a cosine that is then divided by τ) and few registers: a float32 ``tl.dot`` holds
both operands in registers, which would halve the occupancy of the pass over the latents that this code ends.

Offsets inside a table are int32; the launcher refuses larger tables.
"""

import triton
import triton.language as tl

from ..blocks import (
    LEAST_OF_FEATURES,
    NORM_FLOOR,
    at_least_floor,
    norm_of,
    store_tile,
    unit_diagonal,
    unless_alone,
    unless_lost,
)
from ..divergence import divergence_rows

UNROLL = tl.constexpr(2)


@triton.jit
def feature_row(base, index, valid, stride_i, stride_k, features, k):
    """x, r, d of feature k, shaped like ``index``; 0 for vectors that take no part."""
    at = base + index * stride_i + k * stride_k
    third = features * stride_k
    x = tl.load(at, mask=valid, other=0.0)
    r = tl.load(at + third, mask=valid, other=0.0)
    d = tl.load(at + 2 * third, mask=valid, other=0.0)
    return x, r, d


@triton.jit
def validity(base, index, count, stride_i, stride_k, features):
    """Which vectors take part, shaped like ``index``."""
    return tl.load(base + index * stride_i + 3 * features * stride_k, mask=index < count, other=0.0) > 0.0


@triton.jit
def feature_norms(base, index, valid, stride_i, stride_k, features):
    """n_x, 1/n_r, (‖f‖ - ‖r‖)/n_f without cancellation, 1/n_f, and whether ‖x‖ and ‖r‖, ‖f‖ reach the floor.

    Where ‖r‖ or ‖f‖ does not, the third is 1, for e = f/n_f - r̂ as it stands.
    """
    xx = tl.zeros(index.shape, tl.float32)
    rr = tl.zeros(index.shape, tl.float32)
    ff = tl.zeros(index.shape, tl.float32)
    dd = tl.zeros(index.shape, tl.float32)
    for k in tl.range(0, features, loop_unroll_factor=UNROLL):
        x, r, d = feature_row(base, index, valid, stride_i, stride_k, features, k)
        f = r + d
        xx += x * x
        rr += r * r
        ff += f * f
        dd += d * (f + r)
    x_norm, r_norm = norm_of(xx), norm_of(rr)
    f_norm = unless_lost(norm_of(ff), r_norm, LEAST_OF_FEATURES)
    n_x, n_r, n_f = at_least_floor(x_norm), at_least_floor(r_norm), at_least_floor(f_norm)
    clamped = (r_norm < NORM_FLOOR) | (f_norm < NORM_FLOOR)
    change = tl.where(clamped, 1.0, dd / tl.maximum(r_norm + f_norm, NORM_FLOOR) / n_f)
    return n_x, 1.0 / n_r, change, 1.0 / n_f, x_norm >= NORM_FLOOR, clamped == 0


@triton.jit
def relation_tile(
    base, i, j, i_valid, j_valid, i_norms, j_norms, stride_i, stride_k, features,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """S and Δ of rows i against columns j [1, J], both [I, J].

    Row quantities come spread over the columns, [I, J]: they are loaded where they are used, and no exchange
    through shared memory enters the loop.
    """
    i_x, i_r, i_change, i_f, x_free, i_free = i_norms
    j_x, j_r, j_change, j_f, _, j_free = j_norms
    i_whole, j_whole = tl.where(i_free, 0.0, 1.0), tl.where(j_free, 0.0, 1.0)
    similarity = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    difference = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for k in tl.range(0, features, loop_unroll_factor=UNROLL):
        x, r, d = feature_row(base, i, i_valid, stride_i, stride_k, features, k)
        xj, rj, dj = feature_row(base, j, j_valid, stride_i, stride_k, features, k)
        d, dj = (d + i_whole * r) * i_f, (dj + j_whole * rj) * j_f
        r, rj = r * i_r, rj * j_r
        e, ej = d - r * i_change, dj - rj * j_change
        similarity += x * xj
        difference += e * (rj + ej) + r * ej
    # One IEEE division: τ divides its rounding too.
    return unit_diagonal(tl.div_rn(similarity, i_x * j_x), difference, i == j, x_free, i_free)


@triton.jit
def outer_products(
    left, left_t, left_i, rows, i, right, right_t, right_k, columns, k, first, last,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ_t left[t, i]·right[t, k] for first ≤ t < last: [I, 1] and [1, K] indices, below ``rows`` and ``columns``."""
    total = tl.zeros([BLOCK_I, BLOCK_K], tl.float32)
    left_at = left + i * left_i
    right_at = right + k * right_k
    for t in tl.range(first, last, loop_unroll_factor=UNROLL):
        factor = tl.load(left_at + t * left_t, mask=i < rows, other=0.0)
        total += factor * tl.load(right_at + t * right_t, mask=k < columns, other=0.0)
    return total


@triton.jit
def store_gradient(
    base, value, radial, inverse, i, k, first_row, rows, stride_i, stride_k, features, grad, grad_scale
):  # fmt: skip
    """grad[i - first_row, k] = ``grad_scale``·(ĝ - x̂·radial)/n_x for i < first_row + rows; ``inverse`` is 1/n_x."""
    inside = (i < first_row + rows) & (k < features)
    x = tl.load(base + i * stride_i + k * stride_k, mask=inside, other=0.0)
    at = grad + (i - first_row) * features + k
    tl.store(at, (value - x * inverse * radial) * (grad_scale * inverse), mask=inside)


@triton.jit
def row_block(
    base, i, j, j_valid, j_norms, n, stride_i, stride_k, count, features, temperature, by_column, by_row, row_radial,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Σ KL of rows i [I, 1], and the column sums [1, J] of G∘S.

    Stores those rows of G divided by the column's norm (``by_column`` [count, count]) and by the row's (``by_row``),
    and their row sums of G∘S (``row_radial`` [count]).
    """
    spread = i + tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
    i_valid = unless_alone(validity(base, spread, count, stride_i, stride_k, features), n)
    i_norms = feature_norms(base, spread, i_valid, stride_i, stride_k, features)
    similarity, difference = relation_tile(
        base, spread, j, i_valid, j_valid, i_norms, j_norms, stride_i, stride_k, features, BLOCK_I, BLOCK_J
    )
    kl, q_minus_p = divergence_rows(similarity, difference, i_valid, j_valid, temperature)
    g = q_minus_p / (temperature * tl.maximum(n, 1.0))
    # Over one norm each, not over both: 1/(n_i n_j) would leave float32's range.
    store_tile(by_column, i, j, count, count, g / j_norms[0])
    store_tile(by_row, i, j, count, count, g / i_norms[0])
    tl.store(row_radial + i, tl.sum(g * similarity, 1, keep_dims=True), mask=i < count)
    return kl, tl.sum(g * similarity, 0, keep_dims=True)


@triton.jit
def relation_in_one_block(
    base, stride_i, stride_k, count, features, temperature, scratch, grad, grad_scale,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """L = (1/n) Σ KL among ``count`` ≤ BLOCK_J vectors; writes ``grad_scale``·∂L/∂x [count, K].

    Exactly 0, and gradient 0, with fewer than two valid vectors. ``scratch`` is [2·count + 2, count].
    """
    by_column = scratch
    by_row = by_column + count * count
    row_radial = by_row + count * count
    column_radial = row_radial + count
    j = tl.arange(0, BLOCK_J)[None, :]
    j_valid = validity(base, j, count, stride_i, stride_k, features)
    n = tl.sum(tl.sum(j_valid.to(tl.float32), 1), 0)
    j_valid = unless_alone(j_valid, n)
    j_norms = feature_norms(base, j, j_valid, stride_i, stride_k, features)
    kl = 0.0
    column_sum = tl.zeros([1, BLOCK_J], tl.float32)
    for start in range(0, count, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)[:, None]
        block_kl, block_sum = row_block(
            base, i, j, j_valid, j_norms, n, stride_i, stride_k, count, features, temperature, by_column, by_row,
            row_radial, BLOCK_I, BLOCK_J,
        )  # fmt: skip
        kl += block_kl
        column_sum += block_sum
    tl.store(column_radial + j, column_sum, mask=j < count)
    # All threads wrote the scratch and all read it.
    tl.debug_barrier()
    for start in range(0, count, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)[:, None]
        valid = unless_alone(validity(base, i, count, stride_i, stride_k, features), n)
        n_x, _, _, _, free, _ = feature_norms(base, i, valid, stride_i, stride_k, features)
        radial = tl.load(row_radial + i, mask=i < count, other=0.0)
        radial = tl.where(free, radial + tl.load(column_radial + i, mask=i < count, other=0.0), 0.0)
        for first in range(0, features, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)[None, :]
            value = outer_products(
                by_column, 1, count, count, i, base, stride_i, stride_k, features, k, 0, count, BLOCK_I, BLOCK_K
            )
            value += outer_products(
                by_row, count, 1, count, i, base, stride_i, stride_k, features, k, 0, count, BLOCK_I, BLOCK_K
            )
            store_gradient(
                base, value, radial, 1.0 / n_x, i, k, 0, count, stride_i, stride_k, features, grad, grad_scale
            )
    return kl / tl.maximum(n, 1.0)
