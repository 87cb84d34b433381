"""From moments to norms, the loss and one factor a sample: what the last block of the DMD pass computes.

Equal to the small algebra of ``codmd.ops.backends.moments``, in float64: ∂L/∂x = upstream · factor · G(d, norm). Of a
decoupled loss the moments give the norms alone; value and factors follow in :mod:`.decoupled`.
"""

import triton
import triton.language as tl

MOMENTS = tl.constexpr(6)
"""|x - r|, penalty, |d|, selected, NaN and non-finite-student elements."""

SCALE = tl.constexpr(2.0**20)
"""Sums hold |x - r|/SCALE, |d|/SCALE and penalty(d)·SCALE² in float32: neither sums of latents near the largest number
nor squares of differences down to 1e-25 leave its range. Differences beyond 1e13 make the loss inf."""

LEAST_SIZE = tl.constexpr(2.0**-140)
"""Least |x - r|/SCALE and |d|/SCALE but 0: tells sums that left the range, below LEAST_NORM, from those of zeros."""

LARGEST = tl.constexpr(3.4028234663852886e38)
LEAST_SQUARE, LEAST_NORM = tl.constexpr(2.0**-129), tl.constexpr(2.0**-100)
"""A mean square (times SCALE²) and a norm below these have lost digits; with the norm, the gradient's are lost too."""

NEGLIGIBLE_NORM = tl.constexpr(2.0**-34)
"""Where the norm is larger, squares that lost digits add less than 2^-100 to the loss."""


@triton.jit
def pseudo_huber_root(d, huber_c):
    """sqrt(d² + c²), |d| where d² leaves the range."""
    square = d * d
    return tl.where(square < float("inf"), tl.sqrt(square + huber_c * huber_c), tl.abs(d))


@triton.jit
def lost_digits(norm):
    """Whether a norm is so small that its sum lost digits."""
    return (norm > 0.0) & (norm < LEAST_NORM)


@triton.jit
def add_segments(
    pieces, stride, programs, frames, segments, sums,
    MOMENTS: tl.constexpr, BLOCK: tl.constexpr, FIRST_ALONE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """sums[moment, segment] float64 of one sample, from pieces[moment · stride + frame · programs + program].

    A warp adds one moment: no exchange between warps.
    """
    ROWS: tl.constexpr = triton.next_power_of_2(MOMENTS)
    moment = tl.arange(0, ROWS)[:, None]
    known = moment < MOMENTS
    for segment in range(0, segments):
        if FIRST_ALONE:
            first = tl.maximum(1 + (segment - 1) * BLOCK, 0)
            last = tl.minimum(1 + segment * BLOCK, frames)
        else:
            first = segment * BLOCK
            last = tl.minimum(first + BLOCK, frames)
        total = tl.zeros([ROWS, TILE], tl.float64)
        for start in range(first * programs, last * programs, TILE):
            at = start + tl.arange(0, TILE)[None, :]
            value = tl.load(pieces + moment * stride + at, mask=known & (at < last * programs), other=0.0)
            total += value.to(tl.float64)
        tl.store(sums + moment * segments + segment, tl.sum(total, 1, keep_dims=True), mask=known)


@triton.jit
def guarded(norm, eps, GUARD: tl.constexpr):
    """The norm as it divides: clamped to at least eps (a NaN stays), or plus eps."""
    if GUARD == "clamp":
        return tl.where(norm < eps, eps, norm)
    elif GUARD == "add":
        return norm + eps
    else:
        return norm


@triton.jit
def segment_norms(
    distance, s, frames, frame_size, eps, BLOCK: tl.constexpr, FIRST_ALONE: tl.constexpr, GUARD: tl.constexpr
):  # fmt: skip
    """The guarded norms of segments ``s``, from their sums of |x - r|/SCALE."""
    if FIRST_ALONE:
        first = tl.maximum(1 + (s - 1) * BLOCK, 0)
        last = tl.minimum(1 + s * BLOCK, frames)
    else:
        first = s * BLOCK
        last = tl.minimum(first + BLOCK, frames)
    elements = tl.maximum(last - first, 1).to(tl.float64) * frame_size
    norm = guarded(distance * SCALE / elements, eps, GUARD).to(tl.float32)
    if FIRST_ALONE:
        norm = tl.where(s == 0, 1.0, norm)
    return norm


@triton.jit
def store_norms(
    sums, norms, samples, frames, segments, frame_size, eps,
    SCOPE: tl.constexpr, BLOCK: tl.constexpr, FIRST_ALONE: tl.constexpr, GUARD: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Store the norms of one level of a decoupled loss, whose moment of [B, MOMENTS, segments] begins at ``sums``."""
    s = tl.arange(0, BLOCK_S)[None, :]
    whole = tl.zeros([BLOCK_B, BLOCK_S], tl.float64)
    for start in range(0, samples, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)[:, None]
        inside = (b < samples) & (s < segments)
        distance = tl.load(sums + b * MOMENTS * segments + s, mask=inside, other=0.0)
        whole += distance * SCALE
        if SCOPE != "batch":
            norm = segment_norms(distance, s, frames, frame_size, eps, BLOCK, FIRST_ALONE, GUARD)
            tl.store(norms + b * segments + s, norm, mask=inside)
    if SCOPE == "batch":
        mean = tl.sum(tl.sum(whole, 1), 0) / (samples.to(tl.float64) * frames * frame_size)
        tl.store(norms, guarded(mean, eps, GUARD).to(tl.float32))


@triton.jit
def weigh(
    loss, magnitude, wild, row, factors, sample_weight, weight_stride, samples, count, coefficient,
    HUBER: tl.constexpr, NAN: tl.constexpr, SUM: tl.constexpr, WEIGHT_SQUARED: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """(loss, Σ|g|) of samples ``row`` with their weights, divided by ``count`` if the loss is; stores the factors."""
    at_least_one = tl.maximum(count, 1.0)
    weight = tl.full([BLOCK_B], 1.0, tl.float64)
    if sample_weight is not None:
        weight = tl.load(sample_weight + row * weight_stride, mask=row < samples, other=0.0).to(tl.float64)
    if WEIGHT_SQUARED:
        magnitude = magnitude * tl.abs(weight)
    factor = coefficient * weight
    if not HUBER:
        factor = 2.0 * factor
    loss = tl.where(wild, float("nan"), loss)
    factor = tl.where(wild, float("nan"), factor)
    if NAN == "zero_sample":
        kept = loss == loss
        loss = tl.where(kept, loss, 0.0)
        factor = tl.where(kept, factor, 0.0)
    if WEIGHT_SQUARED:
        loss = loss * weight
    loss = loss * weight
    if not SUM:
        loss = loss / at_least_one
        factor = factor / at_least_one
    factor = tl.where(tl.zeros([BLOCK_B], tl.float64) + count > 0.0, factor, 0.0)
    tl.store(factors + row, factor.to(tl.float32), mask=row < samples)
    return tl.where(row < samples, loss, 0.0), magnitude


@triton.jit
def finish_loss(
    sums, norms, factors, sample_weight, weight_stride, samples, frames, segments, frame_size, eps, coefficient,
    SCOPE: tl.constexpr, BLOCK: tl.constexpr, FIRST_ALONE: tl.constexpr, GUARD: tl.constexpr, NAN: tl.constexpr,
    HUBER: tl.constexpr, SUM: tl.constexpr, LOSS_DIVIDED: tl.constexpr, WEIGHT_SQUARED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """(loss, mean|g|) from sums [B, MOMENTS, segments] float64; stores norms and factors [B]."""
    s = tl.arange(0, BLOCK_S)[None, :]
    distance = tl.zeros([BLOCK_B, BLOCK_S], tl.float64)
    count = tl.zeros([BLOCK_B, BLOCK_S], tl.float64)
    for start in range(0, samples, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)[:, None]
        inside = (b < samples) & (s < segments)
        at = sums + b * MOMENTS * segments + s
        distance += tl.load(at, mask=inside, other=0.0) * SCALE
        count += tl.load(at + 3 * segments, mask=inside, other=0.0)
    all_distance = tl.sum(tl.sum(distance, 1), 0)
    all_count = tl.sum(tl.sum(count, 1), 0)
    at_least_one = tl.maximum(all_count, 1.0)
    if SCOPE == "batch":
        whole = guarded(all_distance / (samples.to(tl.float64) * frames * frame_size), eps, GUARD).to(tl.float32)
        tl.store(norms, whole)

    total = tl.zeros([BLOCK_B], tl.float64)
    size = tl.zeros([BLOCK_B], tl.float64)
    for start in range(0, samples, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        b = row[:, None]
        inside = (b < samples) & (s < segments)
        at = sums + b * MOMENTS * segments + s
        if SCOPE == "batch":
            norm = whole.to(tl.float64) + tl.zeros([BLOCK_B, BLOCK_S], tl.float64)
        else:
            distances = tl.load(at, mask=inside, other=0.0)
            norm = segment_norms(distances, s, frames, frame_size, eps, BLOCK, FIRST_ALONE, GUARD)
            tl.store(norms + b * segments + s, norm, mask=inside)
            norm = norm.to(tl.float64)
        penalty = tl.load(at + segments, mask=inside, other=0.0)
        magnitude = tl.load(at + 2 * segments, mask=inside, other=0.0) * SCALE
        selected = tl.load(at + 3 * segments, mask=inside, other=0.0)
        nans = tl.load(at + 4 * segments, mask=inside, other=0.0)
        wild = tl.load(at + 5 * segments, mask=inside, other=0.0)
        wild = tl.max(tl.where(inside & lost_digits(norm), 1.0, wild), 1) > 0.0
        value = penalty / SCALE / SCALE / norm
        lost = (penalty < LEAST_SQUARE * selected) & (norm < NEGLIGIBLE_NORM) & (magnitude > 0.0)
        if not LOSS_DIVIDED:
            value = value / norm
            magnitude = magnitude / norm
        if NAN == "to_num":
            value = tl.where(value == value, value, 0.0)
            magnitude = tl.minimum(tl.where(magnitude == magnitude, magnitude, 0.0), LARGEST)
        else:
            value = tl.where(nans > 0.0, float("nan"), value)
            magnitude = tl.where(nans > 0.0, float("nan"), magnitude)
        value = tl.where(lost, float("nan"), value)
        loss = tl.sum(tl.where(inside & (selected > 0.0), value, 0.0), 1)
        size_here = tl.sum(tl.where(inside & (selected > 0.0), magnitude, 0.0), 1)
        loss, size_here = weigh(
            loss, size_here, wild, row, factors, sample_weight, weight_stride, samples, all_count, coefficient,
            HUBER, NAN, SUM, WEIGHT_SQUARED, BLOCK_B,
        )  # fmt: skip
        size += size_here
        total += loss
    return (coefficient * tl.sum(total, 0)).to(tl.float32), (tl.sum(size, 0) / at_least_one).to(tl.float32)
