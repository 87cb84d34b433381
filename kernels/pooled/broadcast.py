"""The gradient of the pooled relation: broadcast feature gradients over their regions, in the student's dtype.

∂L/∂X[b, f, c, y, x] = (c_F·frame_grad[b, f, k] + c_B·batch_grad[b, k]·valid[b, f]/n_valid[b]) / area(k), where k is
the region of (c, y, x), c_F = grad_total·frame_weight + grad_frame and c_B = grad_total·batch_weight + grad_batch.
One launch that only writes the latent: the student is not read.
"""

import triton
import triton.language as tl

from ..blocks import frame_validity, upstream


@triton.jit
def region_value(frame_grad, batch_grad, frame_row, batch_row, gx, frame_scale, batch_scale):
    """c_F·frame_grad + c_B·batch_grad of regions gx; a missing gradient is 0."""
    if frame_grad is None:
        return batch_scale * tl.load(batch_grad + batch_row + gx)
    elif batch_grad is None:
        return frame_scale * tl.load(frame_grad + frame_row + gx)
    else:
        value = frame_scale * tl.load(frame_grad + frame_row + gx)
        return value + batch_scale * tl.load(batch_grad + batch_row + gx)


@triton.jit
def plane_gradient(
    frame_grad, batch_grad, frame_mask, grad_total, grad_batch, grad_frame, batch_weight, frame_weight,
    sample, frame, channel, gy, frames, features, mask_b, mask_f, left, width, lines,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, TILE_W: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The gradient of a row of region gy, [1, TILE_W] from column ``left`` on; one number if GRID_W is 1."""
    frame_scale = upstream(grad_total, frame_weight, grad_frame)
    batch_scale = upstream(grad_total, batch_weight, grad_batch)
    kept = frame_validity(frame_mask, sample, frame, frames, mask_b, mask_f)
    if frame_mask is not None:
        every = tl.arange(0, BLOCK_F)
        counted = frame_validity(frame_mask, sample, every, frames, mask_b, mask_f)
        batch_scale = batch_scale / tl.maximum(tl.sum(counted.to(tl.float32), 0), 1.0)
    else:
        batch_scale = batch_scale / frames
    b = sample.to(tl.int64)
    first = (channel * GRID_H + gy) * GRID_W
    frame_row = (b * frames + frame) * features + first
    batch_row = b * features + first
    if GRID_W > 1:
        column = left + tl.arange(0, TILE_W)[None, :]
        gx = tl.minimum(((column + 1) * GRID_W - 1) // width, GRID_W - 1)
        span = (gx + 1) * width // GRID_W - gx * width // GRID_W
        value = region_value(frame_grad, batch_grad, frame_row, batch_row, gx, frame_scale, batch_scale)
        kept = kept & (column >= 0)
        return tl.where(kept, value / (lines * span).to(tl.float32), 0.0)
    else:
        value = region_value(frame_grad, batch_grad, frame_row, batch_row, 0, frame_scale, batch_scale)
        return tl.where(kept, value / (lines * width).to(tl.float32), 0.0)


@triton.jit(
    do_not_specialize=["frames", "channels", "features"],
    do_not_specialize_on_alignment=[
        "frame_mask", "grad_total", "grad_batch", "grad_frame", "frame_grad", "batch_grad"
    ],
)  # fmt: skip
def broadcast_kernel(
    out,  # [B, F, C, H, W], any strides
    frame_mask,  # [B, F] or None
    grad_total, grad_batch, grad_frame,  # scalars or None
    frame_grad,  # [B, F, K] or None
    batch_grad,  # [B, K] or None
    batch_weight, frame_weight,
    frames, channels, features, height, width,
    o_b, o_f, o_c, o_h, o_w, mask_b, mask_f,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, SPLITS: tl.constexpr, COLUMN_TILES: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid [B·F·C·GRID_H·SPLITS]. Strides of b, f, c, h are in units of VEC elements."""
    pid = tl.program_id(0)
    split = pid % SPLITS
    gy = pid // SPLITS % GRID_H
    channel = pid // (SPLITS * GRID_H) % channels
    frame = pid // (SPLITS * GRID_H * channels) % frames
    sample = pid // (SPLITS * GRID_H * channels * frames)
    b, f, c = sample.to(tl.int64), frame.to(tl.int64), channel.to(tl.int64)
    top = gy * height // GRID_H
    bottom = (gy + 1) * height // GRID_H
    at = out + (b * o_b + f * o_f + c * o_c) * VEC
    i = tl.arange(0, TILE_W)
    left = 0
    if not FLAT:
        left = split % COLUMN_TILES * TILE_W
    column = left + i
    value = tl.zeros([1, TILE_W], tl.float32) + plane_gradient(
        frame_grad, batch_grad, frame_mask, grad_total, grad_batch, grad_frame, batch_weight, frame_weight,
        sample, frame, channel, gy, frames, features, mask_b, mask_f, left, width, bottom - top,
        GRID_H, GRID_W, TILE_W, BLOCK_F,
    )  # fmt: skip
    value = value.to(out.dtype.element_ty)

    if FLAT:
        size = (bottom - top) * width
        run = tl.cdiv(tl.cdiv(size, TILE_W), SPLITS) * TILE_W
        stop = tl.minimum(size, split * run + run)
        at += top.to(tl.int64) * width // VEC * VEC
        for first in range(split * run, stop, TILE_W):
            tl.store(at + first + i[None, :], value, mask=(i // VEC < (stop - first) // VEC)[None, :])
    else:
        lines = tl.cdiv(bottom - top, SPLITS // COLUMN_TILES)
        start = top + split // COLUMN_TILES * lines
        end = tl.minimum(bottom, start + lines)
        inside = (i // VEC < (width - left) // VEC)[None, :]
        tile = tl.broadcast_to(value, [TILE_H, TILE_W])
        for first in range(start, end, TILE_H):
            y = first + tl.arange(0, TILE_H)[:, None]
            offset = y.to(tl.int64) * o_h * VEC + column.to(tl.int64)[None, :] * o_w
            tl.store(at + offset, tile, mask=(y < end) & inside)
