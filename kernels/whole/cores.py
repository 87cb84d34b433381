"""Whole latents of bfloat16 and float16 on tensor cores: exact products of parts, sums in float32.

A product of two such numbers is exact in float32, so X = x xᵀ and R = r rᵀ take one product of matrices. d = f - r has
more than their p = 8 or 11 significant bits, and takes two parts: d₀, d rounded to p bits, and d₁ = d - d₀.

    P = (d₀ + d₁)(r + f)ᵀ        T = d mᵀ + m dᵀ = (P + Pᵀ)/2        m = (r + f)/2

**d₀ + d₁ = d, exactly.** Rounding a sum of two numbers of p bits to p bits, to nearest, leaves a number of p bits
(Dekker 1971; truncation leaves more). d is f - r rounded to float32, by 2^-24 of it where |f| and |r| are so far apart,
and then d₁ is the smaller of them to fewer bits. So T has the error of float32 sums of exact products, and a third part
would be zero. The range of float16 is short: beyond its largest number d₀ is that, and d₁, the rest, is no larger than
the smaller score and a multiple of its unit.

**Sums.** Tensor cores truncate when they add. So a chain of products ends with its tile, of at most 128 columns, and
its sum goes to the running one in float32, rounded to nearest. That takes an FMA: an addition would be folded back into
the chain by the compiler. :mod:`benchmarks.static` counts chains that do not start at zero.

**Tiles.** Columns lie in slices, one for each warp: up to 32 rows a slice is a matrix of its own [G, N, L], whose
products no other warp repeats, and slices are added once, at the end. The next tile is on its way
meanwhile, unless every element has an address of its own, which takes the registers.

The gradient's M, float32, takes two parts as well, which leave 2^-17 (2^-23) of it, under the rounding of the result.
"""

import triton
import triton.language as tl

from ..blocks import INTERPRETED, difference_of, square_of

LARGEST_HALF = tl.constexpr(65504.0)
LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)
"""Of float32: no sum of squares that are not all zero is less."""


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
    """d₀ and d₁, float16 if HALF, else bfloat16; where d is not finite, neither is d₁."""
    if HALF:
        high = tl.minimum(tl.maximum(d, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)
        return high, (d - high.to(tl.float32)).to(tl.float16)
    else:
        bits = rounded_bits(d)
        rest = d - (bits & -0x10000).to(tl.float32, bitcast=True)
        return upper_half(bits), upper_half(rounded_bits(rest))


@triton.jit
def scaled_parts(value, HALF: tl.constexpr):
    """Two parts of a float32 tensor, and the scale of their sum.

    In float16 the largest element is a power of two away from 2¹⁴ to 2¹⁵, for its range is short.
    """
    scale = 1.0
    if HALF:
        largest = tl.max(tl.reshape(tl.abs(value), [value.numel]), 0)
        exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 15)
        value *= ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    high, low = two_parts(value, HALF)
    return high, low, scale


@triton.jit
def operand(value):
    """``value`` for a product: float32 in the interpreter, which has no arithmetic in bfloat16."""
    if INTERPRETED:
        return value.to(tl.float32)
    else:
        return value


@triton.jit
def matrices(value):
    """[G, N, L] of up to 32 rows as they are, a matrix a warp; of more rows the only one, [N, L], for all warps."""
    if value.shape[1] > 32:
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
def unit_matrix(G: tl.constexpr, N: tl.constexpr, L: tl.constexpr):
    at = tl.arange(0, L)
    unit = (at[:, None] == at[None, :]).to(tl.float32)
    if N > 32:
        return unit
    else:
        return tl.broadcast_to(unit[None, :, :], [G, L, L])


@triton.jit
def row_means(chain, count):
    """[G, L] of products with the unit matrix, in which a warp has a matrix's rows together: few shuffles are left."""
    if len(chain.shape) == 2:
        chain = tl.reshape(chain, [1, chain.shape[0], chain.shape[1]])
    return tl.sum(chain, 1) / count


@triton.jit
def zero_grams(G: tl.constexpr, N: tl.constexpr):
    """Grams of :func:`matrices` [G, N, L]."""
    if N > 32:
        return tl.zeros([N, N], tl.float32)
    else:
        return tl.zeros([G, N, N], tl.float32)


@triton.jit
def applied(a, x):
    """a x of matrices [G, M, N] and [G, N, L]."""
    return tl.dot(operand(a), operand(x))


@triton.jit
def applied_parts(high, low, x):
    """(``high`` + ``low``) x of matrices [G, N, N] and [G, N, L]. All warps share the product of a single one."""
    if x.shape[0] == 1:
        high = operand(tl.reshape(high, [high.shape[1], high.shape[2]]))
        low = operand(tl.reshape(low, [low.shape[1], low.shape[2]]))
        flat = operand(tl.reshape(x, [x.shape[1], x.shape[2]]))
        value = tl.dot(high, flat, tl.dot(low, flat))
        return tl.reshape(value, [1, value.shape[0], value.shape[1]])
    else:
        return tl.dot(operand(high), operand(x), applied(low, x))


@triton.jit
def sample_grams(value, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr):
    """[B, N, N] of what :func:`zero_grams` began; slices are added in pairs."""
    if BLOCK_N > 32:
        value = tl.reshape(value, [BLOCK_B, BLOCK_N, BLOCK_N])
    else:
        for halving in tl.static_range(5):
            if SLICES >> halving > 1:
                pairs = tl.reshape(value, [value.shape[0] // 2, 2, BLOCK_N, BLOCK_N])
                even, odd = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
                value = even + odd
    return value


@triton.jit
def place(tile, length, JOINED: tl.constexpr, BLOCK_L: tl.constexpr):
    """Run and first column of a tile; JOINED: there is one run."""
    if JOINED:
        return 0, tile * BLOCK_L
    else:
        per_run = tl.cdiv(length, BLOCK_L)
        return tile // per_run, tile % per_run * BLOCK_L


@triton.jit
def load_tile(
    base, inner, lane, rows, tile, last, run_lines, length, s_c, s_h, step,
    JOINED: tl.constexpr, VEC: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``base`` [G, N, L] at offsets ``inner`` from the start of ``tile``; 0 outside and from tile ``last`` on."""
    run, start = place(tile, length, JOINED, BLOCK_L)
    at = base + tl.cast(start, tl.int64) * step
    if not JOINED:
        at += ((run // run_lines).to(tl.int64) * s_c + (run % run_lines).to(tl.int64) * s_h) * VEC
    vectors = tl.where(tile < last, (length - start) // VEC, 0)
    return tl.load(at + inner, mask=rows & (lane // VEC < vectors), other=0.0)


@triton.jit
def store_tile(
    base, inner, value, lane, rows, tile, run_lines, length, s_c, s_h, step,
    JOINED: tl.constexpr, VEC: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``value`` [G, N, L] where :func:`load_tile` reads."""
    run, start = place(tile, length, JOINED, BLOCK_L)
    at = base + tl.cast(start, tl.int64) * step
    if not JOINED:
        at += ((run // run_lines).to(tl.int64) * s_c + (run % run_lines).to(tl.int64) * s_h) * VEC
    tl.store(at + inner, value, mask=rows & (lane // VEC < (length - start) // VEC))


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
def store_means(
    pooled, mean, tile, lane, length, JOINED: tl.constexpr, VEC: tl.constexpr, BLOCK_L: tl.constexpr
):  # fmt: skip
    """``mean`` [G, L] to ``pooled`` at the columns of ``tile``."""
    run, start = place(tile, length, JOINED, BLOCK_L)
    lane = tl.reshape(lane, mean.shape)
    line = pooled + (tl.cast(run, tl.int64) * length + start)
    tl.store(line + lane, mean, mask=lane // VEC < (length - start) // VEC)


@triton.jit
def outer(a, b, BLOCK_B: tl.constexpr):
    """a_i b_j for every column, [B, B, columns], of [G, L]: B² numbers a column are too few for a dot."""
    a = tl.reshape(a, [BLOCK_B, a.shape[0] // BLOCK_B * a.shape[1]])
    b = tl.reshape(b, a.shape)
    return a[:, None, :] * b[None, :, :]


@triton.jit
def student_grams(
    student, pooled, own, i, valid, split, runs, run_lines, length, x_b, x_f, x_c, x_h, x_w,
    SPLITS: tl.constexpr, SLICES: tl.constexpr, JOINED: tl.constexpr, VEC: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """X of the frames [B, N, N] and of the time averages [B, B] of one split of the columns.

    Slice g is of sample ``own`` [G] and rows ``valid`` [G, N]. Where ``pooled`` is not None the averages, of one
    sample, go there instead.
    """
    G: tl.constexpr = BLOCK_B * SLICES
    L: tl.constexpr = BLOCK_L // SLICES
    tiles = runs * tl.cdiv(length, BLOCK_L)
    share = tl.cdiv(tiles, SPLITS)
    first, last = split * share, tl.minimum(tiles, split * share + share)
    lane = lanes(G, SLICES, BLOCK_L)
    at, rows = offsets(own, i, lane, x_b * VEC, x_f * VEC, x_w), valid[:, :, None]
    count = tl.maximum(tl.sum(valid.to(tl.float32), 1), 1.0)[:, None]
    unit = unit_matrix(G, BLOCK_N, L).to(student.dtype.element_ty)
    xx = zero_grams(G, BLOCK_N)
    averages_xx = tl.zeros([BLOCK_B, BLOCK_B, BLOCK_L], tl.float32)
    x = load_tile(student, at, lane, rows, first, last, run_lines, length, x_c, x_h, x_w, JOINED, VEC, BLOCK_L)
    for tile in range(first, last):
        if VEC > 1:
            coming = load_tile(
                student, at, lane, rows, tile + 1, last, run_lines, length, x_c, x_h, x_w, JOINED, VEC, BLOCK_L
            )
        else:
            x = load_tile(student, at, lane, rows, tile, last, run_lines, length, x_c, x_h, x_w, JOINED, VEC, BLOCK_L)
        x = matrices(x)
        if pooled is not None or BLOCK_B > 1:
            average = row_means(product(x, unit), count)
        if pooled is not None:
            store_means(pooled, average, tile, lane, length, JOINED, VEC, BLOCK_L)
        if BLOCK_B > 1:
            averages_xx += outer(average, average, BLOCK_B)
        if FRAMES:
            xx = flushed(product(x, x), xx)
        if VEC > 1:
            x = coming
    return sample_grams(xx, BLOCK_B, BLOCK_N, SLICES), tl.sum(averages_xx, 2)


@triton.jit
def score_grams(
    real, fake, pooled, own, i, valid, split, runs, run_lines, length, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w,
    SPLITS: tl.constexpr, SLICES: tl.constexpr, JOINED: tl.constexpr, VEC: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """R, T, ‖f‖² of the frames [B, N, N], [B, N] and of the averages [B, B], [B]; else as :func:`student_grams`."""
    G: tl.constexpr = BLOCK_B * SLICES
    L: tl.constexpr = BLOCK_L // SLICES
    tiles = runs * tl.cdiv(length, BLOCK_L)
    share = tl.cdiv(tiles, SPLITS)
    first, last = split * share, tl.minimum(tiles, split * share + share)
    lane = lanes(G, SLICES, BLOCK_L)
    at_r, at_f = offsets(own, i, lane, r_b * VEC, r_f * VEC, r_w), offsets(own, i, lane, f_b * VEC, f_f * VEC, f_w)
    rows = valid[:, :, None]
    count = tl.maximum(tl.sum(valid.to(tl.float32), 1), 1.0)[:, None]
    unit = unit_matrix(G, BLOCK_N, L).to(real.dtype.element_ty)
    rr, pp = zero_grams(G, BLOCK_N), zero_grams(G, BLOCK_N)
    ff, largest = tl.zeros([G, BLOCK_N, L // 8], tl.float32), tl.zeros([G, BLOCK_N, L // 8], tl.float32)
    averages_rr = tl.zeros([BLOCK_B, BLOCK_B, BLOCK_L], tl.float32)
    averages_tt = tl.zeros([BLOCK_B, BLOCK_B, BLOCK_L], tl.float32)
    averages_ff = tl.zeros([G, L], tl.float32)
    r = load_tile(real, at_r, lane, rows, first, last, run_lines, length, r_c, r_h, r_w, JOINED, VEC, BLOCK_L)
    f = load_tile(fake, at_f, lane, rows, first, last, run_lines, length, f_c, f_h, f_w, JOINED, VEC, BLOCK_L)
    for tile in range(first, last):
        if VEC > 1:
            coming_r = load_tile(
                real, at_r, lane, rows, tile + 1, last, run_lines, length, r_c, r_h, r_w, JOINED, VEC, BLOCK_L
            )
            coming_f = load_tile(
                fake, at_f, lane, rows, tile + 1, last, run_lines, length, f_c, f_h, f_w, JOINED, VEC, BLOCK_L
            )
        else:
            r = load_tile(real, at_r, lane, rows, tile, last, run_lines, length, r_c, r_h, r_w, JOINED, VEC, BLOCK_L)
            f = load_tile(fake, at_f, lane, rows, tile, last, run_lines, length, f_c, f_h, f_w, JOINED, VEC, BLOCK_L)
        wide = f.to(tl.float32)
        if pooled is not None:
            d = difference_of(r.to(tl.float32), wide)
        else:
            d = wide - r.to(tl.float32)
        high, low = two_parts(d, r.dtype == tl.float16)
        r, f, high, low = matrices(r), matrices(f), matrices(high), matrices(low)
        if pooled is not None or BLOCK_B > 1:
            mean_r = row_means(product(r, unit), count)
            mean_d = row_means(add_product(low, unit, product(high, unit)), count)
        if pooled is not None:
            features = runs.to(tl.int64) * length
            store_means(pooled + features, mean_r, tile, lane, length, JOINED, VEC, BLOCK_L)
            store_means(pooled + 2 * features, mean_d, tile, lane, length, JOINED, VEC, BLOCK_L)
        if BLOCK_B > 1:
            averages_rr += outer(mean_r, mean_r, BLOCK_B)
            averages_tt += outer(mean_d, mean_r + 0.5 * mean_d, BLOCK_B)
            averages_ff += square_of(row_means(product(f, unit), count))
        if FRAMES:
            wide = tl.reshape(wide, [G, BLOCK_N, L // 8, 8])
            ff += tl.sum(wide * wide, 3)
            largest = tl.maximum(largest, tl.max(tl.abs(wide), 3))
            rr = flushed(product(r, r), rr)
            pp = flushed(add_product(low, f, add_product(low, r, add_product(high, f, product(high, r)))), pp)
        if VEC > 1:
            r, f = coming_r, coming_f
    pp = sample_grams(pp, BLOCK_B, BLOCK_N, SLICES)
    ff = tl.sum(tl.reshape(tl.sum(ff, 2), [BLOCK_B, SLICES, BLOCK_N]), 1)
    largest = tl.max(tl.reshape(tl.max(largest, 2), [BLOCK_B, SLICES, BLOCK_N]), 1)
    averages_tt = tl.sum(averages_tt, 2)
    return (
        sample_grams(rr, BLOCK_B, BLOCK_N, SLICES),
        0.5 * (pp + tl.permute(pp, (0, 2, 1))),
        tl.where(largest > 0.0, tl.maximum(ff, LEAST_NORMAL, tl.PropagateNan.ALL), ff),
        tl.sum(averages_rr, 2),
        averages_tt + tl.trans(averages_tt),
        tl.sum(tl.reshape(averages_ff, [BLOCK_B, BLOCK_L]), 1),
    )
