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
def matrix(value):
    """[N, L] of [1, N, L], whose product all warps share; more matrices stay as they are."""
    if value.shape[0] == 1:
        return tl.reshape(value, [value.shape[1], value.shape[2]])
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
def zero_grams(G: tl.constexpr, N: tl.constexpr):
    if G == 1:
        return tl.zeros([N, N], tl.float32)
    else:
        return tl.zeros([G, N, N], tl.float32)


@triton.jit
def add_slices(value, SLICES: tl.constexpr):
    """[B, ...] of [B·SLICES, ...], in pairs."""
    for halving in tl.static_range(16):
        if SLICES >> halving > 1:
            pairs = tl.reshape(value, [value.shape[0] // 2, 2, value.shape[1], value.shape[2]])
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
def offsets(b, row, lane, stride_b, stride_f, step):
    """[G, N, L] of rows ``row`` of samples ``b`` [G], columns ``lane`` [G, 1, L]."""
    rows = b.to(tl.int64)[:, None, None] * stride_b + row.to(tl.int64)[None, :, None] * stride_f
    return rows + lane.to(tl.int64) * step


@triton.jit
def slice_lanes(SLICES: tl.constexpr, G: tl.constexpr, BLOCK_L: tl.constexpr):
    """The sample of each slice [G], and its columns [G, 1, L] of a tile."""
    L: tl.constexpr = BLOCK_L // SLICES
    g = tl.arange(0, G)
    return g // SLICES, (g % SLICES)[:, None, None] * L + tl.arange(0, L)[None, None, :]


@triton.jit
def store_means(means, value, valid, tile, per_run, lane, length, VEC: tl.constexpr, BLOCK_L: tl.constexpr):
    """The means over the ``valid`` rows of ``value`` [G, N, L], 0 elsewhere, to ``means`` at the columns of ``tile``."""
    mean = tl.sum(value, 1) / tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)
    start = tile % per_run * BLOCK_L
    lane = tl.reshape(lane, mean.shape)
    line = means + (tl.cast(tile // per_run, tl.int64) * length + start)
    tl.store(line + lane, mean, mask=lane // VEC < (length - start) // VEC)


@triton.jit
def add_scores(r, f, rr, pp, ff):
    """R, P and ‖f‖² with the products of tiles r and f [G, N, L]."""
    wide = f.to(tl.float32)
    high, low = two_parts(wide - r.to(tl.float32), r.dtype == tl.float16)
    ff += tl.sum(square_of(wide), 2)
    r, f, high, low = matrix(r), matrix(f), matrix(high), matrix(low)
    chain = add_product(low, f, add_product(low, r, add_product(high, f, product(high, r))))
    return flushed(product(r, r), rr), flushed(chain, pp), ff


@triton.jit
def whole_gram(value, SLICES: tl.constexpr):
    """[N, N] of the slices of one sample."""
    if SLICES > 1:
        value = add_slices(value, SLICES)
        value = tl.reshape(value, [value.shape[1], value.shape[2]])
    return value


@triton.jit
def student_gram(
    student, pooled, b, i, valid, first, last, runs, run_lines, length, x_b, x_f, x_c, x_h, x_w,
    SLICES: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """X [N, N] of tiles ``first : last`` of sample b; the time averages of x there to ``pooled``, if not None."""
    own, lane = slice_lanes(SLICES, SLICES, BLOCK_L)
    per_run = tl.cdiv(length, BLOCK_L)
    inner = offsets(own, i, lane, 0, x_f * VEC, x_w)
    rows = valid[None, :, None]
    xx = zero_grams(SLICES, BLOCK_N)
    coming = load_tile(
        student, inner, lane, rows, first, last, per_run, run_lines, length, b, x_b, x_c, x_h, x_w, VEC, BLOCK_L
    )
    for tile in range(first, last):
        x = coming
        coming = load_tile(
            student, inner, lane, rows, tile + 1, last, per_run, run_lines, length, b, x_b, x_c, x_h, x_w, VEC, BLOCK_L
        )
        if pooled is not None:
            line = pooled + b * (3 * runs.to(tl.int64) * length + 1)
            store_means(line, x.to(tl.float32), valid, tile, per_run, lane, length, VEC, BLOCK_L)
        xx = flushed(product(matrix(x), matrix(x)), xx)
    return whole_gram(xx, SLICES)


@triton.jit
def score_grams(
    real, fake, pooled, b, i, valid, first, last, runs, run_lines, length,
    r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w,
    SLICES: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """R, T [N, N] and ‖f‖² [N] of tiles ``first : last``; the time averages of r and d to ``pooled``, if not None."""
    own, lane = slice_lanes(SLICES, SLICES, BLOCK_L)
    per_run = tl.cdiv(length, BLOCK_L)
    inner_r = offsets(own, i, lane, 0, r_f * VEC, r_w)
    inner_f = offsets(own, i, lane, 0, f_f * VEC, f_w)
    rows = valid[None, :, None]
    rr = zero_grams(SLICES, BLOCK_N)
    pp = zero_grams(SLICES, BLOCK_N)
    ff = tl.zeros([SLICES, BLOCK_N], tl.float32)
    coming_r = load_tile(
        real, inner_r, lane, rows, first, last, per_run, run_lines, length, b, r_b, r_c, r_h, r_w, VEC, BLOCK_L
    )
    coming_f = load_tile(
        fake, inner_f, lane, rows, first, last, per_run, run_lines, length, b, f_b, f_c, f_h, f_w, VEC, BLOCK_L
    )
    for tile in range(first, last):
        r, f = coming_r, coming_f
        coming_r = load_tile(
            real, inner_r, lane, rows, tile + 1, last, per_run, run_lines, length, b, r_b, r_c, r_h, r_w, VEC, BLOCK_L
        )
        coming_f = load_tile(
            fake, inner_f, lane, rows, tile + 1, last, per_run, run_lines, length, b, f_b, f_c, f_h, f_w, VEC, BLOCK_L
        )
        if pooled is not None:
            features = runs.to(tl.int64) * length
            line = pooled + b * (3 * features + 1) + features
            wide = r.to(tl.float32)
            store_means(line, wide, valid, tile, per_run, lane, length, VEC, BLOCK_L)
            d = difference_of(wide, f.to(tl.float32))
            store_means(line + features, d, valid, tile, per_run, lane, length, VEC, BLOCK_L)
        rr, pp, ff = add_scores(r, f, rr, pp, ff)
    tt = whole_gram(pp, SLICES)
    ff = tl.sum(ff, 0)
    return whole_gram(rr, SLICES), 0.5 * (tt + tl.trans(tt)), ff
