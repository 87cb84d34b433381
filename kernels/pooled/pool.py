"""One launch: read student, real and fake once, pool them to features, and finish the relation in the last block.

A plane of one (sample, frame, channel) is cut into pieces of its regions. A program takes ``per`` pieces of a frame
one after another and averages each: Σx, Σr and Σ(f - r) in float32. The next piece's loads go out before a piece is
added up.
The block that completes a sample adds the pieces in a fixed order, writes the sample's feature table
``[F, 3K + 1]`` (see :mod:`.algebra`) and its row ``[3K + 1]`` of time averages, and computes the frame
term; the block that completes the last sample computes the batch term and the total. Feature k = (c, gy, gx).
Where other launches compute the terms, tables and averages lie feature by feature, as :mod:`.rows` reads them.
"""

import triton
import triton.language as tl

from ..blocks import (
    TEMPERATURE,
    difference_of,
    frame_validity,
    number,
    ordered_sum,
    store_terms,
    takes_last,
    takes_last_of_any,
)
from .algebra import relation_in_one_block

UNROLL = tl.constexpr(4)


@triton.jit
def piece_of(
    piece, height, width,
    GRID_H: tl.constexpr, SPLITS: tl.constexpr, COLUMN_TILES: tl.constexpr, FLAT: tl.constexpr, VEC: tl.constexpr,
    TILE_W: tl.constexpr,
):  # fmt: skip
    """A piece of a frame: channel, row of regions and split; the region's lines top : bottom; what it covers.

    That are elements start : stop of the region's run if FLAT, else its lines start : stop from column ``left`` on.
    """
    split = piece % SPLITS
    gy = piece // SPLITS % GRID_H
    channel = piece // (SPLITS * GRID_H)
    top = gy * height // GRID_H
    bottom = (gy + 1) * height // GRID_H
    left = split % COLUMN_TILES * TILE_W
    if FLAT:
        size = (bottom - top) * width
        run = tl.cdiv(tl.cdiv(size, SPLITS), VEC) * VEC
        start = split * run
        stop = tl.minimum(size, start + run)
    else:
        lines = tl.cdiv(bottom - top, SPLITS // COLUMN_TILES)
        start = top + split // COLUMN_TILES * lines
        stop = tl.minimum(bottom, start + lines)
    return channel, gy, split, top, bottom, start, stop, left


@triton.jit
def tile_of(
    first, stop, left, width, FLAT: tl.constexpr, VEC: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):  # fmt: skip
    """Lines [H or 1, 1] and columns [1, W] of a tile of a piece, int64, and which elements are inside.

    A mask that is constant over VEC elements is what lets a load stay 16 bytes wide.
    """
    i = tl.arange(0, TILE_W)[None, :]
    if FLAT:
        line = tl.zeros([1, 1], tl.int64)
        column = (first + i).to(tl.int64)
        inside = i // VEC < (stop - first) // VEC
    else:
        line = (first + tl.arange(0, TILE_H)[:, None]).to(tl.int64)
        column = (left + i).to(tl.int64)
        inside = (line < stop) & (i // VEC < (width - left) // VEC)
    return line, column, inside


@triton.jit
def first_tile(
    student, real, fake, piece, last, height, width,
    GRID_H: tl.constexpr, SPLITS: tl.constexpr, COLUMN_TILES: tl.constexpr, FLAT: tl.constexpr, VEC: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """The first tile of a piece of three latents; zeros from piece ``last`` on."""
    channel, _, _, top, _, start, stop, left = piece_of(
        piece, height, width, GRID_H, SPLITS, COLUMN_TILES, FLAT, VEC, TILE_W
    )
    line, column, inside = tile_of(start, stop, left, width, FLAT, VEC, TILE_H, TILE_W)
    inside = inside & (piece + tl.zeros(inside.shape, tl.int32) < last)
    return (
        elements(student, channel, top, width, line, column, inside, FLAT, VEC),
        elements(real, channel, top, width, line, column, inside, FLAT, VEC),
        elements(fake, channel, top, width, line, column, inside, FLAT, VEC),
    )


@triton.jit
def elements(latent, channel, top, width, line, column, inside, FLAT: tl.constexpr, VEC: tl.constexpr):
    """Of a frame (pointer, strides of channel, line, column), in its dtype; 0 outside."""
    at = latent[0] + channel.to(tl.int64) * latent[1] * VEC
    if FLAT:
        at += top.to(tl.int64) * width // VEC * VEC
    return tl.load(at + line * latent[2] * VEC + column * latent[3], mask=inside, other=0.0)


@triton.jit
def three_sums(a, b, c):
    """Σa, Σb, Σc of [H, W] as the first three of [2, 2], and their numbers: one exchange between warps, not three."""
    every = tl.join(tl.join(a, b), tl.join(c, tl.zeros_like(c)))
    i = tl.arange(0, 2)
    return tl.sum(tl.sum(every, 1), 0), i[:, None] + 2 * i[None, :]


@triton.jit
def store_piece(
    pieces, split, frame, frames, features, channel, gy, x, r, d, left, width, top, bottom,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, FLAT: tl.constexpr, TILE_W: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the means of a piece from its sums [H, W] in ``pieces`` [SPLITS, F, 3K + 1], or [SPLITS, 3K + 1, F]."""
    row = 3 * features + 1
    along = frames if COLUMNS else 1
    at = pieces + split * frames * row + frame * (1 if COLUMNS else row) + (channel * GRID_H + gy) * GRID_W * along
    features *= along
    if FLAT:
        sums, which = three_sums(x, r, d)
        share = 1.0 / ((bottom - top) * width).to(tl.float32)
        tl.store(at + which * features, sums * share, mask=which < 3)
    else:
        store_regions(
            at, along, features, tl.sum(x, 0), tl.sum(r, 0), tl.sum(d, 0), left, width, top, bottom, GRID_W, TILE_W
        )


@triton.jit
def store_regions(at, along, features, x, r, d, left, width, top, bottom, GRID_W: tl.constexpr, TILE_W: tl.constexpr):
    """Add the columns of each of GRID_W regions, divide by the region's area, store at ``at + gx * along``."""
    REGIONS: tl.constexpr = triton.next_power_of_2(GRID_W)
    ROOM: tl.constexpr = 2048 // TILE_W
    GROUP: tl.constexpr = REGIONS if REGIONS < ROOM else ROOM
    column = left + tl.arange(0, TILE_W)
    region = ((column + 1) * GRID_W - 1) // width
    for first in tl.static_range(0, GRID_W, GROUP):
        gx = first + tl.arange(0, GROUP)
        area = ((gx + 1) * width // GRID_W - gx * width // GRID_W) * (bottom - top)
        chosen = region[None, :] == gx[:, None]
        share = 1.0 / tl.maximum(area, 1).to(tl.float32)
        out = at + gx * along
        kept = gx < GRID_W
        tl.store(out, tl.sum(tl.where(chosen, x[None, :], 0.0), 1) * share, mask=kept)
        tl.store(out + features, tl.sum(tl.where(chosen, r[None, :], 0.0), 1) * share, mask=kept)
        tl.store(out + 2 * features, tl.sum(tl.where(chosen, d[None, :], 0.0), 1) * share, mask=kept)


@triton.jit
def average_of(pooled, averages, sample, samples, features, COLUMNS: tl.constexpr):
    """Where the time averages of a sample go, and how far apart they lie: to ``pooled``, if that is there."""
    row = 3 * features + 1
    if pooled is not None:
        return pooled + sample * row, 1
    elif COLUMNS:
        return averages + sample, samples
    else:
        return averages + sample * row, 1


@triton.jit
def finish_sample(
    pieces, table, pooled, pooled_along, frame_mask, sample, frames, features, mask_b, mask_f,
    SPLITS: tl.constexpr, BLOCK_F: tl.constexpr, AVERAGES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Complete one sample's table [F, 3K + 1] from its pieces [SPLITS, F, 3K + 1]; and its time averages [3K + 1].

    They lie ``pooled_along`` apart. Table and pieces are transposed if COLUMNS.
    """
    frame = tl.arange(0, BLOCK_F)[:, None]
    valid = frame_validity(frame_mask, sample, frame, frames, mask_b, mask_f)
    weight = valid.to(tl.float32)
    columns = 3 * features
    along = frames if COLUMNS else 1
    line = frame * (1 if COLUMNS else columns + 1)
    tl.store(table + line + columns * along, weight, mask=frame < frames)
    if AVERAGES:
        count = tl.sum(tl.sum(weight, 1), 0)
        tl.store(pooled + columns * pooled_along, count)
    if SPLITS > 1 or frame_mask is not None or AVERAGES:
        BLOCK_R: tl.constexpr = 2048 // BLOCK_F
        for first in range(0, columns, BLOCK_R):
            k = first + tl.arange(0, BLOCK_R)[None, :]
            at = line + k * along
            value = tl.load(pieces + at, mask=valid & (k < columns), other=0.0)
            for split in tl.range(1, SPLITS, loop_unroll_factor=UNROLL):
                more = pieces + split * frames * (columns + 1) + at
                value += tl.load(more, mask=valid & (k < columns), other=0.0)
            if SPLITS > 1 or frame_mask is not None:
                # Invalid frames get zeros, so that a zero weight can multiply them.
                tl.store(table + at, value, mask=(frame < frames) & (k < columns))
            if AVERAGES:
                average = tl.sum(value, 0, keep_dims=True) / tl.maximum(count, 1.0)
                tl.store(pooled + k * pooled_along, average, mask=k < columns)


@triton.jit(
    do_not_specialize=[
        "losses_at", "averages_at", "pieces_at", "per", "samples", "frames", "channels", "features"
    ],
    do_not_specialize_on_alignment=[
        "frame_mask", "terms", "frame_grad", "batch_grad", "pooled", "workspace", "counters", "numbers"
    ],
)  # fmt: skip
def pool_kernel(
    student, real, fake,  # [B, F, C, H, W], any strides
    frame_mask,  # [B, F] or None
    terms,  # [3]
    frame_grad,  # [B, F, K]
    batch_grad,  # [B, K]
    pooled,  # [B, 3K + 1], or None: kept in the workspace
    workspace,  # tables [B, F, 3K + 1], losses [B], averages [B, 3K + 1] if AVERAGES, pieces [B, SPLITS, F, 3K + 1] if
    # SPLITS > 1; tables, averages, pieces feature by feature if COLUMNS; see ForwardPlan
    counters,  # [B + 1], zero before and after
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    losses_at, averages_at, pieces_at, per, samples, frames, channels, features, height, width,
    x_b, x_f, x_c, x_h, x_w, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, mask_b, mask_f,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, SPLITS: tl.constexpr, COLUMN_TILES: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    FRAMES: tl.constexpr, BATCH: tl.constexpr, AVERAGES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid [B·F·programs of a frame]. Strides of b, f, c, h are in units of VEC elements."""
    pid = tl.program_id(0)
    pieces_of_frame = channels * GRID_H * SPLITS
    programs = tl.cdiv(pieces_of_frame, per)
    per_sample = frames * programs
    sample = pid // per_sample
    frame = pid // programs % frames
    first_piece = pid % programs * per
    last_piece = tl.minimum(first_piece + per, pieces_of_frame)

    b, f = sample.to(tl.int64), frame.to(tl.int64)
    row = 3 * features + 1
    table = workspace + b * frames * row
    losses = workspace + losses_at
    averages, averages_along = average_of(pooled, workspace + averages_at, b, samples, features, COLUMNS)
    pieces = table
    if SPLITS > 1:
        pieces = workspace + pieces_at + b * SPLITS * frames * row

    if frame_validity(frame_mask, sample, frame, frames, mask_b, mask_f):
        x_frame = student + (b * x_b + f * x_f) * VEC, x_c, x_h, x_w
        r_frame = real + (b * r_b + f * r_f) * VEC, r_c, r_h, r_w
        f_frame = fake + (b * f_b + f * f_f) * VEC, f_c, f_h, f_w
        STEP: tl.constexpr = TILE_W if FLAT else TILE_H
        x, r, y = first_tile(
            x_frame, r_frame, f_frame, first_piece, last_piece, height, width,
            GRID_H, SPLITS, COLUMN_TILES, FLAT, VEC, TILE_H, TILE_W,
        )  # fmt: skip
        for piece in range(first_piece, last_piece):
            channel, gy, split, top, bottom, start, stop, left = piece_of(
                piece, height, width, GRID_H, SPLITS, COLUMN_TILES, FLAT, VEC, TILE_W
            )
            sum_x, sum_r = x.to(tl.float32), r.to(tl.float32)
            sum_d = difference_of(sum_r, y.to(tl.float32))
            for first in range(start + STEP, stop, STEP):
                line, column, inside = tile_of(first, stop, left, width, FLAT, VEC, TILE_H, TILE_W)
                sum_x += elements(x_frame, channel, top, width, line, column, inside, FLAT, VEC).to(tl.float32)
                more_r = elements(r_frame, channel, top, width, line, column, inside, FLAT, VEC).to(tl.float32)
                more_f = elements(f_frame, channel, top, width, line, column, inside, FLAT, VEC).to(tl.float32)
                sum_r += more_r
                sum_d += difference_of(more_r, more_f)
            x, r, y = first_tile(
                x_frame, r_frame, f_frame, piece + 1, last_piece, height, width,
                GRID_H, SPLITS, COLUMN_TILES, FLAT, VEC, TILE_H, TILE_W,
            )  # fmt: skip
            store_piece(
                pieces, split, f, frames, features, channel, gy, sum_x, sum_r, sum_d, left, width, top, bottom,
                GRID_H, GRID_W, FLAT, TILE_W, COLUMNS,
            )  # fmt: skip

    if takes_last(counters + sample, per_sample):
        finish_sample(
            pieces, table, averages, averages_along, frame_mask, sample, frames, features, mask_b, mask_f,
            SPLITS, BLOCK_F, AVERAGES, COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        if FRAMES:
            loss = relation_in_one_block(
                table, frames, features, number(numbers, TEMPERATURE, temperature),
                frame_grad + b * frames * features, 1.0 / samples, BLOCK_F, BLOCK_K,
            )  # fmt: skip
            tl.store(losses + sample, loss)
        if not COLUMNS:  # noqa: SIM102 (decided at compile time, the next at run time)
            if takes_last_of_any(counters + samples, samples):
                frame_term = 0.0
                batch_term = 0.0
                if FRAMES:
                    frame_term = ordered_sum(losses, samples, BLOCK_B) / samples
                if BATCH:
                    batch_term = relation_in_one_block(
                        workspace + averages_at, samples, features, number(numbers, TEMPERATURE, temperature),
                        batch_grad, 1.0, BLOCK_B, BLOCK_K,
                    )  # fmt: skip
                store_terms(terms, batch_term, frame_term, numbers, batch_weight, frame_weight)
