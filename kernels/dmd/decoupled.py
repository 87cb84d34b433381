"""Value, mean|g| and factors of a decoupled DMD loss, once the moments pass has found its norms (arXiv 2511.22677).

    g = nan(d₁/N₁) + nan(d₂/N₂)      d₁ = (f - c₁) + k_f (f - f_u)      d₂ = k (u₂ - c₂)

The halves cancel, and the policy repairs each of them, so neither Σ g² nor Σ|g| follows from sums that know no norm:
the predictions are read a second time. The student is not; whether it is finite, and what is selected, the moments
pass has counted.
"""

import triton
import triton.language as tl

from ..blocks import FAKE_SCALE, REAL_SCALE, number, takes_last, takes_last_of_any
from ..pooled.pool import piece_of, tile_of
from .algebra import MOMENTS, SCALE, add_segments, lost_digits, weigh
from .gradient import direction, norm_of_frame
from .scores import augmentation, difference, selection

TOTALS = tl.constexpr(2)
"""g² times SCALE², and |g|/SCALE."""


@triton.jit
def finish_value(
    sums, totals, norms, level_norms, factors, sample_weight, weight_stride, samples, segments, coefficient,
    SCOPE: tl.constexpr, NAN: tl.constexpr, SUM: tl.constexpr, WEIGHT_SQUARED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """(loss, mean|g|) from the moments' sums [B, MOMENTS, segments] and totals [B, TOTALS]; stores factors [B]."""
    s = tl.arange(0, BLOCK_S)[None, :]
    count = tl.zeros([BLOCK_B, BLOCK_S], tl.float64)
    for start in range(0, samples, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)[:, None]
        inside = (b < samples) & (s < segments)
        count += tl.load(sums + (b * MOMENTS + 3) * segments + s, mask=inside, other=0.0)
    all_count = tl.sum(tl.sum(count, 1), 0)

    loss = tl.zeros([BLOCK_B], tl.float64)
    magnitude = tl.zeros([BLOCK_B], tl.float64)
    for start in range(0, samples, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        b = row[:, None]
        inside = (b < samples) & (s < segments)
        wild = tl.load(sums + (b * MOMENTS + 5) * segments + s, mask=inside, other=0.0)
        norm_at = b * segments + s
        if SCOPE == "batch":
            norm_at = norm_at * 0
        for level in tl.static_range(2):
            norm = tl.load(norms + level * level_norms + norm_at, mask=inside, other=0.0)
            wild = tl.where(lost_digits(norm), 1.0, wild)
        wild = tl.max(wild, 1) > 0.0
        square = tl.load(totals + row * TOTALS, mask=row < samples, other=0.0) / SCALE / SCALE
        size = tl.load(totals + row * TOTALS + 1, mask=row < samples, other=0.0) * SCALE
        more = weigh(
            square, size, wild, row, factors, sample_weight, weight_stride, samples, all_count, coefficient,
            False, NAN, SUM, WEIGHT_SQUARED, BLOCK_B,
        )  # fmt: skip
        loss += more[0]
        magnitude += more[1]
    mean = tl.sum(magnitude, 0) / tl.maximum(all_count, 1.0)
    return (coefficient * tl.sum(loss, 0)).to(tl.float32), mean.to(tl.float32)


@triton.jit(
    do_not_specialize=["sums_at", "pieces_at", "samples", "frames", "channels", "segments"],
    do_not_specialize_on_alignment=[
        "sample_weight", "norms", "terms", "factors", "moments", "workspace", "counters", "numbers",
    ],
)  # fmt: skip
def decoupled_kernel(
    real, fake, fake_uncond, augment_real, augment_uncond,  # [B, F, C, H, W], any strides; fake_uncond or None
    mask,  # like the latents, or None
    sample_weight,  # [B] or None
    norms,  # [2, ...] as the moments pass left them
    terms,  # [5], the DMD loss and mean|g| still 0
    factors,  # [B]
    moments,  # the workspace of the moments pass
    workspace,  # totals [B, TOTALS] in float64, then their pieces [TOTALS, B, F, programs of a frame]
    counters,  # [B + 1], zero before and after
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    sums_at, pieces_at, samples, frames, channels, segments, height, width,
    r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, v_b, v_f, v_c, v_h, v_w,
    a_b, a_f, a_c, a_h, a_w, w_b, w_f, w_c, w_h, w_w, m_b, m_f, m_c, m_h, m_w, weight_b, level_norms, coefficient,
    SPLITS: tl.constexpr, COLUMN_TILES: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    SCOPE: tl.constexpr, BLOCK: tl.constexpr, FIRST_ALONE: tl.constexpr, NAN: tl.constexpr,
    SUM: tl.constexpr, WEIGHT_SQUARED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid [B·F·C·SPLITS]. Strides of b, f, c, h are in units of VEC elements, but for the mask's."""
    pid = tl.program_id(0)
    programs = channels * SPLITS
    per_sample = frames * programs
    sample = pid // per_sample
    frame = pid // programs % frames
    channel, _, _, _, _, start, stop, left = piece_of(
        pid % programs, height, width, 1, SPLITS, COLUMN_TILES, FLAT, VEC, TILE_W
    )
    b, f, c = sample.to(tl.int64), frame.to(tl.int64), channel.to(tl.int64)

    real_plane = (real + (b * r_b + f * r_f + c * r_c) * VEC, r_h, r_w)
    fake_plane = (fake + (b * f_b + f * f_f + c * f_c) * VEC, f_h, f_w)
    cond_plane = (augment_real + (b * a_b + f * a_f + c * a_c) * VEC, a_h, a_w)
    uncond_plane = (augment_uncond + (b * w_b + f * w_f + c * w_c) * VEC, w_h, w_w)
    fake_uncond_plane = (None, 0, 0)
    mask_plane = (None, 0, 0)
    if fake_uncond is not None:
        fake_uncond_plane = (fake_uncond + (b * v_b + f * v_f + c * v_c) * VEC, v_h, v_w)
    if mask is not None:
        mask_plane = (mask + b * m_b + f * m_f + c * m_c, m_h, m_w)
    norm = norm_of_frame(norms, sample, frame, segments, SCOPE, BLOCK, FIRST_ALONE)
    second_norm = norm_of_frame(norms + level_norms, sample, frame, segments, SCOPE, BLOCK, FIRST_ALONE)
    real_scale = number(numbers, REAL_SCALE, real_scale)
    fake_scale = number(numbers, FAKE_SCALE, fake_scale)

    square = tl.zeros([TILE_H, TILE_W], tl.float32)
    magnitude = tl.zeros([TILE_H, TILE_W], tl.float32)
    for first in range(start, stop, TILE_W if FLAT else TILE_H):
        line, column, inside = tile_of(first, stop, left, width, FLAT, VEC, TILE_H, TILE_W)
        d, _cond, _push = difference(
            real_plane, fake_plane, (None, 0, 0), fake_uncond_plane, None, real_scale, fake_scale,
            line, column, inside, VEC,
        )  # fmt: skip
        g = direction(d, norm, 0.0, False, NAN == "to_num")
        d = augmentation(cond_plane, uncond_plane, real_scale, line, column, inside, VEC)
        g += direction(d, second_norm, 0.0, False, NAN == "to_num")
        g = tl.where(selection(mask_plane, line, column, inside), g, 0.0)
        scaled = g * SCALE
        square += scaled * scaled
        magnitude += tl.abs(g) * (1.0 / SCALE)

    stride = samples.to(tl.int64) * frames * programs
    pieces = workspace + pieces_at
    piece = pieces + b * per_sample + f * programs + pid % programs
    tl.store(piece, tl.sum(tl.sum(square, 1), 0))
    tl.store(piece + stride, tl.sum(tl.sum(magnitude, 1), 0))

    if takes_last(counters + sample, per_sample):
        totals = workspace.to(tl.pointer_type(tl.float64), bitcast=True)
        add_segments(
            pieces + b * per_sample, stride, programs, frames, 1, totals + sample * TOTALS, TOTALS, WHOLE, False, 256
        )
        if takes_last_of_any(counters + samples, samples):
            sums = (moments + sums_at).to(tl.pointer_type(tl.float64), bitcast=True)
            dmd_loss, mean_g = finish_value(
                sums, totals, norms, level_norms, factors, sample_weight, weight_b, samples, segments, coefficient,
                SCOPE, NAN, SUM, WEIGHT_SQUARED, BLOCK_S, BLOCK_B,
            )  # fmt: skip
            tl.store(terms, dmd_loss + tl.load(terms))
            tl.store(terms + 1, dmd_loss)
            tl.store(terms + 4, mean_g)
