"""The relation of N long vectors from their Gram matrices: loss and M.

From X = x xᵀ, R = r rᵀ, T = d mᵀ + m dᵀ (d = f - r, m = (r + f)/2) and ‖f‖², with a_i² = R_ii, b_i = ‖f_i‖,
k_i = b_i - a_i = T_ii/(a_i + b_i):

    S_ij = X_ij/(n_i n_j)        Δ_ij = (T_ij - R_ij/(a_i a_j)·(k_i a_j + b_i k_j)) / (b_i b_j)

and the loss, G, and M with ∂L/∂x = M x as in ``codmd.reference``. The matrices are packed upper triangles.
"""

import triton
import triton.language as tl

from ..blocks import (
    LEAST_OF_GRAMS,
    NORM_FLOOR,
    at_least_floor,
    frame_validity,
    norm_of,
    store_tile,
    unit_diagonal,
    unless_alone,
    unless_lost,
)
from ..divergence import divergence_rows


@triton.jit
def add_pieces(total, pieces, first, last, size, step, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """total[:size] = Σ pieces[p·step : p·step + size] for first ≤ p < last, at most MOST of them, in order."""
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.zeros([BLOCK], tl.float32)
        for piece in tl.static_range(MOST):
            own = pieces + tl.cast(first + piece, tl.int64) * step
            value += tl.load(own + at, mask=tl.where(at < size, first + piece, last) < last, other=0.0)
        tl.store(total + at, value, mask=at < size)


@triton.jit
def triangle(i, j, count):
    """Where (i, j), i ≤ j, lies in a packed upper triangle of ``count`` rows."""
    return i * (2 * count - i - 1) // 2 + j


@triton.jit
def gram_norms(grams, i, count):
    """1/n_x, a, b, k of vectors i; whether ‖x‖ reaches the floor, f = r + d has digits, ‖r‖ and ‖f‖ reach the floor."""
    inside = i < count
    diagonal = triangle(i, i, count)
    half = count * (count + 1) // 2
    t = tl.load(grams + 2 * half + diagonal, mask=inside, other=0.0)
    x_norm = norm_of(tl.load(grams + diagonal, mask=inside, other=1.0))
    r_norm = norm_of(tl.load(grams + half + diagonal, mask=inside, other=1.0))
    f_norm = norm_of(tl.load(grams + 3 * half + i, mask=inside, other=1.0))
    f_kept = f_norm >= LEAST_OF_GRAMS * r_norm
    f_norm = unless_lost(f_norm, r_norm, LEAST_OF_GRAMS)
    a, b = at_least_floor(r_norm), at_least_floor(f_norm)
    k = t / tl.maximum(r_norm + f_norm, NORM_FLOOR)
    clamped = (r_norm < NORM_FLOOR) | (f_norm < NORM_FLOOR)
    return tl.div_rn(1.0, at_least_floor(x_norm)), a, b, k, x_norm >= NORM_FLOOR, f_kept, clamped == 0


@triton.jit
def too_small(grams, j, j_valid, count):
    """Whether the scores are so small throughout that their squares left float32; zeros are not."""
    half = count * (count + 1) // 2
    squares = tl.load(grams + half + triangle(j, j, count), mask=j_valid, other=0.0)
    squares = tl.maximum(squares, tl.load(grams + 3 * half + j, mask=j_valid, other=0.0))
    largest = tl.max(tl.max(squares, 1), 0)
    return (largest > 0.0) & (largest < 1e-30)


@triton.jit
def load_square(grams, count, BLOCK: tl.constexpr):
    """A matrix [BLOCK, BLOCK] from its packed upper triangle; 0 outside.

    Columns of a thread are eight apart, so that a sum over a row takes three shuffles.
    """
    i = tl.arange(0, BLOCK)[None, :, None]
    j = tl.arange(0, BLOCK // 8)[:, None, None] * 8 + tl.arange(0, 8)[None, None, :]
    at = triangle(tl.minimum(i, j), tl.maximum(i, j), count)
    value = tl.load(grams + at, mask=(i < count) & (j < count), other=0.0)
    return tl.reshape(tl.permute(value, (1, 0, 2)), [BLOCK, BLOCK])


@triton.jit
def gram_rows(
    grams, i, j, i_valid, j_valid, j_norms, n, count, temperature, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """Σ KL of rows i [I, 1] against columns j [1, J]; G and S [I, J]; 1/n_x of the rows, and whether ‖x‖ is free."""
    half = count * (count + 1) // 2
    j_x, j_a, j_b, j_k, _j_x_free, j_f_kept, j_free = j_norms
    i_x, i_a, i_b, i_k, x_free, i_f_kept, i_free = gram_norms(grams, i, count)
    if BLOCK_I == BLOCK_J:
        x = load_square(grams, count, BLOCK_J)
        r = load_square(grams + half, count, BLOCK_J)
        t = load_square(grams + 2 * half, count, BLOCK_J)
    else:
        at = triangle(tl.minimum(i, j), tl.maximum(i, j), count)
        inside = (i < count) & (j < count)
        x = tl.load(grams + at, mask=inside, other=0.0)
        r = tl.load(grams + half + at, mask=inside, other=0.0)
        t = tl.load(grams + 2 * half + at, mask=inside, other=0.0)
    similarity = (x * i_x) * j_x
    r_cosine = r / i_a / j_a
    difference = (t - r_cosine * (i_k * j_a + i_b * j_k)) / i_b / j_b
    # An f without digits counts as zero far under the floor, and has a NaN for its norm elsewhere.
    f_cosine = tl.where(i_f_kept & j_f_kept, (r + t) / i_b / j_b, 0.0 * i_b * j_b)
    difference = tl.where(i_free & j_free, difference, f_cosine - r_cosine)
    similarity, difference = unit_diagonal(similarity, difference, i == j, x_free, i_free)
    i_valid = tl.broadcast_to(i_valid, [BLOCK_I, BLOCK_J])
    kl, q_minus_p = divergence_rows(similarity, difference, i_valid, j_valid, temperature)
    return kl, q_minus_p / (temperature * tl.maximum(n, 1.0)), similarity, i_x, x_free


@triton.jit
def relation_of_grams(
    grams, frame_mask, sample, count, mask_b, mask_f, temperature, scratch, matrix, scale,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """L = (1/n) Σ KL from X, R, T (upper triangles) and ‖f‖²; writes ``scale``·M [count, count].

    BLOCK_I rows at a time. Fewer than all of BLOCK_J leave G and its row and column sums of G∘S in ``scratch``
    [count + 2, count].
    """
    j = tl.arange(0, BLOCK_J)[None, :]
    j_valid = frame_validity(frame_mask, sample, j, count, mask_b, mask_f)
    n = tl.sum(tl.sum(j_valid.to(tl.float32), 1), 0)
    j_valid = unless_alone(j_valid, n)
    temperature = tl.where(too_small(grams, j, j_valid, count), float("nan"), temperature)
    j_norms = gram_norms(grams, j, count)
    j_x = j_norms[0]
    if BLOCK_I == BLOCK_J:
        i = tl.arange(0, BLOCK_I)[:, None]
        i_valid = unless_alone(frame_validity(frame_mask, sample, i, count, mask_b, mask_f), n)
        kl, g, similarity, i_x, free = gram_rows(
            grams, i, j, i_valid, j_valid, j_norms, n, count, temperature, BLOCK_I, BLOCK_J
        )
        h = g + tl.trans(g)
        radial = tl.where(free & (i == j), tl.sum(h * similarity, 1, keep_dims=True), 0.0)
        store_tile(matrix, i, j, count, count, (h - radial) * i_x * j_x * scale)
    else:
        row_radial = scratch + count * count
        column_radial = row_radial + count
        kl = 0.0
        column_sum = tl.zeros([1, BLOCK_J], tl.float32)
        for start in range(0, count, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)[:, None]
            i_valid = unless_alone(frame_validity(frame_mask, sample, i, count, mask_b, mask_f), n)
            block_kl, g, similarity, _i_x, _free = gram_rows(
                grams, i, j, i_valid, j_valid, j_norms, n, count, temperature, BLOCK_I, BLOCK_J
            )
            store_tile(scratch, i, j, count, count, g)
            tl.store(row_radial + i, tl.sum(g * similarity, 1, keep_dims=True), mask=i < count)
            column_sum += tl.sum(g * similarity, 0, keep_dims=True)
            kl += block_kl
        tl.store(column_radial + j, column_sum, mask=j < count)
        # All threads wrote the scratch and all read it.
        tl.debug_barrier()
        for start in range(0, count, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)[:, None]
            spread = i + tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
            inside = (spread < count) & (j < count)
            i_x, _i_a, _i_b, _i_k, free, _i_f_kept, _i_free = gram_norms(grams, i, count)
            h = tl.load(scratch + spread * count + j, mask=inside, other=0.0)
            h += tl.load(scratch + j * count + spread, mask=inside, other=0.0)
            radial = tl.load(row_radial + i, mask=i < count, other=0.0)
            radial += tl.load(column_radial + i, mask=i < count, other=0.0)
            radial = tl.where(free & (spread == j), radial, 0.0)
            store_tile(matrix, i, j, count, count, (h - radial) * i_x * j_x * scale)
    return kl / tl.maximum(n, 1.0)
