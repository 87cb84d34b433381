"""Gram matrices of bfloat16 and float16 vectors on tensor cores, added tile by tile along the long axis.

A product of two such numbers is exact in float32, so X = x xᵀ and R = r rᵀ take one product of matrices each. d = f - r
has more than their p = 8 or 11 significant bits. With d₀ = d rounded to p bits and d₁ = d - d₀ rounded to p bits,

    P = (d₀ + d₁)(r + f)ᵀ        T = d mᵀ + m dᵀ = (P + Pᵀ)/2        m = (r + f)/2

takes four. What the two parts leave of d:

* Nothing where |f| and |r| are within 2ᵖ of each other. With exponents e ≥ e' of the larger and the smaller, d is a
  multiple of 2^(e' - p + 1) of at most e - e' + p + 1 bits, and |d - d₀| ≤ 2^(e + 1 - p), which has p bits while
  e - e' ≤ p. A critic that tracks its teacher loses no bit.
* At most 2^-(2p + 1)|d| elsewhere, 2^-17 or 2^-23: |d - d₀| ≤ 2^-p 2^e and half a unit of its own p bits is left. The
  roundings are to nearest, so that T_ij is off by less than 2^-17 ‖d_i‖‖m_j‖ each way, and by about 2^-18/√K of it in
  K columns. A float32 sum of 128 products may be as far off, and a third part would not be seen.

Tensor cores truncate when they add. So a chain of products ends with its tile, and its sum is added to the running one
in float32, by an FMA, which the compiler does not fold back into the chain.

Columns of a tile lie in slices, one for each warp: a matrix [G, N, L] a slice, whose products no other warp repeats.
"""

import triton
import triton.language as tl

from ..blocks import INTERPRETED, difference_of, square_of
from .stream import tile_address

LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def rounded_bits(value):
    """Bits of a float32 rounded to the 8 significant bits of bfloat16, which are the upper half. A NaN may be lost."""
    return value.to(tl.int32, bitcast=True) + 0x8000


@triton.jit
def upper_half(bits):
    """The bfloat16 that is the upper half of ``bits``; float32 of its value in the interpreter."""
    if INTERPRETED:
        return (bits & -0x10000).to(tl.float32, bitcast=True)
    else:
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def two_parts(d, HALF: tl.constexpr):
    """d₀ and d₁, float16 if HALF, else bfloat16; where d is not finite, neither is d₁.

    f - r of float16 may pass the largest of them by as much again. There d₁ is what is left, which has 11 bits: it is a
    multiple of the smaller one's unit and not larger than the smaller one.
    """
    if HALF:
        high = tl.minimum(tl.maximum(d, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)
        return high, (d - high.to(tl.float32)).to(tl.float16)
    else:
        bits = rounded_bits(d)
        rest = d - (bits & -0x10000).to(tl.float32, bitcast=True)
        return upper_half(bits), upper_half(rounded_bits(rest))


@triton.jit
def operand(value):
    """``value`` for a product: float32 in the interpreter, which has no arithmetic in bfloat16."""
    if INTERPRETED:
        return value.to(tl.float32)
    else:
        return value


@triton.jit
def matrices(value):
    """[G, N, L] of up to 32 rows as they are, a matrix a warp; of more rows all of them, [G·N, L], for all warps."""
    if value.shape[1] > 32:
        return tl.reshape(value, [value.shape[0] * value.shape[1], value.shape[2]])
    else:
        return value


@triton.jit
def transposed(value):
    if len(value.shape) == 3:
        return tl.permute(value, (0, 2, 1))
    else:
        return tl.trans(value)


@triton.jit
def product(a, b):
    """a bᵀ, from zero on."""
    return tl.dot(operand(a), transposed(operand(b)))


@triton.jit
def add_product(a, b, chain):
    return tl.dot(operand(a), transposed(operand(b)), chain)


@triton.jit
def flushed(chain, total):
    """``total`` + ``chain``, in float32."""
    return tl.fma(chain, 1.0, total)


@triton.jit
def unit_matrix(G: tl.constexpr, N: tl.constexpr, L: tl.constexpr):
    at = tl.arange(0, L)
    unit = (at[:, None] == at[None, :]).to(tl.float32)
    if N > 32:
        return unit
    else:
        return tl.broadcast_to(unit[None, :, :], [G, L, L])


@triton.jit
def row_means(chain, count, G: tl.constexpr):
    """[G, L] of products with the unit matrix, in which a warp has a matrix's rows together: few shuffles are left."""
    N: tl.constexpr = chain.shape[0] // G if len(chain.shape) == 2 else chain.shape[1]
    return tl.sum(tl.reshape(chain, [G, N, chain.shape[len(chain.shape) - 1]]), 1) / count


@triton.jit
def zero_grams(G: tl.constexpr, N: tl.constexpr):
    """Grams of :func:`matrices` [G, N, L]."""
    if N > 32:
        return tl.zeros([G * N, G * N], tl.float32)
    else:
        return tl.zeros([G, N, N], tl.float32)


@triton.jit
def sample_grams(value, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr):
    """[B, N, N] of what :func:`zero_grams` began: slices are added in pairs, rows of two samples left out."""
    if BLOCK_N > 32:
        value = tl.reshape(value, [BLOCK_B, BLOCK_N, BLOCK_B, BLOCK_N])
        b = tl.arange(0, BLOCK_B)
        same = b[:, None, None, None] == b[None, None, :, None]
        value = tl.sum(tl.where(same, value, 0.0), 2)
    else:
        for halving in tl.static_range(5):
            if SLICES >> halving > 1:
                pairs = tl.reshape(value, [value.shape[0] // 2, 2, BLOCK_N, BLOCK_N])
                even, odd = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
                value = even + odd
    return value


@triton.jit
def load_tile(
    base, inner, lane, rows, tile, last, per_run, run_lines, length, b, s_b, s_c, s_h, step,
    VEC: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``base`` [G, N, L] at offsets ``inner`` from the start of ``tile``; 0 outside and from tile ``last`` on."""
    start = tile % per_run * BLOCK_L
    at = tile_address(base, tile, per_run, run_lines, b, s_b, s_c, s_h, VEC) + start.to(tl.int64) * step
    vectors = tl.where(tile < last, (length - start) // VEC, 0)
    return tl.load(at + inner, mask=rows & (lane // VEC < vectors), other=0.0)


@triton.jit
def lanes(G: tl.constexpr, SLICES: tl.constexpr, BLOCK_L: tl.constexpr):
    """Columns [G, 1, L] of a tile that the slices take."""
    L: tl.constexpr = BLOCK_L // SLICES
    return (tl.arange(0, G) % SLICES)[:, None, None] * L + tl.arange(0, L)[None, None, :]


@triton.jit
def offsets(own, row, lane, stride_b, stride_f, step):
    """[G, N, L] of rows ``row`` of samples ``own`` [G], columns ``lane`` [G, 1, L]."""
    rows = own.to(tl.int64)[:, None, None] * stride_b + row.to(tl.int64)[None, :, None] * stride_f
    return rows + lane.to(tl.int64) * step


@triton.jit
def store_means(pooled, mean, tile, per_run, lane, length, VEC: tl.constexpr, BLOCK_L: tl.constexpr):
    """``mean`` [G, L] to ``pooled`` at the columns of ``tile``."""
    start = tile % per_run * BLOCK_L
    lane = tl.reshape(lane, mean.shape)
    line = pooled + (tl.cast(tile // per_run, tl.int64) * length + start)
    tl.store(line + lane, mean, mask=lane // VEC < (length - start) // VEC)


@triton.jit
def outer(a, b, BLOCK_B: tl.constexpr):
    """a_i b_j for every column, [B, B, columns], of [G, L]: B² numbers a column are too few for a dot."""
    a = tl.reshape(a, [BLOCK_B, a.shape[0] // BLOCK_B * a.shape[1]])
    b = tl.reshape(b, a.shape)
    return a[:, None, :] * b[None, :, :]


@triton.jit
def student_grams(
    student, pooled, sample, own, lane, i, valid, first, last, runs, run_lines, length, x_b, x_f, x_c, x_h, x_w,
    SLICES: tl.constexpr, VEC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    FRAMES: tl.constexpr,
):  # fmt: skip
    """X of the frames [B, N, N] and of the time averages [B, B], columns of tiles ``first : last``.

    Slice g is of sample ``sample`` + ``own`` [G], columns ``lane`` [G, 1, L] of a tile, rows ``valid`` [G, N]. Where
    ``pooled`` is not None the averages go there instead, of one sample.
    """
    per_run = tl.cdiv(length, BLOCK_L)
    count = tl.maximum(tl.sum(valid.to(tl.float32), 1), 1.0)[:, None]
    at = offsets(own, i, lane, x_b * VEC, x_f * VEC, x_w)
    rows = valid[:, :, None]
    G: tl.constexpr = BLOCK_B * SLICES
    L: tl.constexpr = BLOCK_L // SLICES
    xx = zero_grams(G, BLOCK_N)
    averages_xx = tl.zeros([BLOCK_B, BLOCK_B, BLOCK_L], tl.float32)
    unit = unit_matrix(G, BLOCK_N, L).to(student.dtype.element_ty)
    x = load_tile(
        student, at, lane, rows, first, last, per_run, run_lines, length, sample, x_b, x_c, x_h, x_w, VEC, BLOCK_L
    )
    coming = load_tile(
        student, at, lane, rows, first + 1, last, per_run, run_lines, length, sample, x_b, x_c, x_h, x_w, VEC, BLOCK_L
    )
    for tile in range(first, last):
        later = load_tile(
            student, at, lane, rows, tile + 2, last, per_run, run_lines, length, sample, x_b, x_c, x_h, x_w,
            VEC, BLOCK_L,
        )  # fmt: skip
        x = matrices(x)
        if pooled is not None or BLOCK_B > 1:
            average = row_means(product(x, unit), count, G)
        if pooled is not None:
            line = pooled + sample * (3 * runs.to(tl.int64) * length + 1)
            store_means(line, average, tile, per_run, lane, length, VEC, BLOCK_L)
        if BLOCK_B > 1:
            averages_xx += outer(average, average, BLOCK_B)
        if FRAMES:
            xx = flushed(product(x, x), xx)
        x, coming = coming, later
    return sample_grams(xx, BLOCK_B, BLOCK_N, SLICES), tl.sum(averages_xx, 2)


@triton.jit
def score_grams(
    real, fake, pooled, sample, own, lane, i, valid, first, last, runs, run_lines, length,
    r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w,
    SLICES: tl.constexpr, VEC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    FRAMES: tl.constexpr,
):  # fmt: skip
    """R, T, ‖f‖² of the frames [B, N, N], [B, N] and of the time averages [B, B], [B]; else as :func:`student_grams`."""
    per_run = tl.cdiv(length, BLOCK_L)
    count = tl.maximum(tl.sum(valid.to(tl.float32), 1), 1.0)[:, None]
    at_r = offsets(own, i, lane, r_b * VEC, r_f * VEC, r_w)
    at_f = offsets(own, i, lane, f_b * VEC, f_f * VEC, f_w)
    rows = valid[:, :, None]
    G: tl.constexpr = BLOCK_B * SLICES
    L: tl.constexpr = BLOCK_L // SLICES
    rr, pp = zero_grams(G, BLOCK_N), zero_grams(G, BLOCK_N)
    ff = tl.zeros([G, BLOCK_N, L // 8], tl.float32)
    averages_rr = tl.zeros([BLOCK_B, BLOCK_B, BLOCK_L], tl.float32)
    averages_tt = tl.zeros([BLOCK_B, BLOCK_B, BLOCK_L], tl.float32)
    averages_ff = tl.zeros([G, L], tl.float32)
    unit = unit_matrix(G, BLOCK_N, L).to(real.dtype.element_ty)
    r = load_tile(
        real, at_r, lane, rows, first, last, per_run, run_lines, length, sample, r_b, r_c, r_h, r_w, VEC, BLOCK_L
    )
    f = load_tile(
        fake, at_f, lane, rows, first, last, per_run, run_lines, length, sample, f_b, f_c, f_h, f_w, VEC, BLOCK_L
    )
    coming_r = load_tile(
        real, at_r, lane, rows, first + 1, last, per_run, run_lines, length, sample, r_b, r_c, r_h, r_w, VEC, BLOCK_L
    )
    coming_f = load_tile(
        fake, at_f, lane, rows, first + 1, last, per_run, run_lines, length, sample, f_b, f_c, f_h, f_w, VEC, BLOCK_L
    )
    for tile in range(first, last):
        later_r = load_tile(
            real, at_r, lane, rows, tile + 2, last, per_run, run_lines, length, sample, r_b, r_c, r_h, r_w,
            VEC, BLOCK_L,
        )  # fmt: skip
        later_f = load_tile(
            fake, at_f, lane, rows, tile + 2, last, per_run, run_lines, length, sample, f_b, f_c, f_h, f_w,
            VEC, BLOCK_L,
        )  # fmt: skip
        wide = f.to(tl.float32)
        if pooled is not None or BLOCK_B > 1:
            d = difference_of(r.to(tl.float32), wide)
        else:
            d = wide - r.to(tl.float32)
        high, low = two_parts(d, r.dtype == tl.float16)
        r, f, high, low = matrices(r), matrices(f), matrices(high), matrices(low)
        if pooled is not None or BLOCK_B > 1:
            mean_r = row_means(product(r, unit), count, G)
            mean_d = row_means(add_product(low, unit, product(high, unit)), count, G)
        if pooled is not None:
            features = runs.to(tl.int64) * length
            line = pooled + sample * (3 * features + 1) + features
            store_means(line, mean_r, tile, per_run, lane, length, VEC, BLOCK_L)
            store_means(line + features, mean_d, tile, per_run, lane, length, VEC, BLOCK_L)
        if BLOCK_B > 1:
            averages_rr += outer(mean_r, mean_r, BLOCK_B)
            averages_tt += outer(mean_d, mean_r + 0.5 * mean_d, BLOCK_B)
            averages_ff += square_of(mean_r + mean_d)
        if FRAMES:
            ff += tl.sum(tl.reshape(square_of(wide), [G, BLOCK_N, L // 8, 8]), 3)
            rr = flushed(product(r, r), rr)
            pp = flushed(add_product(low, f, add_product(low, r, add_product(high, f, product(high, r)))), pp)
        r, f, coming_r, coming_f = coming_r, coming_f, later_r, later_f
    pp = sample_grams(pp, BLOCK_B, BLOCK_N, SLICES)
    averages_tt = tl.sum(averages_tt, 2)
    return (
        sample_grams(rr, BLOCK_B, BLOCK_N, SLICES),
        0.5 * (pp + tl.permute(pp, (0, 2, 1))),
        tl.sum(tl.reshape(tl.sum(ff, 2), [BLOCK_B, SLICES, BLOCK_N]), 1),
        tl.sum(averages_rr, 2),
        averages_tt + tl.trans(averages_tt),
        tl.sum(tl.reshape(averages_ff, [BLOCK_B, BLOCK_L]), 1),
    )
