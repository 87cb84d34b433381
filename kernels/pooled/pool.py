"""One launch: read student, real and fake once, pool them to features, and finish the relation in the last block.

A program averages one piece of one region of one (sample, frame, channel) plane: Σx, Σr and Σ(f - r) in float32.
The block that completes a sample adds the pieces in a fixed order, writes the sample's feature table
``[F, 3K + 1]`` (see :mod:`.algebra`) and its row ``[3K + 1]`` of time averages, and computes the frame
term; the block that completes the last sample computes the batch term and the total. Feature k = (c, gy, gx).
"""

import triton
import triton.language as tl

from ..blocks import TEMPERATURE, difference_of, frame_validity, number, ordered_sum, store_terms, takes_last
from .algebra import relation_in_one_block

UNROLL = tl.constexpr(4)


@triton.jit
def load_triple(student, real, fake, at_x, at_r, at_f, mask):
    """x, r and f - r as float32; half-precision arithmetic never happens."""
    x = tl.load(student + at_x, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(real + at_r, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(fake + at_f, mask=mask, other=0.0).to(tl.float32)
    return x, r, difference_of(r, f)


@triton.jit
def sum_run(student, real, fake, start, stop, TILE: tl.constexpr, VEC: tl.constexpr):
    """Σx, Σr, Σd of elements ``start : stop`` of three contiguous planes; both multiples of VEC."""
    i = tl.arange(0, TILE)
    x = tl.zeros([TILE], tl.float32)
    r = tl.zeros([TILE], tl.float32)
    d = tl.zeros([TILE], tl.float32)
    for first in range(start, stop, TILE):
        at = first + i
        # The comparison is per vector of VEC elements: that is what lets a masked load stay 16 bytes wide.
        more = load_triple(student, real, fake, at, at, at, i // VEC < (stop - first) // VEC)
        x += more[0]
        r += more[1]
        d += more[2]
    return tl.sum(x, 0), tl.sum(r, 0), tl.sum(d, 0)


@triton.jit
def sum_columns(
    student, real, fake, top, bottom, left, width, x_h, x_w, r_h, r_w, f_h, f_w,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Column sums [TILE_W] of x, r, d over rows ``top : bottom``, columns ``left : left + TILE_W`` (< width)."""
    i = tl.arange(0, TILE_W)
    column = (left + i).to(tl.int64)[None, :]
    inside = (i // VEC < (width - left) // VEC)[None, :]
    x = tl.zeros([TILE_H, TILE_W], tl.float32)
    r = tl.zeros([TILE_H, TILE_W], tl.float32)
    d = tl.zeros([TILE_H, TILE_W], tl.float32)
    for first in range(top, bottom, TILE_H):
        y = first + tl.arange(0, TILE_H)[:, None]
        line = y.to(tl.int64)
        more = load_triple(
            student, real, fake,
            line * x_h * VEC + column * x_w, line * r_h * VEC + column * r_w, line * f_h * VEC + column * f_w,
            (y < bottom) & inside,
        )  # fmt: skip
        x += more[0]
        r += more[1]
        d += more[2]
    return tl.sum(x, 0), tl.sum(r, 0), tl.sum(d, 0)


@triton.jit
def store_regions(at, features, x, r, d, left, width, top, bottom, GRID_W: tl.constexpr, TILE_W: tl.constexpr):
    """Add the columns of each of GRID_W regions, divide by the region's area, store at ``at + gx``."""
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
        out = at + gx
        kept = gx < GRID_W
        tl.store(out, tl.sum(tl.where(chosen, x[None, :], 0.0), 1) * share, mask=kept)
        tl.store(out + features, tl.sum(tl.where(chosen, r[None, :], 0.0), 1) * share, mask=kept)
        tl.store(out + 2 * features, tl.sum(tl.where(chosen, d[None, :], 0.0), 1) * share, mask=kept)


@triton.jit
def finish_sample(
    pieces, table, pooled, frame_mask, sample, frames, features, mask_b, mask_f,
    SPLITS: tl.constexpr, BLOCK_F: tl.constexpr, AVERAGES: tl.constexpr,
):  # fmt: skip
    """Complete one sample's table [F, 3K + 1] from its pieces [SPLITS, F, 3K + 1]; and its time averages [3K + 1]."""
    frame = tl.arange(0, BLOCK_F)[:, None]
    valid = frame_validity(frame_mask, sample, frame, frames, mask_b, mask_f)
    weight = valid.to(tl.float32)
    columns = 3 * features
    line = frame * (columns + 1)
    tl.store(table + line + columns, weight, mask=frame < frames)
    if AVERAGES:
        count = tl.sum(tl.sum(weight, 1), 0)
        tl.store(pooled + columns, count)
    if SPLITS > 1 or frame_mask is not None or AVERAGES:
        BLOCK_R: tl.constexpr = 2048 // BLOCK_F
        for first in range(0, columns, BLOCK_R):
            k = first + tl.arange(0, BLOCK_R)[None, :]
            at = line + k
            value = tl.load(pieces + at, mask=valid & (k < columns), other=0.0)
            for split in tl.range(1, SPLITS, loop_unroll_factor=UNROLL):
                more = pieces + split * frames * (columns + 1) + at
                value += tl.load(more, mask=valid & (k < columns), other=0.0)
            if SPLITS > 1 or frame_mask is not None:
                # Invalid frames get zeros, so that a zero weight can multiply them.
                tl.store(table + at, value, mask=(frame < frames) & (k < columns))
            if AVERAGES:
                average = tl.sum(value, 0, keep_dims=True) / tl.maximum(count, 1.0)
                tl.store(pooled + k, average, mask=k < columns)


@triton.jit(
    do_not_specialize=[
        "losses_at", "averages_at", "pieces_at", "samples", "frames", "channels", "features"
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
    # SPLITS > 1; see ForwardPlan
    counters,  # [B + 1], zero before and after
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    losses_at, averages_at, pieces_at, samples, frames, channels, features, height, width,
    x_b, x_f, x_c, x_h, x_w, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, mask_b, mask_f,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, SPLITS: tl.constexpr, COLUMN_TILES: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    FRAMES: tl.constexpr, BATCH: tl.constexpr, AVERAGES: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Grid [B·F·C·GRID_H·SPLITS]. Strides of b, f, c, h are in units of VEC elements."""
    pid = tl.program_id(0)
    per_sample = frames * channels * GRID_H * SPLITS
    sample = pid // per_sample
    split = pid % SPLITS
    gy = pid // SPLITS % GRID_H
    channel = pid // (SPLITS * GRID_H) % channels
    frame = pid // (SPLITS * GRID_H * channels) % frames

    b, f, c = sample.to(tl.int64), frame.to(tl.int64), channel.to(tl.int64)
    row = 3 * features + 1
    table = workspace + b * frames * row
    losses = workspace + losses_at
    if pooled is None:
        averages = workspace + averages_at
    else:
        averages = pooled
    pieces = table
    if SPLITS > 1:
        pieces = workspace + pieces_at + b * SPLITS * frames * row
    at = pieces + (split * frames + f) * row + (channel * GRID_H + gy) * GRID_W

    if frame_validity(frame_mask, sample, frame, frames, mask_b, mask_f):
        top = gy * height // GRID_H
        bottom = (gy + 1) * height // GRID_H
        x_at = student + (b * x_b + f * x_f + c * x_c) * VEC
        r_at = real + (b * r_b + f * r_f + c * r_c) * VEC
        f_at = fake + (b * f_b + f * f_f + c * f_c) * VEC
        if FLAT:
            size = (bottom - top) * width
            run = tl.cdiv(tl.cdiv(size, TILE_W), SPLITS) * TILE_W
            skip = top.to(tl.int64) * width // VEC * VEC
            x, r, d = sum_run(
                x_at + skip, r_at + skip, f_at + skip, split * run, tl.minimum(size, split * run + run), TILE_W, VEC
            )
            share = 1.0 / size.to(tl.float32)
            tl.store(at, x * share)
            tl.store(at + features, r * share)
            tl.store(at + 2 * features, d * share)
        else:
            lines = tl.cdiv(bottom - top, SPLITS // COLUMN_TILES)
            left = split % COLUMN_TILES * TILE_W
            start = top + split // COLUMN_TILES * lines
            x, r, d = sum_columns(
                x_at, r_at, f_at, start, tl.minimum(bottom, start + lines), left, width,
                x_h, x_w, r_h, r_w, f_h, f_w, TILE_H, TILE_W, VEC,
            )  # fmt: skip
            store_regions(at, features, x, r, d, left, width, top, bottom, GRID_W, TILE_W)

    if takes_last(counters + sample, per_sample):
        finish_sample(
            pieces, table, averages + b * row, frame_mask, sample, frames, features, mask_b, mask_f,
            SPLITS, BLOCK_F, AVERAGES,
        )  # fmt: skip
        tl.debug_barrier()
        if FRAMES:
            loss = relation_in_one_block(
                table, frames, features, number(numbers, TEMPERATURE, temperature),
                frame_grad + b * frames * features, 1.0 / samples, BLOCK_F, BLOCK_K,
            )  # fmt: skip
            tl.store(losses + sample, loss)
        if TERMS:  # noqa: SIM102 (decided at compile time, the next at run time)
            if takes_last(counters + samples, samples):
                frame_term = 0.0
                batch_term = 0.0
                if FRAMES:
                    frame_term = ordered_sum(losses, samples, BLOCK_B) / samples
                if BATCH:
                    batch_term = relation_in_one_block(
                        averages, samples, features, number(numbers, TEMPERATURE, temperature), batch_grad, 1.0,
                        BLOCK_B, BLOCK_K,
                    )  # fmt: skip
                store_terms(terms, batch_term, frame_term, numbers, batch_weight, frame_weight)
