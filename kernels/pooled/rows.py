"""The relation of many vectors, or of gathered ones, in two launches: rows of G, then rows of the gradient.

A program of the first has S and Δ of a few rows against all n columns in registers, feature by feature, and leaves
their KL, G and S. A program of the second adds a row's H = G + Gᵀ over x̂. The launch between them stands for a barrier
of all programs: a row of the gradient needs a column of G, of which every other program has an element.

Tables of frames and averages lie feature by feature here, [3K + 1, n], so that neighbouring lanes read neighbouring
vectors; gathered rows lie as they came, [n, 3K + 1].
"""

import triton
import triton.language as tl

from ..blocks import (
    TEMPERATURE,
    number,
    ordered_sum,
    store_objective_terms,
    store_terms,
    store_tile,
    unit_diagonal,
    unless_alone,
)
from ..divergence import divergence_rows
from .algebra import norms_of, scores_of

UNROLL = tl.constexpr(8)


@triton.jit
def relation_of(
    source, gathered, shares, relation, samples, frames, batch_count, features, averages_at, rooms_at, frame_room
):  # fmt: skip
    """Of a relation: table, its strides of a vector and of a feature, n, and its room, see :class:`.plans.RowsPlan`.

    Relations below ``samples`` are those of frames, the next is that of samples.
    """
    b = relation.to(tl.int64)
    room = shares + rooms_at + b * frame_room
    row = 3 * features + 1
    is_frame = relation < samples
    count = tl.where(is_frame, frames, batch_count)
    if gathered is None:
        return source + tl.where(is_frame, b * frames * row, averages_at), 1, count, count, room
    else:
        base = gathered
        if is_frame:
            base = source + b * frames * row
        return base, tl.where(is_frame, 1, row), tl.where(is_frame, count, 1), count, room


@triton.jit
def feature(base, v, valid, across, along, features, k):
    """x, r, d of feature k of the vectors v that are ``valid``; 0 elsewhere."""
    at = base + v * across + k * along
    x = tl.load(at, mask=valid, other=0.0)
    r = tl.load(at + features * along, mask=valid, other=0.0)
    d = tl.load(at + 2 * features * along, mask=valid, other=0.0)
    return x, r, d


@triton.jit
def vector_norms(base, v, valid, across, along, features):
    """:func:`.algebra.norms_of` of vectors v, whatever their shape."""
    xx = tl.zeros(v.shape, tl.float32)
    rr = tl.zeros(v.shape, tl.float32)
    ff = tl.zeros(v.shape, tl.float32)
    dd = tl.zeros(v.shape, tl.float32)
    for k in tl.range(0, features, loop_unroll_factor=UNROLL):
        x, r, d = feature(base, v, valid, across, along, features, k)
        f = r + d
        xx += x * x
        rr += r * r
        ff += f * f
        dd += d * (f + r)
    return norms_of(xx, rr, ff, dd)


@triton.jit(
    do_not_specialize=[
        "averages_at", "shares_at", "samples", "frames", "features", "frame_blocks", "batch_count", "rooms_at",
        "frame_room",
    ],
    do_not_specialize_on_alignment=["source", "gathered", "workspace", "numbers"],
)  # fmt: skip
def relation_rows_kernel(
    source,  # tables [B, 3K + 1, F], and averages [3K + 1, B] from averages_at on
    gathered,  # [N, 3K + 1] in place of the source's averages, or None
    workspace,  # from shares_at on: KL of every program, then from rooms_at on there a room of every relation of n
    # vectors: 1/n_x [n], 0 where a vector does not take part, S [n, n] and G [n, n]
    numbers,  # [6] or None: the value that follows
    temperature,
    averages_at, shares_at, samples, frames, features, frame_blocks, batch_count, rooms_at, frame_room,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Grid [B·frame_blocks + batch_blocks], of BLOCK_I rows each. Rows of S are 0 where a norm is clamped."""
    pid = tl.program_id(0)
    is_frame = pid < samples * frame_blocks
    relation = tl.where(is_frame, pid // tl.maximum(frame_blocks, 1), samples)
    block = pid - relation * frame_blocks
    shares = workspace + shares_at
    base, across, along, count, room = relation_of(
        source, gathered, shares, relation, samples, frames, batch_count, features, averages_at, rooms_at, frame_room
    )
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)[:, None]
    j = tl.arange(0, BLOCK_J)[None, :]
    validity = base + 3 * features * along
    i_valid = tl.load(validity + i * across, mask=i < count, other=0.0) > 0.0
    j_valid = tl.load(validity + j * across, mask=j < count, other=0.0) > 0.0
    n = tl.sum(tl.sum(j_valid.to(tl.float32), 1), 0)
    i_valid, j_valid = unless_alone(i_valid, n), unless_alone(j_valid, n)
    i_norms = vector_norms(base, i, i_valid, across, along, features)
    j_norms = vector_norms(base, j, j_valid, across, along, features)

    similarity = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    difference = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for k in tl.range(0, features, loop_unroll_factor=UNROLL):
        x, r, d = feature(base, i, i_valid, across, along, features, k)
        xj, rj, dj = feature(base, j, j_valid, across, along, features, k)
        r, e = scores_of(r, d, i_norms)
        rj, ej = scores_of(rj, dj, j_norms)
        similarity += x * xj
        difference += e * (rj + ej)
        difference += r * ej
    # One IEEE division: τ divides its rounding too.
    similarity = tl.div_rn(similarity, i_norms[0] * j_norms[0])
    similarity, difference = unit_diagonal(similarity, difference, i == j, i_norms[4], i_norms[5])
    temperature = number(numbers, TEMPERATURE, temperature)
    kl, q_minus_p = divergence_rows(similarity, difference, i_valid, j_valid, temperature)
    n = tl.maximum(n, 1.0)
    tl.store(shares + pid, kl / n)
    tl.store(room + i, tl.where(i_valid, 1.0 / i_norms[0], 0.0), mask=i < count)
    square = tl.cast(count, tl.int64) * count
    store_tile(room + count, i, j, count, count, tl.where(i_norms[4], similarity, 0.0))
    store_tile(room + count + square, i, j, count, count, q_minus_p / (temperature * n))


@triton.jit
def gradient_of_row(
    base, across, along, count, room, i, features, first,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """∂L/∂x_i of BLOCK_K features from ``first`` on, [BLOCK_K, 1], BLOCK_C of BLOCK_J columns of H at a time."""
    square = tl.cast(count, tl.int64) * count
    similarity, g = room + count, room + count + square
    k = first + tl.arange(0, BLOCK_K)[:, None]
    value = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    radial = tl.zeros([1, BLOCK_C], tl.float32)
    for start in tl.static_range(0, BLOCK_J, BLOCK_C):
        j = start + tl.arange(0, BLOCK_C)[None, :]
        inside = j < count
        inverse = tl.load(room + j, mask=inside, other=0.0)
        h = tl.load(g + i * count + j, mask=inside, other=0.0)
        h += tl.load(g + j * count + i, mask=inside, other=0.0)
        radial += h * tl.load(similarity + i * count + j, mask=inside, other=0.0)
        x = tl.load(base + j * across + k * along, mask=inside & (k < features), other=0.0)
        x = tl.where(inverse != 0.0, x, 0.0)
        # x̂ and the last factor one norm each: 1/(n_i n_j) would leave float32's range.
        value += h * (x * inverse)
    i += tl.zeros([1, 1], tl.int32)
    inverse = tl.load(room + i)
    x = tl.load(base + i * across + k * along, mask=k < features, other=0.0)
    unit = tl.where(inverse != 0.0, x, 0.0) * inverse
    return (tl.sum(value, 1, keep_dims=True) - unit * tl.sum(radial, 1, keep_dims=True)) * inverse


@triton.jit(
    do_not_specialize=[
        "averages_at", "shares_at", "first_row", "rows", "samples", "frames", "features", "frame_blocks",
        "batch_count", "batch_blocks", "rooms_at", "frame_room",
    ],
    do_not_specialize_on_alignment=[
        "source", "gathered", "frame_term", "terms", "frame_grad", "batch_grad", "workspace", "numbers"
    ],
)  # fmt: skip
def rows_gradient_kernel(
    source, gathered,  # as above
    frame_term,  # [1] or None: the frame term computed elsewhere
    terms,  # [3]; [5] if DMD, of which dmd and mean|g|, and the frame term unless FRAMES, are there already
    frame_grad,  # [B, F, K]
    batch_grad,  # [rows, K]
    workspace,  # as above, filled
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    grad_scale, averages_at, shares_at, first_row, rows,
    samples, frames, features, frame_blocks, batch_count, batch_blocks, rooms_at, frame_room,
    FRAMES: tl.constexpr, BATCH: tl.constexpr, DMD: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid [(B·F + N)·tiles of K + 1]: a tile of a row of the gradient each; the last program has the terms."""
    shares = workspace + shares_at
    tiles = tl.cdiv(features, BLOCK_K)
    vectors = samples * frames
    line = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_K
    if line < vectors + batch_count:
        is_frame = line < vectors
        row = tl.where(is_frame, line % tl.maximum(frames, 1), line - vectors)
        relation = tl.where(is_frame, line // tl.maximum(frames, 1), samples)
        if is_frame | (row < rows):
            base, across, along, count, room = relation_of(
                source, gathered, shares, relation, samples, frames, batch_count, features, averages_at, rooms_at,
                frame_room,
            )  # fmt: skip
            i = tl.where(is_frame, row, first_row + row)
            value = gradient_of_row(base, across, along, count, room, i, features, first, BLOCK_J, BLOCK_C, BLOCK_K)
            value *= tl.where(is_frame, 1.0 / samples, grad_scale)
            grad = batch_grad
            if is_frame:
                grad = frame_grad
            k = first + tl.arange(0, BLOCK_K)[:, None]
            tl.store(grad + tl.where(is_frame, line, row).to(tl.int64) * features + k, value, mask=k < features)
    else:
        frame_loss = 0.0
        batch_loss = 0.0
        if FRAMES:
            frame_loss = ordered_sum(shares, samples * frame_blocks, 256) / samples
        elif DMD:
            frame_loss = tl.load(terms + 3)
        elif frame_term is not None:
            frame_loss = tl.load(frame_term)
        if BATCH:
            batch_loss = ordered_sum(shares + samples * frame_blocks, batch_blocks, 256)
        if DMD:
            dmd_loss = tl.load(terms + 1)
            store_objective_terms(
                terms, dmd_loss, batch_loss, frame_loss, numbers, batch_weight, frame_weight, relation_weight
            )
        else:
            store_terms(terms, batch_loss, frame_loss, numbers, batch_weight, frame_weight)
