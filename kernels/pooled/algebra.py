"""The relation of n feature vectors: loss and gradient, from features in memory, held in registers.

Features lie in one table [n, 3K + 1], whose rows are x (K of them: student), r (K: real), d (K: fake - real) and
validity (> 0: the vector takes part). With n = max(‖·‖, 1e-12):

    x̂ = x/n_x    r̂ = r/n_r    e = (d - r̂·(‖f‖ - ‖r‖))/n_f    f̂ = r̂ + e
    S = x̂ x̂ᵀ     Δ = e f̂ᵀ + r̂ eᵀ     G = (q - p)/(τ n)     ĝ = (G + Gᵀ) x̂     ∂L/∂x_i = (ĝ_i - x̂_i (x̂_i·ĝ_i))/n_x

Every product is an IEEE float32 ``tl.dot``: TF32 would cost three digits of a cosine that is then divided by τ.
Features beyond BLOCK_K go by in steps. Indices of vectors are [I, 1].

Offsets inside a table are int32; the launcher refuses larger tables.
"""

import triton
import triton.language as tl

from ..blocks import (
    LEAST_OF_FEATURES,
    NORM_FLOOR,
    at_least_floor,
    norm_of,
    unit_diagonal,
    unless_alone,
    unless_lost,
)
from ..divergence import divergence_rows


@triton.jit
def features_of(base, i, inside, features, first, BLOCK_K: tl.constexpr):
    """Features ``first : first + BLOCK_K`` of the vectors i that are ``inside``, [I, BLOCK_K]; 0 elsewhere."""
    k = first + tl.arange(0, BLOCK_K)[None, :]
    at = base + i * (3 * features + 1) + k
    return tl.load(at, mask=inside & (k < features), other=0.0)


@triton.jit
def triple_of(base, i, valid, features, first, BLOCK_K: tl.constexpr):
    """x, r, d of :func:`features_of`."""
    x = features_of(base, i, valid, features, first, BLOCK_K)
    r = features_of(base + features, i, valid, features, first, BLOCK_K)
    d = features_of(base + 2 * features, i, valid, features, first, BLOCK_K)
    return x, r, d


@triton.jit
def validity(base, i, count, features):
    """Which vectors take part, [I, 1]."""
    return tl.load(base + i * (3 * features + 1) + 3 * features, mask=i < count, other=0.0) > 0.0


@triton.jit
def feature_norms(base, i, valid, features, BLOCK_K: tl.constexpr):
    """n_x, 1/n_r, (‖f‖ - ‖r‖)/n_f without cancellation, 1/n_f, and whether ‖x‖ and ‖r‖, ‖f‖ reach the floor.

    Where ‖r‖ or ‖f‖ does not, the third is 1, for e = f/n_f - r̂ as it stands.
    """
    xx = tl.zeros(i.shape, tl.float32)
    rr = tl.zeros(i.shape, tl.float32)
    ff = tl.zeros(i.shape, tl.float32)
    dd = tl.zeros(i.shape, tl.float32)
    for first in range(0, features, BLOCK_K):
        x, r, d = triple_of(base, i, valid, features, first, BLOCK_K)
        f = r + d
        xx += tl.sum(x * x, 1, keep_dims=True)
        rr += tl.sum(r * r, 1, keep_dims=True)
        ff += tl.sum(f * f, 1, keep_dims=True)
        dd += tl.sum(d * (f + r), 1, keep_dims=True)
    return norms_of(xx, rr, ff, dd)


@triton.jit
def norms_of(xx, rr, ff, dd):
    """The result of :func:`feature_norms` from Σx², Σr², Σf² and Σd·(f + r)."""
    x_norm, r_norm = norm_of(xx), norm_of(rr)
    f_norm = unless_lost(norm_of(ff), r_norm, LEAST_OF_FEATURES)
    n_x, n_r, n_f = at_least_floor(x_norm), at_least_floor(r_norm), at_least_floor(f_norm)
    clamped = (r_norm < NORM_FLOOR) | (f_norm < NORM_FLOOR)
    change = tl.where(clamped, 1.0, dd / tl.maximum(r_norm + f_norm, NORM_FLOOR) / n_f)
    return n_x, 1.0 / n_r, change, 1.0 / n_f, x_norm >= NORM_FLOOR, clamped == 0


@triton.jit
def unit_triple(base, i, valid, norms, features, first, BLOCK_K: tl.constexpr):
    """x as it is, r̂ and e, [I, BLOCK_K]."""
    x, r, d = triple_of(base, i, valid, features, first, BLOCK_K)
    r, e = scores_of(r, d, norms)
    return x, r, e


@triton.jit
def scores_of(r, d, norms):
    """r̂ and e of features r and d."""
    _, by_r, change, by_f, _, free = norms
    d = (d + tl.where(free, 0.0, 1.0) * r) * by_f
    r = r * by_r
    return r, d - r * change


@triton.jit
def relation_tile(base, i, j, i_valid, j_valid, i_norms, j_norms, features, BLOCK_K: tl.constexpr):
    """S and Δ of vectors i [I, 1] against vectors j [J, 1], both [I, J]."""
    similarity = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    difference = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for first in range(0, features, BLOCK_K):
        x, r, e = unit_triple(base, i, i_valid, i_norms, features, first, BLOCK_K)
        xj, rj, ej = unit_triple(base, j, j_valid, j_norms, features, first, BLOCK_K)
        similarity = tl.dot(x, tl.trans(xj), similarity, input_precision="ieee")
        difference = tl.dot(e, tl.trans(rj + ej), difference, input_precision="ieee")
        difference = tl.dot(r, tl.trans(ej), difference, input_precision="ieee")
    # One IEEE division: τ divides its rounding too.
    similarity = tl.div_rn(similarity, i_norms[0] * tl.trans(j_norms[0]))
    return unit_diagonal(similarity, difference, i == tl.trans(j), i_norms[4], i_norms[5])


@triton.jit
def store_gradient(grad, i, rows, features, first, value, unit, radial, scale):
    """grad[i, first:] = ``scale``·(ĝ - x̂·radial) for i < ``rows``, of BLOCK_K features from ``first`` on."""
    k = first + tl.arange(0, value.shape[1])[None, :]
    tl.store(grad + i * features + k, (value - unit * radial) * scale, mask=(i < rows) & (k < features))


@triton.jit
def relation_in_one_block(
    base, count, features, temperature, grad, grad_scale, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """L = (1/n) Σ KL among ``count`` ≤ BLOCK vectors; writes ``grad_scale``·∂L/∂x [count, K].

    Exactly 0, and gradient 0, with fewer than two valid vectors.
    """
    i = tl.arange(0, BLOCK)[:, None]
    valid = validity(base, i, count, features)
    n = tl.sum(tl.sum(valid.to(tl.float32), 1), 0)
    valid = unless_alone(valid, n)
    norms = feature_norms(base, i, valid, features, BLOCK_K)
    similarity, difference = relation_tile(base, i, i, valid, valid, norms, norms, features, BLOCK_K)
    kl, q_minus_p = divergence_rows(similarity, difference, valid, tl.trans(valid), temperature)
    g = q_minus_p / (temperature * tl.maximum(n, 1.0))
    g += tl.trans(g)
    radial = tl.where(norms[4], tl.sum(g * similarity, 1, keep_dims=True), 0.0)
    # x̂ and the last factor one norm each: 1/(n_i n_j) would leave float32's range.
    inverse = 1.0 / norms[0]
    for first in range(0, features, BLOCK_K):
        unit = features_of(base, i, valid, features, first, BLOCK_K) * inverse
        value = tl.dot(g, unit, input_precision="ieee")
        store_gradient(grad, i, count, features, first, value, unit, radial, grad_scale * inverse)
    return kl / tl.maximum(n, 1.0)
