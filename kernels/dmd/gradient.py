"""The gradient of the DMD loss, of the pooled relation, or of both: predictions read once, gradient written once.

∂L/∂X = upstream · factor[b] · G(d, norm) + (c_F·frame_grad + c_B·batch_grad·valid/n_valid)/area, rounded once, where
G = repaired d/norm, or d/sqrt(d² + c²)/norm for the pseudo-Huber penalty; G(d₁, N₁) + G(d₂, N₂) if the loss is
decoupled. The student is not read; without the DMD loss nothing but ``out`` is touched.
"""

import triton
import triton.language as tl

from ..blocks import BATCH_WEIGHT, FAKE_SCALE, FRAME_WEIGHT, REAL_SCALE, RELATION_WEIGHT, number, upstream
from ..pooled.broadcast import plane_gradient
from ..pooled.pool import piece_of, tile_of
from .algebra import LARGEST, pseudo_huber_root
from .scores import augmentation, difference, segment_of, selection


@triton.jit
def direction(d, norm, huber_c, HUBER: tl.constexpr, REPAIR: tl.constexpr):
    """G(d, norm); with REPAIR NaN becomes 0 and ±inf the largest number."""
    if HUBER:
        d = d / pseudo_huber_root(d, huber_c)
    g = d / norm
    if REPAIR:
        g = tl.where(g == g, tl.minimum(tl.maximum(g, -LARGEST), LARGEST), 0.0)
    return g


@triton.jit
def norm_of_frame(
    norms, sample, frame, segments, SCOPE: tl.constexpr, BLOCK: tl.constexpr, FIRST_ALONE: tl.constexpr
):  # fmt: skip
    """The norm that divides a frame of a sample."""
    if SCOPE == "batch":
        return tl.load(norms)
    else:
        return tl.load(norms + sample * segments + segment_of(frame, BLOCK, FIRST_ALONE))


@triton.jit(
    do_not_specialize=["frames", "channels", "features", "segments"],
    do_not_specialize_on_alignment=[
        "sigma", "frame_mask", "norms", "factors", "grad_total", "grad_dmd", "grad_batch", "grad_frame",
        "frame_grad", "batch_grad", "numbers",
    ],
)  # fmt: skip
def gradient_kernel(
    out, real, fake, real_uncond, fake_uncond,  # [B, F, C, H, W], any strides; all but ``out`` or None
    augment_real, augment_uncond,  # the second level's predictions if the loss is decoupled, or None
    sigma,  # [B, F] or None
    mask,  # like the latents, or None
    frame_mask,  # [B, F] or None
    norms, factors,  # as the forward pass left them, or None
    grad_total, grad_dmd, grad_batch, grad_frame,  # scalars or None
    frame_grad,  # [B, F, K] or None
    batch_grad,  # [B, K] or None
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    frames, channels, features, segments, height, width,
    o_b, o_f, o_c, o_h, o_w, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w,
    u_b, u_f, u_c, u_h, u_w, v_b, v_f, v_c, v_h, v_w, a_b, a_f, a_c, a_h, a_w, w_b, w_f, w_c, w_h, w_w,
    m_b, m_f, m_c, m_h, m_w, sigma_b, sigma_f, mask_b, mask_f,
    level_norms,  # norms of one level
    huber_c,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, SPLITS: tl.constexpr, COLUMN_TILES: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    SCOPE: tl.constexpr, BLOCK: tl.constexpr, FIRST_ALONE: tl.constexpr,
    HUBER: tl.constexpr, REPAIR: tl.constexpr, DMD: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid [B·F·C·GRID_H·SPLITS]. Strides of b, f, c, h are in units of VEC elements, but for the mask's."""
    pid = tl.program_id(0)
    pieces = channels * GRID_H * SPLITS
    frame = pid // pieces % frames
    sample = pid // (pieces * frames)
    channel, gy, _, top, bottom, start, stop, left = piece_of(
        pid % pieces, height, width, GRID_H, SPLITS, COLUMN_TILES, FLAT, VEC, TILE_W
    )
    b, f, c = sample.to(tl.int64), frame.to(tl.int64), channel.to(tl.int64)
    skip = tl.zeros([], tl.int64)
    if FLAT:
        skip = top.to(tl.int64) * width // VEC * VEC
    out_at = out + (b * o_b + f * o_f + c * o_c) * VEC + skip

    relation = tl.zeros([1, TILE_W], tl.float32)
    if frame_grad is not None or batch_grad is not None:
        weight = number(numbers, RELATION_WEIGHT, relation_weight)
        batch_scale = upstream(grad_total, weight * number(numbers, BATCH_WEIGHT, batch_weight), grad_batch)
        frame_scale = upstream(grad_total, weight * number(numbers, FRAME_WEIGHT, frame_weight), grad_frame)
        relation += plane_gradient(
            frame_grad, batch_grad, frame_mask, batch_scale, frame_scale,
            sample, frame, channel, gy, frames, features, mask_b, mask_f, left, width, bottom - top,
            GRID_H, GRID_W, TILE_W, BLOCK_F,
        )  # fmt: skip

    if DMD:
        real_plane = (real + (b * r_b + f * r_f + c * r_c) * VEC + skip, r_h, r_w)
        fake_plane = (fake + (b * f_b + f * f_f + c * f_c) * VEC + skip, f_h, f_w)
        real_uncond_plane = (None, 0, 0)
        fake_uncond_plane = (None, 0, 0)
        mask_plane = (None, 0, 0)
        if real_uncond is not None:
            real_uncond_plane = (real_uncond + (b * u_b + f * u_f + c * u_c) * VEC + skip, u_h, u_w)
        if fake_uncond is not None:
            fake_uncond_plane = (fake_uncond + (b * v_b + f * v_f + c * v_c) * VEC + skip, v_h, v_w)
        if mask is not None:
            mask_plane = (mask + b * m_b + f * m_f + c * m_c + skip * m_w, m_h, m_w)
        level = None
        if sigma is not None:
            level = tl.load(sigma + b * sigma_b + f * sigma_f).to(tl.float32)
        norm = norm_of_frame(norms, sample, frame, segments, SCOPE, BLOCK, FIRST_ALONE)
        if augment_real is not None:
            cond_plane = (augment_real + (b * a_b + f * a_f + c * a_c) * VEC + skip, a_h, a_w)
            uncond_plane = (augment_uncond + (b * w_b + f * w_f + c * w_c) * VEC + skip, w_h, w_w)
            second_norm = norm_of_frame(norms + level_norms, sample, frame, segments, SCOPE, BLOCK, FIRST_ALONE)
        factor = tl.load(factors + sample) * upstream(grad_total, 1.0, grad_dmd)
        real_scale = number(numbers, REAL_SCALE, real_scale)
        fake_scale = number(numbers, FAKE_SCALE, fake_scale)

    for first in range(start, stop, TILE_W if FLAT else TILE_H):
        line, column, inside = tile_of(first, stop, left, width, FLAT, VEC, TILE_H, TILE_W)
        value = relation + tl.zeros([TILE_H, TILE_W], tl.float32)
        if DMD:
            d, _cond, _push = difference(
                real_plane, fake_plane, real_uncond_plane, fake_uncond_plane, level, real_scale, fake_scale,
                line, column, inside, VEC,
            )  # fmt: skip
            g = direction(d, norm, huber_c, HUBER, REPAIR)
            if augment_real is not None:
                d = augmentation(cond_plane, uncond_plane, real_scale, line, column, inside, VEC)
                g += direction(d, second_norm, huber_c, HUBER, REPAIR)
            g = factor * g
            kept = selection(mask_plane, line, column, inside) & (
                tl.zeros([TILE_H, TILE_W], tl.float32) + factor != 0.0
            )
            value += tl.where(kept, g, 0.0)
        tl.store(out_at + line * o_h * VEC + column * o_w, value.to(out.dtype.element_ty), mask=inside)
