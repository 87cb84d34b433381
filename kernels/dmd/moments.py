"""The forward pass of the DMD and CoDMD losses: moments, and the relation's features, from one read of everything.

A program takes ``per`` pieces of a frame one after another, as :mod:`..pooled.pool` has them, and leaves one sum of
each moment. The block that completes a sample adds its moments per segment of the norm and, for CoDMD, finishes its
features and frame relation; the block that completes the last sample computes norms, loss, factors and, for CoDMD, the
batch relation and the terms. Of a decoupled loss it computes both levels' norms; value and factors need a second read
(:mod:`.decoupled`).
"""

import triton
import triton.language as tl

from ..blocks import (
    FAKE_SCALE,
    REAL_SCALE,
    TEMPERATURE,
    kept_apart,
    number,
    ordered_sum,
    store_objective_terms,
    takes_last,
    takes_last_of_any,
)
from ..pooled.algebra import relation_in_one_block
from ..pooled.pool import average_of, finish_sample, piece_of, store_piece, three_sums, tile_of
from .algebra import LEAST_SIZE, MOMENTS, SCALE, add_segments, finish_loss, pseudo_huber_root, store_norms
from .scores import difference, guided_real, load, selection

COUNT_BITS = tl.constexpr(10)
"""A lane counts selected, NaN and non-finite elements in one int32; it meets fewer than 1,024 of each."""


@triton.jit
def flags(x, d, selected):
    """1 if selected, plus 2^10 if d is then a NaN, plus 2^20 if x is then not finite."""
    nan = d != d
    wild = (x - x) != 0.0
    count = selected.to(tl.int32)
    return count + ((selected & nan).to(tl.int32) << COUNT_BITS) + ((selected & wild).to(tl.int32) << 2 * COUNT_BITS)


@triton.jit
def scaled_size(value):
    """|value|/SCALE; 0 of a zero alone."""
    size = tl.abs(value)
    return tl.where(size > 0.0, tl.maximum(size * (1.0 / SCALE), LEAST_SIZE), size)


@triton.jit
def moments(x, r, d, selected, inside, huber_c, HUBER: tl.constexpr):
    """Scaled |x - r| of everything inside; scaled penalty and |d| of the selected numbers; flags."""
    distance = tl.where(inside, scaled_size(x - r), 0.0)
    counted = tl.where(selected & (d == d), d, 0.0)
    scaled = counted * SCALE
    penalty = scaled * scaled
    if HUBER:
        penalty = scaled * (scaled / (pseudo_huber_root(counted, huber_c) + huber_c))
    return distance, penalty, scaled_size(counted), flags(x, d, selected)


@triton.jit
def distances(x, r, second, selected, inside):
    """In the places of :func:`moments`: scaled |x - r| and |x - second| of everything inside, nothing, flags of x."""
    first = tl.where(inside, scaled_size(x - r), 0.0)
    other = tl.where(inside, scaled_size(x - second), 0.0)
    return first, other, tl.zeros_like(first), flags(x, x, selected)


@triton.jit(
    do_not_specialize=[
        "losses_at", "averages_at", "pieces_at", "moments_at", "sums_at", "per", "samples", "frames",
        "channels", "features", "segments",
    ],
    do_not_specialize_on_alignment=[
        "sigma", "sample_weight", "frame_mask", "terms", "norms", "factors", "frame_grad", "batch_grad", "pooled",
        "workspace", "counters", "numbers",
    ],
)  # fmt: skip
def moments_kernel(
    student, real, fake, real_uncond, fake_uncond, noisy,  # [B, F, C, H, W], any strides; the last three or None
    second,  # the second level's cond prediction if the loss is decoupled, or None
    sigma,  # [B, F] or None
    mask,  # like the latents, or None
    sample_weight,  # [B] or None
    frame_mask,  # [B, F] or None
    terms,  # [5]; a relation that another launch computes counts as 0
    norms,  # [B], [1] or [B, segments]; [2, ...] if the loss is decoupled
    factors,  # [B]; not written if the loss is decoupled
    frame_grad,  # [B, F, K]
    batch_grad,  # [B, K]
    pooled,  # [B, 3K + 1], or None: kept in the workspace
    workspace,  # as in pool_kernel; then moments [MOMENTS, B, F, programs of a frame] and, in float64, their sums
    # [B, MOMENTS, segments]; see MomentsPlan
    counters,  # [B + 1], zero before and after
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    losses_at, averages_at, pieces_at, moments_at, sums_at,
    per, samples, frames, channels, features, segments, height, width,
    x_b, x_f, x_c, x_h, x_w, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w,
    u_b, u_f, u_c, u_h, u_w, v_b, v_f, v_c, v_h, v_w, n_b, n_f, n_c, n_h, n_w,
    a_b, a_f, a_c, a_h, a_w, m_b, m_f, m_c, m_h, m_w, sigma_b, sigma_f, weight_b, mask_b, mask_f,
    huber_c, eps, coefficient,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, SPLITS: tl.constexpr, COLUMN_TILES: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    SCOPE: tl.constexpr, BLOCK: tl.constexpr, FIRST_ALONE: tl.constexpr, GUARD: tl.constexpr, NAN: tl.constexpr,
    HUBER: tl.constexpr, SUM: tl.constexpr, LOSS_DIVIDED: tl.constexpr, WEIGHT_SQUARED: tl.constexpr,
    RELATION: tl.constexpr, FRAMES: tl.constexpr, BATCH: tl.constexpr, AVERAGES: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid [B·F·programs of a frame]. Strides of b, f, c, h are in units of VEC elements, but for the mask's."""
    pid = tl.program_id(0)
    pieces_of_frame = channels * GRID_H * SPLITS
    programs = tl.cdiv(pieces_of_frame, per)
    per_sample = frames * programs
    sample = pid // per_sample
    frame = pid // programs % frames
    first_piece = pid % programs * per
    b, f = sample.to(tl.int64), frame.to(tl.int64)
    row = 3 * features + 1
    table = workspace + b * frames * row
    losses = workspace + losses_at
    averages, averages_along = average_of(pooled, workspace + averages_at, b, samples, features, COLUMNS)
    pieces = table
    if SPLITS > 1:
        pieces = workspace + pieces_at + b * SPLITS * frames * row
    level = None
    if sigma is not None:
        level = tl.load(sigma + b * sigma_b + f * sigma_f).to(tl.float32)
    real_scale = number(numbers, REAL_SCALE, real_scale)
    fake_scale = number(numbers, FAKE_SCALE, fake_scale)

    STEP: tl.constexpr = TILE_W if FLAT else TILE_H
    distance = tl.zeros([TILE_H, TILE_W], tl.float32)
    penalty = tl.zeros([TILE_H, TILE_W], tl.float32)
    magnitude = tl.zeros([TILE_H, TILE_W], tl.float32)
    counts = tl.zeros([TILE_H, TILE_W], tl.int32)
    for piece in range(first_piece, tl.minimum(first_piece + per, pieces_of_frame)):
        channel, gy, split, top, bottom, start, stop, left = piece_of(
            piece, height, width, GRID_H, SPLITS, COLUMN_TILES, FLAT, VEC, TILE_W
        )
        c = channel.to(tl.int64)
        skip = tl.zeros([], tl.int64)
        if FLAT:
            skip = top.to(tl.int64) * width // VEC * VEC
        student_plane = (student + (b * x_b + f * x_f + c * x_c) * VEC + skip, x_h, x_w)
        real_plane = (real + (b * r_b + f * r_f + c * r_c) * VEC + skip, r_h, r_w)
        fake_plane = (fake + (b * f_b + f * f_f + c * f_c) * VEC + skip, f_h, f_w)
        real_uncond_plane = (None, 0, 0)
        fake_uncond_plane = (None, 0, 0)
        noisy_plane = (None, 0, 0)
        second_plane = (None, 0, 0)
        mask_plane = (None, 0, 0)
        if real_uncond is not None:
            real_uncond_plane = (real_uncond + (b * u_b + f * u_f + c * u_c) * VEC + skip, u_h, u_w)
        if fake_uncond is not None:
            fake_uncond_plane = (fake_uncond + (b * v_b + f * v_f + c * v_c) * VEC + skip, v_h, v_w)
        if noisy is not None:
            noisy_plane = (noisy + (b * n_b + f * n_f + c * n_c) * VEC + skip, n_h, n_w)
        if second is not None:
            second_plane = (second + (b * a_b + f * a_f + c * a_c) * VEC + skip, a_h, a_w)
        if mask is not None:
            mask_plane = (mask + b * m_b + f * m_f + c * m_c + skip * m_w, m_h, m_w)

        sum_x = tl.zeros([TILE_H, TILE_W], tl.float32)
        sum_r = tl.zeros([TILE_H, TILE_W], tl.float32)
        sum_d = tl.zeros([TILE_H, TILE_W], tl.float32)
        for first in range(start, stop, STEP):
            line, column, inside = tile_of(first, stop, left, width, FLAT, VEC, TILE_H, TILE_W)
            x = load(student_plane, line, column, inside, VEC)
            if second is None or RELATION:
                d, cond, push = difference(
                    real_plane, fake_plane, real_uncond_plane, fake_uncond_plane, level, real_scale, fake_scale,
                    line, column, inside, VEC,
                )  # fmt: skip
                r = guided_real(
                    cond, push, real_uncond_plane, noisy_plane, level, real_scale, line, column, inside, VEC
                )
            else:
                r = load(real_plane, line, column, inside, VEC)
            selected = selection(mask_plane, line, column, inside)
            if second is None:
                more = moments(x, r, d, selected, inside, huber_c, HUBER)
            else:
                more = distances(x, r, load(second_plane, line, column, inside, VEC), selected, inside)
            distance += more[0]
            penalty += more[1]
            magnitude += more[2]
            counts += more[3]
            if RELATION:
                sum_x += x
                sum_r += r
                sum_d += kept_apart(r, d, False)
        if RELATION:
            store_piece(
                pieces, split, f, frames, features, channel, gy, sum_x, sum_r, sum_d, left, width, top, bottom,
                GRID_H, GRID_W, FLAT, TILE_W, COLUMNS,
            )  # fmt: skip

    stride = samples.to(tl.int64) * frames * programs
    moment = workspace + moments_at + pid
    low: tl.constexpr = (1 << 10) - 1
    found, which = three_sums(distance, penalty, magnitude)
    tl.store(moment + which * stride, found, mask=which < 3)
    found, which = three_sums(counts & low, (counts >> COUNT_BITS) & low, counts >> 2 * COUNT_BITS)
    tl.store(moment + (3 + which) * stride, found.to(tl.float32), mask=which < 3)
    sums = (workspace + sums_at).to(tl.pointer_type(tl.float64), bitcast=True)

    if takes_last(counters + sample, per_sample):
        add_segments(
            workspace + moments_at + b * per_sample, stride, programs, frames, segments,
            sums + sample * MOMENTS * segments, MOMENTS, BLOCK, FIRST_ALONE, 128,
        )  # fmt: skip
        if RELATION:
            finish_sample(
                pieces, table, averages, averages_along, frame_mask, sample, frames, features, mask_b, mask_f,
                SPLITS, BLOCK_F, AVERAGES, COLUMNS,
            )  # fmt: skip
        if FRAMES:
            tl.debug_barrier()
            loss = relation_in_one_block(
                table, frames, features, number(numbers, TEMPERATURE, temperature),
                frame_grad + b * frames * features, 1.0 / samples, BLOCK_F, BLOCK_K,
            )  # fmt: skip
            tl.store(losses + sample, loss)
        if takes_last_of_any(counters + samples, samples):
            frame_term = 0.0
            batch_term = 0.0
            if FRAMES:
                frame_term = ordered_sum(losses, samples, 16) / samples
            if BATCH:
                batch_term = relation_in_one_block(
                    workspace + averages_at, samples, features, number(numbers, TEMPERATURE, temperature),
                    batch_grad, 1.0, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            if second is None:
                dmd_loss, mean_g = finish_loss(
                    sums, norms, factors, sample_weight, weight_b, samples, frames, segments,
                    channels.to(tl.float64) * height * width, eps, coefficient,
                    SCOPE, BLOCK, FIRST_ALONE, GUARD, NAN, HUBER, SUM, LOSS_DIVIDED, WEIGHT_SQUARED, BLOCK_S, BLOCK_B,
                )  # fmt: skip
            else:
                dmd_loss, mean_g = 0.0, 0.0
                one = 1 if SCOPE == "batch" else samples * segments
                for level in tl.static_range(2):
                    store_norms(
                        sums + level * segments, norms + level * one, samples, frames, segments,
                        channels.to(tl.float64) * height * width, eps,
                        SCOPE, BLOCK, FIRST_ALONE, GUARD, BLOCK_S, BLOCK_B,
                    )  # fmt: skip
            if RELATION:
                store_objective_terms(
                    terms, dmd_loss, batch_term, frame_term, numbers, batch_weight, frame_weight, relation_weight
                )
            else:
                tl.store(terms, dmd_loss)
                tl.store(terms + 1, dmd_loss)
                tl.store(terms + 2, 0.0)
                tl.store(terms + 3, 0.0)
            tl.store(terms + 4, mean_g)
