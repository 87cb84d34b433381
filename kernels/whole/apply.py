"""The gradient of a whole-latent relation: one streaming pass ∂L/∂X = c_F·M X + c_B·valid/n_valid·batch_grad.

Dots are IEEE float32. The same pass turns the batch relation's M and the gathered averages into the batch gradient.
"""

import triton
import triton.language as tl

from ..blocks import BATCH_WEIGHT, FRAME_WEIGHT, frame_validity, number, upstream
from . import cores


@triton.jit
def apply_tiles(
    out, student, frame_mask, matrices, batch_grad, frame_scale, batch_scale, sample, split,
    frames, runs, run_lines, length, o_f, o_c, o_h, o_w, x_b, x_f, x_c, x_h, x_w, mask_b, mask_f,
    SPLITS: tl.constexpr, SLICES: tl.constexpr, JOINED: tl.constexpr, VEC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The gradient of bfloat16 and float16 latents: M in two parts by tensor cores, see :mod:`.cores`."""
    b = sample.to(tl.int64)
    own = tl.zeros([SLICES], tl.int32)
    i = tl.arange(0, BLOCK_N)
    valid = tl.broadcast_to(
        frame_validity(frame_mask, sample, i, frames, mask_b, mask_f)[None, :, None], [SLICES, BLOCK_N, 1]
    )
    lane = cores.lanes(SLICES, SLICES, BLOCK_L)
    tiles = runs * tl.cdiv(length, BLOCK_L)
    share = tl.cdiv(tiles, SPLITS)
    first, last = split * share, tl.minimum(tiles, split * share + share)
    at_x = cores.offsets(own, i, lane, 0, x_f * VEC, x_w)
    at_o = cores.offsets(own, i, lane, 0, o_f * VEC, o_w)
    if matrices is not None:
        student += b * x_b * VEC
        row, column = i[None, :, None], i[None, None, :]
        known = (row < frames) & (column < frames)
        m = tl.load(matrices + b * frames * frames + row * frames + column, mask=known, other=0.0)
        high, low, scale = cores.scaled_parts(m, student.dtype.element_ty == tl.float16)
        high = tl.broadcast_to(high, [SLICES, BLOCK_N, BLOCK_N])
        low = tl.broadcast_to(low, [SLICES, BLOCK_N, BLOCK_N])
        scale *= frame_scale
        # A masked frame's row of M is 0, and 0 times its values may be NaN: they are not read.
        x = cores.load_tile(
            student, at_x, lane, valid, first, last, run_lines, length, x_c, x_h, x_w, JOINED, VEC, BLOCK_L
        )
    for tile in range(first, last):
        run, start = cores.place(tile, length, JOINED, BLOCK_L)
        value = tl.zeros([SLICES, BLOCK_N, BLOCK_L // SLICES], tl.float32)
        if matrices is not None:
            coming = cores.load_tile(
                student, at_x, lane, valid, tile + 1, last, run_lines, length, x_c, x_h, x_w, JOINED, VEC, BLOCK_L
            )
            value = cores.applied_parts(high, low, x) * scale
            x = coming
        if batch_grad is not None:
            at = batch_grad + b * runs * length + tl.cast(run, tl.int64) * length + start
            value += batch_scale * tl.load(at + lane, mask=lane // VEC < (length - start) // VEC, other=0.0)
        value = tl.where(valid, value, 0.0).to(out.dtype.element_ty)
        cores.store_tile(
            out, at_o, value, lane, (i < frames)[None, :, None], tile, run_lines, length, o_c, o_h, o_w,
            JOINED, VEC, BLOCK_L,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["frames", "runs", "run_lines", "first_row", "rows"],
    do_not_specialize_on_alignment=[
        "frame_mask", "grad_total", "grad_batch", "grad_frame", "matrices", "batch_grad", "numbers"
    ],
)  # fmt: skip
def apply_kernel(
    out,  # [B, rows, runs of `length` elements]
    student,  # [B, F, runs of `length` elements], read if matrices is not None
    frame_mask,  # [B, F], != 0 is valid, or None
    grad_total, grad_batch, grad_frame,  # scalars or None; all None: the weights are the scales
    matrices,  # [B, F, F] or None; of the batch term if EXCHANGED
    batch_grad,  # [B, K] or None
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    frames, runs, run_lines, length, tiles, first_row, rows,
    o_b, o_f, o_c, o_h, o_w, x_b, x_f, x_c, x_h, x_w, mask_b, mask_f,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_F: tl.constexpr, EXCHANGED: tl.constexpr, SLICES: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Grid [B·SPLITS·BLOCKS]. Rows ``first_row : first_row + rows`` of the product go to ``out``.

    SLICES of a tile go to tensor cores, all rows in one block; 0: IEEE dots. JOINED: a vector is one run.
    """
    pid = tl.program_id(0)
    block = pid % BLOCKS
    split = pid // BLOCKS % SPLITS
    sample = pid // (BLOCKS * SPLITS)
    b = sample.to(tl.int64)
    i = first_row + block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_inside = i < first_row + rows
    i_valid = frame_validity(frame_mask, sample, i, frames, mask_b, mask_f)
    batch_scale = number(numbers, BATCH_WEIGHT, batch_weight)
    frame_scale = number(numbers, FRAME_WEIGHT, frame_weight)
    if grad_total is not None or grad_frame is not None:
        frame_scale = upstream(grad_total, frame_scale, grad_frame)
    if grad_total is not None or grad_batch is not None:
        batch_scale = upstream(grad_total, batch_scale, grad_batch)
    if EXCHANGED:
        frame_scale = batch_scale
    every = tl.arange(0, BLOCK_F)
    counted = frame_validity(frame_mask, sample, every, frames, mask_b, mask_f)
    batch_scale = batch_scale / tl.maximum(tl.sum(counted.to(tl.float32), 0), 1.0)

    if SLICES:
        apply_tiles(
            out + b * o_b * VEC, student, frame_mask, matrices, batch_grad, frame_scale, batch_scale, sample, split,
            frames, runs, run_lines, length, o_f, o_c, o_h, o_w, x_b, x_f, x_c, x_h, x_w, mask_b, mask_f,
            SPLITS, SLICES, JOINED, VEC, BLOCK_N, BLOCK_L,
        )  # fmt: skip
        return
    per_run = tl.cdiv(length, BLOCK_L)
    share = tl.cdiv(tiles, SPLITS)
    lane = tl.arange(0, BLOCK_L)[None, :]
    for tile in range(split * share, tl.minimum(tiles, split * share + share)):
        run = tile // per_run
        start = tile % per_run * BLOCK_L
        c, h = (run // run_lines).to(tl.int64), (run % run_lines).to(tl.int64)
        column = (start + lane).to(tl.int64)
        inside = lane // VEC < (length - start) // VEC
        value = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        if matrices is not None:
            x_at = student + (b * x_b + c * x_c + h * x_h) * VEC + column * x_w
            row_at = matrices + b * frames * frames + i
            for first in range(0, frames, BLOCK_J):
                j = first + tl.arange(0, BLOCK_J)
                # A masked frame's row of M is 0, and 0 times its values may be NaN: they are not read.
                kept = frame_validity(frame_mask, sample, j, frames, mask_b, mask_f)
                x = tl.load(x_at + j.to(tl.int64)[:, None] * x_f * VEC, mask=inside & kept[:, None], other=0.0)
                m = tl.load(row_at + j[None, :] * frames, mask=(i < frames) & (j < frames)[None, :], other=0.0)
                value = tl.dot(m, x.to(tl.float32), value, input_precision="ieee")
            value *= frame_scale
        if batch_grad is not None:
            features = runs.to(tl.int64) * length
            at = batch_grad + b * features + tl.cast(run, tl.int64) * length + column
            value += batch_scale * tl.load(at, mask=inside, other=0.0)
        value = tl.where(i_valid, value, 0.0).to(out.dtype.element_ty)
        o_at = out + (b * o_b + c * o_c + h * o_h) * VEC + column * o_w
        tl.store(o_at + (i - first_row).to(tl.int64) * o_f * VEC, value, mask=i_inside & inside)
