"""Gram matrices of one sample's long vectors, added tile by tile along the long axis.

X = x xᵀ of the student; R = r rᵀ, T = d mᵀ + m dᵀ and ‖f‖² of the scores, with d = f - r and m = (r + f)/2, so that
f fᵀ = R + T without cancellation. Dots are IEEE float32. The same pass can leave the vectors' mean: the time averages.
"""

import triton
import triton.language as tl

from ..blocks import difference_of, frame_validity, square_of


@triton.jit
def load_rows(base, row, valid, column, inside, stride, step):
    """float32 [N, L] of ``base[row·stride + column·step]``; 0 outside and for vectors that take no part."""
    at = base + row.to(tl.int64)[:, None] * stride + column.to(tl.int64)[None, :] * step
    return tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def tile_address(base, tile, per_run, run_lines, b, s_b, s_c, s_h, VEC: tl.constexpr):
    """``base`` moved to sample b and to the run of ``tile``."""
    run = tile // per_run
    c, h = (run // run_lines).to(tl.int64), (run % run_lines).to(tl.int64)
    return base + (b * s_b + c * s_c + h * s_h) * VEC


@triton.jit
def mean_rows(
    base, frame_mask, sample, frames, mask_b, mask_f, column, inside, stride, step,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The mean over the valid rows of ``base[row·stride + column·step]``, [L]."""
    total = tl.zeros([BLOCK_L], tl.float32)
    count = 0.0
    for block in range(BLOCKS):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = frame_validity(frame_mask, sample, row, frames, mask_b, mask_f)
        total += tl.sum(load_rows(base, row, valid, column, inside, stride, step), 0)
        count += tl.sum(valid.to(tl.float32), 0)
    return total / tl.maximum(count, 1.0)


@triton.jit
def student_gram(
    student, frame_mask, pooled, sample, b, i, j, i_valid, j_valid, first, last, pair, frames, runs, run_lines, length,
    x_b, x_f, x_c, x_h, x_w, mask_b, mask_f,
    BLOCKS: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, GRAMS: tl.constexpr,
):  # fmt: skip
    """X [N, N] of tiles ``first : last``; stores the time averages of x there."""
    xx = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    per_run = tl.cdiv(length, BLOCK_L)
    lane = tl.arange(0, BLOCK_L)
    for tile in range(first, last):
        start = tile % per_run * BLOCK_L
        column = start + lane
        inside = lane // VEC < (length - start) // VEC
        x_at = tile_address(student, tile, per_run, run_lines, b, x_b, x_c, x_h, VEC)
        if GRAMS:
            x = load_rows(x_at, i, i_valid, column, inside, x_f * VEC, x_w)
            xj = x
            if BLOCKS > 1:
                xj = load_rows(x_at, j, j_valid, column, inside, x_f * VEC, x_w)
            xx = tl.dot(x, tl.trans(xj), xx, input_precision="ieee")
        if pooled is not None:  # noqa: SIM102 (decided at compile time, the next at run time)
            if pair == 0:
                if GRAMS and BLOCKS == 1:
                    mean = tl.sum(x, 0) / tl.maximum(tl.sum(i_valid.to(tl.float32), 0), 1.0)
                else:
                    mean = mean_rows(
                        x_at, frame_mask, sample, frames, mask_b, mask_f, column, inside, x_f * VEC, x_w,
                        BLOCKS, BLOCK_N, BLOCK_L,
                    )  # fmt: skip
                line = pooled + b * (3 * runs.to(tl.int64) * length + 1)
                tl.store(line + tl.cast(tile // per_run, tl.int64) * length + column, mean, mask=inside)
    return xx


@triton.jit
def score_grams(
    real, fake, frame_mask, pooled, sample, b, i, j, i_valid, j_valid, first, last, pair, frames, runs, run_lines,
    length, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, mask_b, mask_f,
    BLOCKS: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    GRAMS: tl.constexpr, DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """R, T [N, N] and ‖f‖² [N] of tiles ``first : last``; stores the time averages of r and d there.

    They come before the dots, which need every register.
    """
    rr = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    tt = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    ff = tl.zeros([BLOCK_N], tl.float32)
    per_run = tl.cdiv(length, BLOCK_L)
    lane = tl.arange(0, BLOCK_L)
    for tile in range(first, last):
        start = tile % per_run * BLOCK_L
        column = start + lane
        inside = lane // VEC < (length - start) // VEC
        r_at = tile_address(real, tile, per_run, run_lines, b, r_b, r_c, r_h, VEC)
        f_at = tile_address(fake, tile, per_run, run_lines, b, f_b, f_c, f_h, VEC)
        if GRAMS:
            r = load_rows(r_at, i, i_valid, column, inside, r_f * VEC, r_w)
            f = load_rows(f_at, i, i_valid, column, inside, f_f * VEC, f_w)
            if DIFFERENCE:
                d = f
                f = r + d
            else:
                d = difference_of(r, f)
        if pooled is not None:  # noqa: SIM102 (decided at compile time, the next at run time)
            if pair == 0:
                if GRAMS and BLOCKS == 1:
                    count = tl.maximum(tl.sum(i_valid.to(tl.float32), 0), 1.0)
                    mean_r, mean_d = tl.sum(r, 0) / count, tl.sum(d, 0) / count
                else:
                    mean_r = tl.zeros([BLOCK_L], tl.float32)
                    mean_d = tl.zeros([BLOCK_L], tl.float32)
                    valid_rows = 0.0
                    for block in range(BLOCKS):
                        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
                        valid = frame_validity(frame_mask, sample, row, frames, mask_b, mask_f)
                        rs = load_rows(r_at, row, valid, column, inside, r_f * VEC, r_w)
                        mean_r += tl.sum(rs, 0)
                        fs = load_rows(f_at, row, valid, column, inside, f_f * VEC, f_w)
                        mean_d += tl.sum(difference_of(rs, fs), 0)
                        valid_rows += tl.sum(valid.to(tl.float32), 0)
                    mean_r, mean_d = mean_r / tl.maximum(valid_rows, 1.0), mean_d / tl.maximum(valid_rows, 1.0)
                features = runs.to(tl.int64) * length
                line = pooled + b * (3 * features + 1) + features
                line += tl.cast(tile // per_run, tl.int64) * length
                tl.store(line + column, mean_r, mask=inside)
                tl.store(line + features + column, mean_d, mask=inside)
        if GRAMS:
            middle = 0.5 * (r + f)
            if BLOCKS == 1:
                rr = tl.dot(r, tl.trans(r), rr, input_precision="ieee")
                tt = tl.dot(d, tl.trans(middle), tt, input_precision="ieee")
            else:
                rj = load_rows(r_at, j, j_valid, column, inside, r_f * VEC, r_w)
                dj = load_rows(f_at, j, j_valid, column, inside, f_f * VEC, f_w)
                if not DIFFERENCE:
                    dj -= rj
                rr = tl.dot(r, tl.trans(rj), rr, input_precision="ieee")
                tt = tl.dot(d, tl.trans(rj + 0.5 * dj), tt, input_precision="ieee")
                tt = tl.dot(middle, tl.trans(dj), tt, input_precision="ieee")
            ff += tl.sum(square_of(f), 1)
    if BLOCKS == 1:
        tt += tl.trans(tt)
    return rr, tt, ff
