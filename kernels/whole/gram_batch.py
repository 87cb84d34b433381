"""Gram matrices of whole latents (pool=None) of all samples and of their time averages, in one streaming pass.

A program takes all samples of its columns. It adds X = x xᵀ, or R = r rᵀ, T = d mᵀ + m dᵀ and ‖f‖² (see
:mod:`.stream`), of the frames of every sample, and the same of the time averages
ψ_b = (1/n_b) Σ_f x_bf, whose columns it has in registers: no average is ever stored. Dots are IEEE float32 with the
samples as their batch axis. The long axis is split over programs, a third of which read x alone and the others r and f.
Each leaves upper triangles, and the last program of a group of splits adds the group's in order.
"""

import triton
import triton.language as tl

from ..blocks import difference_of, frame_validity, square_of, takes_last
from . import cores
from .algebra import add_pieces, triangle
from .stream import tile_address


@triton.jit
def load_samples(base, b, row, valid, column, inside, stride_b, stride_f, step):
    """float32 [B, N, L] of ``base[b·stride_b + row·stride_f + column·step]``; 0 outside and where not ``valid``."""
    at = b.to(tl.int64)[:, None, None] * stride_b + row.to(tl.int64)[None, :, None] * stride_f
    at += column.to(tl.int64)[None, None, :] * step
    return tl.load(base + at, mask=valid[:, :, None] & inside[None, None, :], other=0.0).to(tl.float32)


@triton.jit
def valid_rows(frame_mask, b, row, samples, frames, mask_b, mask_f):
    """[B, N]: whether row ``row`` of sample ``b`` takes part."""
    inside = tl.where((b < samples)[:, None], row[None, :], frames)
    return frame_validity(frame_mask, b[:, None], inside, frames, mask_b, mask_f)


@triton.jit
def valid_count(valid):
    """[B, 1] float32: how many rows take part, at least 1."""
    return tl.maximum(tl.sum(valid.to(tl.float32), 1), 1.0)[:, None]


@triton.jit
def halves(a):
    """The even and the odd columns of a [B, N, L]: half as many operands of a dot in registers."""
    return tl.split(tl.reshape(a, [a.shape[0], a.shape[1], a.shape[2] // 2, 2]))


@triton.jit
def batched_dot(a, b, total):
    """``total`` + a bᵀ for every sample, at least 8 columns at a time."""
    if a.shape[2] < 16:
        total = tl.dot(a, tl.permute(b, 0, 2, 1), total, input_precision="ieee")
    else:
        a0, a1 = halves(a)
        b0, b1 = halves(b)
        total = tl.dot(a0, tl.permute(b0, 0, 2, 1), total, input_precision="ieee")
        total = tl.dot(a1, tl.permute(b1, 0, 2, 1), total, input_precision="ieee")
    return total


@triton.jit
def student_grams(
    student, b, i, valid, count, first, last, run_lines, length, x_b, x_f, x_c, x_h, x_w,
    VEC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """X of the frames [B, N, N] and of the time averages [B, B], columns of tiles ``first : last``."""
    xx = tl.zeros([BLOCK_B, BLOCK_N, BLOCK_N], tl.float32)
    averages_xx = tl.zeros([BLOCK_B, BLOCK_B], tl.float32)
    per_run = tl.cdiv(length, BLOCK_L)
    lane = tl.arange(0, BLOCK_L)
    for tile in range(first, last):
        start = tile % per_run * BLOCK_L
        inside = lane // VEC < (length - start) // VEC
        at = tile_address(student, tile, per_run, run_lines, 0, x_b, x_c, x_h, VEC)
        x = load_samples(at, b, i, valid, start + lane, inside, x_b * VEC, x_f * VEC, x_w)
        average = tl.sum(x, 1) / count
        averages_xx = tl.dot(average, tl.trans(average), averages_xx, input_precision="ieee")
        if FRAMES:
            xx = batched_dot(x, x, xx)
    return xx, averages_xx


@triton.jit
def score_grams(
    real, fake, b, i, valid, count, first, last, run_lines, length,
    r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w,
    VEC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """R, T, ‖f‖² of the frames [B, N, N], [B, N] and of the time averages [B, B], [B]."""
    rr = tl.zeros([BLOCK_B, BLOCK_N, BLOCK_N], tl.float32)
    tt = tl.zeros([BLOCK_B, BLOCK_N, BLOCK_N], tl.float32)
    ff = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    averages_rr = tl.zeros([BLOCK_B, BLOCK_B], tl.float32)
    averages_tt = tl.zeros([BLOCK_B, BLOCK_B], tl.float32)
    averages_ff = tl.zeros([BLOCK_B], tl.float32)
    per_run = tl.cdiv(length, BLOCK_L)
    lane = tl.arange(0, BLOCK_L)
    for tile in range(first, last):
        start = tile % per_run * BLOCK_L
        inside = lane // VEC < (length - start) // VEC
        r_at = tile_address(real, tile, per_run, run_lines, 0, r_b, r_c, r_h, VEC)
        f_at = tile_address(fake, tile, per_run, run_lines, 0, f_b, f_c, f_h, VEC)
        r = load_samples(r_at, b, i, valid, start + lane, inside, r_b * VEC, r_f * VEC, r_w)
        f = load_samples(f_at, b, i, valid, start + lane, inside, f_b * VEC, f_f * VEC, f_w)
        d = difference_of(r, f)
        mean_r, mean_d = tl.sum(r, 1) / count, tl.sum(d, 1) / count
        averages_rr = tl.dot(mean_r, tl.trans(mean_r), averages_rr, input_precision="ieee")
        averages_tt = tl.dot(mean_d, tl.trans(mean_r + 0.5 * mean_d), averages_tt, input_precision="ieee")
        averages_ff += tl.sum(square_of(mean_r + mean_d), 1)
        if FRAMES:
            ff += tl.sum(square_of(f), 2)
            rr = batched_dot(r, r, rr)
            tt = batched_dot(d, 0.5 * (r + f), tt)
    tt += tl.permute(tt, (0, 2, 1))
    return rr, tt, ff, averages_rr, averages_tt + tl.trans(averages_tt), averages_ff


@triton.jit(
    do_not_specialize=["samples", "frames", "runs", "run_lines", "tiles", "pieces_at"],
    do_not_specialize_on_alignment=["frame_mask", "workspace", "counters"],
)
def gram_batch_kernel(
    student, real, fake,  # [B, F, runs of `length` elements]
    frame_mask,  # [B, F], != 0 is valid, or None
    workspace,  # sums of groups, and from pieces_at on the pieces of all splits: triangles of the frame relations of
    # each sample, then of the batch relation; X of x-programs, and R, T, ‖f‖² of the others
    counters,  # [all groups], zero before and after
    samples, frames, runs, run_lines, length, tiles, pieces_at,
    x_b, x_f, x_c, x_h, x_w, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, mask_b, mask_f,
    SPLITS_X: tl.constexpr, SPLITS_S: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    SLICES: tl.constexpr, BLOCK_X: tl.constexpr, JOINED: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """Grid [SPLITS_X + SPLITS_S]: splits of x, then of r and f. FRAMES: with the frame relations.

    SLICES of a tile, for each sample, go to tensor cores, of x in tiles of BLOCK_X columns; 0: IEEE dots. JOINED: a
    vector is one run.

    Strides of b, f, c, h are in units of VEC elements.
    """
    GROUPS_X: tl.constexpr = (SPLITS_X + GROUP - 1) // GROUP
    split = tl.program_id(0)
    of_student = split < SPLITS_X
    split = tl.where(of_student, split, split - SPLITS_X)
    b = tl.arange(0, BLOCK_B)
    i = tl.arange(0, BLOCK_N)
    valid = valid_rows(frame_mask, b, i, samples, frames, mask_b, mask_f)
    count = valid_count(valid)

    if SLICES:
        own = tl.arange(0, BLOCK_B * SLICES) // SLICES
        own_valid = valid_rows(frame_mask, own, i, samples, frames, mask_b, mask_f)

    half = frames * (frames + 1) // 2
    half_b = samples * (samples + 1) // 2
    x_size = half_b
    s_size = 2 * half_b + samples
    if FRAMES:
        x_size += samples * half
        s_size += samples * (2 * half + frames)
    pieces = workspace + pieces_at + tl.where(of_student, 0, SPLITS_X * x_size)
    size = tl.where(of_student, x_size, s_size)
    piece = pieces + split.to(tl.int64) * size
    upper = (b[:, None] <= b[None, :]) & (b < samples)[None, :]
    at = triangle(b[:, None], b[None, :], samples)
    frames_inside = (b < samples)[:, None, None] & (i[:, None] <= i[None, :])[None, :, :] & (i < frames)[None, None, :]
    frames_at = triangle(i[:, None], i[None, :], frames)[None, :, :]
    if of_student:
        share = tl.cdiv(tiles, SPLITS_X)
        if SLICES:
            xx, averages_xx = cores.student_grams(
                student, None, own, i, own_valid, split, runs, run_lines, length, x_b, x_f, x_c, x_h, x_w,
                SPLITS_X, SLICES, JOINED, VEC, BLOCK_B, BLOCK_N, BLOCK_X, FRAMES,
            )  # fmt: skip
        else:
            xx, averages_xx = student_grams(
                student, b, i, valid, count, split * share, tl.minimum(tiles, split * share + share), run_lines, length,
                x_b, x_f, x_c, x_h, x_w, VEC, BLOCK_B, BLOCK_N, BLOCK_L, FRAMES,
            )  # fmt: skip
        averages = piece
        if FRAMES:
            averages += samples * half
            tl.store(piece + b[:, None, None] * half + frames_at, xx, mask=frames_inside)
        tl.store(averages + at, averages_xx, mask=upper)
    else:
        share = tl.cdiv(tiles, SPLITS_S)
        if SLICES:
            rr, tt, ff, averages_rr, averages_tt, averages_ff = cores.score_grams(
                real, fake, None, own, i, own_valid, split, runs, run_lines, length,
                r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w,
                SPLITS_S, SLICES, JOINED, VEC, BLOCK_B, BLOCK_N, BLOCK_L, FRAMES,
            )  # fmt: skip
        else:
            rr, tt, ff, averages_rr, averages_tt, averages_ff = score_grams(
                real, fake, b, i, valid, count, split * share, tl.minimum(tiles, split * share + share), run_lines,
                length, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, VEC, BLOCK_B, BLOCK_N, BLOCK_L, FRAMES,
            )  # fmt: skip
        averages = piece
        if FRAMES:
            averages += samples * (2 * half + frames)
            own_s = piece + b[:, None, None] * (2 * half + frames)
            tl.store(own_s + frames_at, rr, mask=frames_inside)
            tl.store(own_s + half + frames_at, tt, mask=frames_inside)
            own_ff = piece + b[:, None] * (2 * half + frames) + 2 * half + i[None, :]
            tl.store(own_ff, ff, mask=(b < samples)[:, None] & (i < frames)[None, :])
        tl.store(averages + at, averages_rr, mask=upper)
        tl.store(averages + half_b + at, averages_tt, mask=upper)
        tl.store(averages + 2 * half_b + b, averages_ff, mask=b < samples)

    group = split // GROUP
    last = tl.minimum(group * GROUP + GROUP, tl.where(of_student, SPLITS_X, SPLITS_S))
    ticket = counters + tl.where(of_student, group, GROUPS_X + group)
    own_sum = workspace + tl.where(of_student, 0, GROUPS_X * x_size) + group * size
    if takes_last(ticket, last - group * GROUP):
        add_pieces(own_sum, pieces, group * GROUP, last, size, size, GROUP, 512)
