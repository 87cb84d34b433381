"""KL(p_i ‖ q_i) of relation rows and q - p in the centred form, on register tiles.

p = softmax_row((S - Δ)/τ), q = softmax_row(S/τ). With δ = Δ/τ, x = Σ q δ - δ, log Z = log1p(Σ q (e^x - 1 - x))
and y = x - log Z = log p - log q:  KL = Σ (p - q)·x - log Z  and  p - q = q·expm1(y).
No term cancels when Δ is small. Equal to ``codmd.reference.divergence``. Divisions by τ and by the mass are IEEE: an
error of two units in S/τ is an error of two units in every probability.
"""

import triton
import triton.language as tl

EXPONENT_LIMIT = tl.constexpr(20.0)


@triton.jit
def expm1_minus(x):
    """e^x - 1 - x: a Taylor series for |x| < 1, where the direct form cancels."""
    small = tl.minimum(tl.maximum(x, -1.0), 1.0)
    series = 1.0 + small * (1.0 / 13)
    for n in tl.static_range(10):
        series = 1.0 + small * (1.0 / (12 - n)) * series
    return tl.where(tl.abs(x) < 1.0, 0.5 * small * small * series, tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1."""
    return tl.where(tl.abs(x) < 1.0, x + expm1_minus(x), tl.exp(x) - 1.0)


@triton.jit
def log1p(z):
    """log(1 + z) for z > -1: 2·artanh(z / (2 + z)) as a series for |z| < 0.5."""
    s = z / (2.0 + z)
    square = s * s
    series = 1.0 + square * (
        1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9 + square * (1.0 / 11 + square / 13))))
    )
    return tl.where(tl.abs(z) < 0.5, 2.0 * s * series, tl.log(1.0 + z))


@triton.jit
def divergence_rows(similarity, difference, row_valid, column_valid, temperature):
    """Sum of KL over the valid rows, and q - p [I, J] (0 outside valid pairs).

    Args:
        similarity: S(x) [I, J] float32.
        difference: Δ [I, J] float32.
        row_valid: [I, 1] bool, or [I, J] and equal along a row.
        column_valid: [1, J] bool; at least one is set wherever a row is valid.
        temperature: τ > 0.
    """
    pair = row_valid & column_valid
    logits = tl.where(column_valid, tl.div_rn(similarity, temperature), -float("inf"))
    logits = tl.where(row_valid, logits, 0.0)
    logits -= tl.max(logits, 1, keep_dims=True)
    weight = tl.exp(logits)
    mass = tl.sum(weight, 1, keep_dims=True)
    q = tl.div_rn(weight, mass)
    delta = tl.where(pair, difference / temperature, 0.0)
    x = tl.sum(q * delta, 1, keep_dims=True) - delta
    t = logits - tl.log(mass) + x
    t_max = tl.max(t, 1, keep_dims=True)
    beyond = t_max > EXPONENT_LIMIT
    excess = tl.where(x <= EXPONENT_LIMIT, q * expm1_minus(tl.minimum(x, EXPONENT_LIMIT)), tl.exp(t) - q * (1.0 + x))
    tail = t_max + tl.log(tl.sum(tl.exp(t - t_max), 1, keep_dims=True))
    log_z = tl.where(beyond, tail, log1p(tl.sum(excess, 1, keep_dims=True)))
    y = x - log_z
    p = tl.exp(t - log_z)
    p_minus_q = tl.where(y < EXPONENT_LIMIT, q * expm1(tl.minimum(y, EXPONENT_LIMIT)), p - q)
    direct = tl.sum(tl.where(p == 0.0, 0.0, p * y), 1, keep_dims=True)
    kl = tl.where(beyond, direct, tl.sum(p_minus_q * x, 1, keep_dims=True) - log_z)
    # A row's KL is entered once, in its first column.
    once = row_valid & (tl.arange(0, similarity.shape[1])[None, :] == 0)
    kl = tl.sum(tl.sum(tl.where(once, kl, 0.0), 1), 0)
    return kl, tl.where(pair, -p_minus_q, 0.0)
