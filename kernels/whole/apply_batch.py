"""The gradient of frame and batch relations of whole latents from their matrices alone, in one streaming pass.

With M_b of the frame relations and N of the batch relation, ψ_b = (1/n_b) Σ_f x_bf over the n_b valid frames:

    ∂L/∂x_bf = c_F Σ_g M_b,fg x_bg + (c_B/n_b)·valid_bf Σ_b' N_bb' ψ_b'

A program takes all samples of its columns, so that it has their time averages as soon as it has read them. Dots are
IEEE float32, over samples as their batch axis.
"""

import triton
import triton.language as tl

from ..blocks import BATCH_WEIGHT, FRAME_WEIGHT, number, upstream
from . import cores
from .gram_batch import load_samples, valid_count, valid_rows
from .stream import tile_address


@triton.jit
def apply_tiles(
    out, student, frame_mask, matrices, shared, frame_scale, split, samples, frames, runs, run_lines, length,
    o_b, o_f, o_c, o_h, o_w, x_b, x_f, x_c, x_h, x_w, mask_b, mask_f,
    SPLITS: tl.constexpr, SLICES: tl.constexpr, JOINED: tl.constexpr, VEC: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The gradient of bfloat16 and float16 latents: M in two parts by tensor cores, see :mod:`.cores`."""
    G: tl.constexpr = BLOCK_B * SLICES
    own = tl.arange(0, G) // SLICES
    i = tl.arange(0, BLOCK_N)
    valid = valid_rows(frame_mask, own, i, samples, frames, mask_b, mask_f)
    count, rows = valid_count(valid), valid[:, :, None]
    lane = cores.lanes(G, SLICES, BLOCK_L)
    tiles = runs * tl.cdiv(length, BLOCK_L)
    share = tl.cdiv(tiles, SPLITS)
    first, last = split * share, tl.minimum(tiles, split * share + share)
    at_x = cores.offsets(own, i, lane, x_b * VEC, x_f * VEC, x_w)
    at_o = cores.offsets(own, i, lane, o_b * VEC, o_f * VEC, o_w)
    written = (own < samples)[:, None, None] & (i < frames)[None, :, None]
    if matrices is not None:
        at = (own[:, None, None] * frames + i[None, :, None]) * frames + i[None, None, :]
        m = tl.load(matrices + at, mask=written & (i < frames)[None, None, :], other=0.0)
        high, low, scale = cores.scaled_parts(m, student.dtype.element_ty == tl.float16)
        scale *= frame_scale
    ones = tl.full([G, 16, BLOCK_N], 1.0, student.dtype.element_ty)
    # A masked frame's row of M is 0, and 0 times its values may be NaN: they are not read.
    x = cores.load_tile(student, at_x, lane, rows, first, last, run_lines, length, x_c, x_h, x_w, JOINED, VEC, BLOCK_L)
    for tile in range(first, last):
        coming = cores.load_tile(
            student, at_x, lane, rows, tile + 1, last, run_lines, length, x_c, x_h, x_w, JOINED, VEC, BLOCK_L
        )
        # Sixteen times the sum: a tensor core has no fewer rows.
        average = tl.sum(cores.applied(ones, x), 1) * 0.0625 / count
        average = tl.reshape(average, [BLOCK_B, BLOCK_L])
        mixed = tl.sum(shared[:, :, None] * average[None, :, :], 1)
        value = tl.reshape(mixed, [G, BLOCK_L // SLICES])[:, None, :]
        if matrices is not None:
            value += cores.applied_parts(high, low, x) * scale
        value = tl.where(rows, value, 0.0).to(out.dtype.element_ty)
        cores.store_tile(out, at_o, value, lane, written, tile, run_lines, length, o_c, o_h, o_w, JOINED, VEC, BLOCK_L)
        x = coming


@triton.jit(
    do_not_specialize=["samples", "frames", "runs", "run_lines"],
    do_not_specialize_on_alignment=[
        "frame_mask", "grad_total", "grad_batch", "grad_frame", "matrices", "batch_matrix", "numbers"
    ],
)  # fmt: skip
def apply_batch_kernel(
    out,  # [B, F, runs of `length` elements]
    student,  # the same
    frame_mask,  # [B, F], != 0 is valid, or None
    grad_total, grad_batch, grad_frame,  # scalars or None
    matrices,  # [B, F, F] or None
    batch_matrix,  # [1, B, B]
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    samples, frames, runs, run_lines, length, tiles,
    o_b, o_f, o_c, o_h, o_w, x_b, x_f, x_c, x_h, x_w, mask_b, mask_f,
    SPLITS: tl.constexpr, VEC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_J: tl.constexpr, SLICES: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Grid [SPLITS]. Strides of b, f, c, h are in units of VEC elements.

    SLICES of a tile, for each sample, go to tensor cores; 0: IEEE dots. JOINED: a vector is one run.
    """
    split = tl.program_id(0)
    b = tl.arange(0, BLOCK_B)
    i = tl.arange(0, BLOCK_N)
    valid = valid_rows(frame_mask, b, i, samples, frames, mask_b, mask_f)
    count = valid_count(valid)
    frame_scale = upstream(grad_total, number(numbers, FRAME_WEIGHT, frame_weight), grad_frame)
    pair = (b < samples)[:, None] & (b < samples)[None, :]
    shared = tl.load(batch_matrix + b[:, None] * samples + b[None, :], mask=pair, other=0.0)
    shared *= upstream(grad_total, number(numbers, BATCH_WEIGHT, batch_weight), grad_batch) / count

    if SLICES:
        apply_tiles(
            out, student, frame_mask, matrices, shared, frame_scale, split, samples, frames, runs, run_lines, length,
            o_b, o_f, o_c, o_h, o_w, x_b, x_f, x_c, x_h, x_w, mask_b, mask_f,
            SPLITS, SLICES, JOINED, VEC, BLOCK_B, BLOCK_N, BLOCK_L,
        )  # fmt: skip
        return
    per_run = tl.cdiv(length, BLOCK_L)
    share = tl.cdiv(tiles, SPLITS)
    lane = tl.arange(0, BLOCK_L)
    for tile in range(split * share, tl.minimum(tiles, split * share + share)):
        start = tile % per_run * BLOCK_L
        column = start + lane
        inside = lane // VEC < (length - start) // VEC
        x_at = tile_address(student, tile, per_run, run_lines, 0, x_b, x_c, x_h, VEC)
        value = tl.zeros([BLOCK_B, BLOCK_N, BLOCK_L], tl.float32)
        average = tl.zeros([BLOCK_B, BLOCK_L], tl.float32)
        for first in range(0, frames, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            # A masked frame's row of M is 0, and 0 times its values may be NaN: they are not read.
            kept = valid_rows(frame_mask, b, j, samples, frames, mask_b, mask_f)
            x = load_samples(x_at, b, j, kept, column, inside, x_b * VEC, x_f * VEC, x_w)
            average += tl.sum(x, 1)
            if matrices is not None:
                at = (b * frames)[:, None, None] + i[None, :, None]
                known = (b < samples)[:, None, None] & (i < frames)[None, :, None] & (j < frames)[None, None, :]
                m = tl.load(matrices + at * frames + j[None, None, :], mask=known, other=0.0)
                value = tl.dot(m, x, value, input_precision="ieee")
        if matrices is not None:
            value *= frame_scale
        average /= count
        value += tl.sum(shared[:, :, None] * average[None, :, :], 1)[:, None, :]
        value = tl.where(valid[:, :, None], value, 0.0).to(out.dtype.element_ty)
        o_at = tile_address(out, tile, per_run, run_lines, 0, o_b, o_c, o_h, VEC)
        o_at += b.to(tl.int64)[:, None, None] * (o_b * VEC) + i.to(tl.int64)[None, :, None] * (o_f * VEC)
        o_at += column.to(tl.int64)[None, None, :] * o_w
        written = (b < samples)[:, None, None] & (i < frames)[None, :, None] & inside[None, None, :]
        tl.store(o_at, value, mask=written)
