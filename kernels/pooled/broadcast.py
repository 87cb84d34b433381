"""The gradient of the pooled relation: broadcast feature gradients over their regions, in the student's dtype.

∂L/∂X[b, f, c, y, x] = (c_F·frame_grad[b, f, k] + c_B·batch_grad[b, k]·valid[b, f]/n_valid[b]) / area(k), where k is
the region of (c, y, x), c_F = grad_total·λ·w_F + grad_frame and c_B = grad_total·λ·w_B + grad_batch.
The gradient pass (:mod:`..dmd.gradient`) writes it, alone or with the DMD gradient.
"""

import triton
import triton.language as tl

from ..blocks import frame_validity


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
    frame_grad, batch_grad, frame_mask, batch_scale, frame_scale,
    sample, frame, channel, gy, frames, features, mask_b, mask_f, left, width, lines,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, TILE_W: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The gradient of a row of region gy, [1, TILE_W] from column ``left`` on; one number if GRID_W is 1."""
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
