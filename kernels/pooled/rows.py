"""The relation of many vectors, or of gathered ones: row blocks in parallel, the last block adds the gradient.

Row block I computes S and Δ of rows i ∈ I against all N columns, a tile at a time, then G of whole rows.
ĝ = G x̂ + Gᵀ x̂ needs other blocks' rows, so a block stores its rows of G x̂ ("direct") and its share
Σ_{i∈I} G_ij x̂_i of every column ("transposed"), and likewise the row and column sums of G∘S that make up the radial
part. The block that completes a relation adds the shares in a fixed order; the block that completes the last relation
writes the terms.
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
    takes_last,
    takes_last_of_any,
    unless_alone,
)
from ..divergence import divergence_rows
from .algebra import feature_norms, features_of, relation_tile, store_gradient, validity

UNROLL = tl.constexpr(4)


@triton.jit
def block_divergence(
    similarity, difference, base, first_row, j, n, count, features, temperature, row_radial, column_radial,
    BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σ KL of BLOCK_I rows, BLOCK_R at a time; G takes the place of their Δ, and radial sums of G∘S are stored."""
    column = tl.trans(j)
    j_valid = tl.trans(unless_alone(validity(base, j, count, features), n))
    kl = 0.0
    column_sum = tl.zeros(column.shape, tl.float32)
    for start in range(0, BLOCK_I, BLOCK_R):
        i = first_row + start + tl.arange(0, BLOCK_R)[:, None]
        valid = unless_alone(validity(base, i, count, features), n)
        inside = (i < count) & (column < count)
        s = tl.load(similarity + i * count + column, mask=inside, other=0.0)
        delta = tl.load(difference + i * count + column, mask=inside, other=0.0)
        more, q_minus_p = divergence_rows(s, delta, valid, j_valid, temperature)
        kl += more
        g = q_minus_p / (temperature * tl.maximum(n, 1.0))
        store_tile(difference, i, column, count, count, g)
        tl.store(row_radial + i, tl.sum(g * s, 1, keep_dims=True), mask=i < count)
        column_sum += tl.sum(g * s, 0, keep_dims=True)
    tl.store(column_radial + column, column_sum, mask=column < count)
    return kl


@triton.jit
def block_shares(
    base, count, features, temperature, block, similarity, difference, direct, transposed, row_radial, column_radial,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(1/n) Σ KL of one block of rows; stores direct [N, K] (its rows), transposed [N, K] (all) and radial sums."""
    BLOCK_R: tl.constexpr = BLOCK_I if BLOCK_I * BLOCK_J <= 4096 else 4096 // BLOCK_J
    every = tl.arange(0, BLOCK_J)[:, None]
    n = tl.sum(tl.sum(validity(base, every, count, features).to(tl.float32), 1), 0)
    first_row = block * BLOCK_I
    i = first_row + tl.arange(0, BLOCK_I)[:, None]
    i_valid = unless_alone(validity(base, i, count, features), n)
    i_norms = feature_norms(base, i, i_valid, features, BLOCK_K)
    for start in range(0, count, BLOCK_C):
        j = start + tl.arange(0, BLOCK_C)[:, None]
        j_valid = unless_alone(validity(base, j, count, features), n)
        j_norms = feature_norms(base, j, j_valid, features, BLOCK_K)
        s, delta = relation_tile(base, i, j, i_valid, j_valid, i_norms, j_norms, features, BLOCK_K)
        store_tile(similarity, i, tl.trans(j), count, count, s)
        store_tile(difference, i, tl.trans(j), count, count, delta)
    # All threads wrote the rows and all read them, here and below.
    tl.debug_barrier()
    kl = block_divergence(
        similarity, difference, base, first_row, every, n, count, features, temperature, row_radial, column_radial,
        BLOCK_I, BLOCK_R,
    )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, features, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        unit = features_of(base, i, i_valid, features, first, BLOCK_K) / i_norms[0]
        value = tl.zeros([BLOCK_I, BLOCK_K], tl.float32)
        for start in range(0, count, BLOCK_C):
            j = start + tl.arange(0, BLOCK_C)[:, None]
            j_valid = unless_alone(validity(base, j, count, features), n)
            n_j, _, _, _, _, _ = feature_norms(base, j, j_valid, features, BLOCK_K)
            inside = (i < count) & (tl.trans(j) < count)
            g = tl.load(difference + i * count + tl.trans(j), mask=inside, other=0.0)
            other = features_of(base, j, j_valid, features, first, BLOCK_K) / n_j
            value = tl.dot(g, other, value, input_precision="ieee")
            store_tile(transposed, j, k, count, features, tl.dot(tl.trans(g), unit, input_precision="ieee"))
        store_tile(direct, i, k, count, features, value)
    return kl / tl.maximum(n, 1.0)


@triton.jit
def add_shares(
    base, count, features, blocks, direct, transposed, row_radial, column_radial, grad, first_row, rows, grad_scale,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows ``first_row : first_row + rows`` of ``grad_scale``·∂L/∂x from all blocks' shares."""
    share = tl.cast(count, tl.int64) * features
    for start in range(first_row, first_row + rows, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)[:, None]
        inside = i < first_row + rows
        valid = validity(base, i, first_row + rows, features)
        n_x, _, _, _, free, _ = feature_norms(base, i, valid, features, BLOCK_K)
        radial = tl.load(row_radial + i, mask=inside, other=0.0)
        for block in tl.range(0, blocks, loop_unroll_factor=UNROLL):
            radial += tl.load(column_radial + block * count + i, mask=inside, other=0.0)
        radial = tl.where(free, radial, 0.0)
        for first in range(0, features, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)[None, :]
            mask = inside & (k < features)
            at = i * features + k
            value = tl.load(direct + at, mask=mask, other=0.0)
            for block in tl.range(0, blocks, loop_unroll_factor=UNROLL):
                value += tl.load(transposed + block * share + at, mask=mask, other=0.0)
            unit = features_of(base, i, valid, features, first, BLOCK_K) / n_x
            store_gradient(grad, i - first_row, rows, features, first, value, unit, radial, grad_scale / n_x)


@triton.jit(
    do_not_specialize=[
        "averages_at", "shares_at", "first_row", "rows", "samples", "frames", "features", "frame_blocks",
        "batch_blocks", "batch_count", "batch_at", "totals_at", "frame_room", "frame_direct_at", "frame_transposed_at",
        "frame_row_radial_at", "frame_column_radial_at", "frame_similarity_at", "frame_difference_at",
        "batch_direct_at", "batch_transposed_at", "batch_row_radial_at", "batch_column_radial_at",
        "batch_similarity_at", "batch_difference_at",
    ],
    do_not_specialize_on_alignment=[
        "source", "gathered", "frame_term", "terms", "frame_grad", "batch_grad", "workspace", "counters", "numbers"
    ],
)  # fmt: skip
def relation_rows_kernel(
    source,  # tables [B, F, 3K + 1], and averages [N, 3K + 1] from averages_at on
    gathered,  # [N, 3K + 1] in place of the source's averages, or None
    frame_term,  # [1] or None: the frame term computed elsewhere
    terms,  # [3]; [5] if DMD, of which dmd and mean|g|, and the frame term unless FRAMES, are there already
    frame_grad,  # [B, F, K]
    batch_grad,  # [rows, K]
    workspace,  # from shares_at on a room [frame_room] of every frame relation, from batch_at on there that of the
    # batch relation, then a loss of every relation; a room holds losses [blocks], direct [n, K], transposed
    # [blocks, n, K], row_radial [n], column_radial [blocks, n], similarity [n, n], difference [n, n]; see RowsPlan
    counters,  # [B + 2], zero before and after
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    grad_scale, averages_at, shares_at, first_row, rows,
    samples, frames, features, frame_blocks, batch_blocks, batch_count, batch_at, totals_at, frame_room,
    frame_direct_at, frame_transposed_at, frame_row_radial_at, frame_column_radial_at, frame_similarity_at,
    frame_difference_at,
    batch_direct_at, batch_transposed_at, batch_row_radial_at, batch_column_radial_at, batch_similarity_at,
    batch_difference_at,
    FRAMES: tl.constexpr, BATCH: tl.constexpr, DMD: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Grid [B·frame_blocks (if FRAMES) + batch_blocks (if BATCH)]."""
    pid = tl.program_id(0)
    frame_programs = samples * frame_blocks
    is_frame = pid < frame_programs
    relation = tl.where(is_frame, pid // frame_blocks, samples)
    block = tl.where(is_frame, pid % frame_blocks, pid - frame_programs)
    blocks = tl.where(is_frame, frame_blocks, batch_blocks)
    count = tl.where(is_frame, frames, batch_count)
    if is_frame:
        base = source + relation.to(tl.int64) * (3 * features + 1) * frames
        grad = frame_grad + relation.to(tl.int64) * frames * features
    else:
        if gathered is None:
            base = source + averages_at
        else:
            base = gathered
        grad = batch_grad
    room = workspace + shares_at + tl.where(is_frame, relation.to(tl.int64) * frame_room, batch_at)
    direct = room + tl.where(is_frame, frame_direct_at, batch_direct_at)
    transposed = room + tl.where(is_frame, frame_transposed_at, batch_transposed_at)
    row_radial = room + tl.where(is_frame, frame_row_radial_at, batch_row_radial_at)
    column_radial = room + tl.where(is_frame, frame_column_radial_at, batch_column_radial_at)
    similarity = room + tl.where(is_frame, frame_similarity_at, batch_similarity_at)
    difference = room + tl.where(is_frame, frame_difference_at, batch_difference_at)
    totals = workspace + shares_at + totals_at
    share = tl.cast(count, tl.int64) * features

    loss = block_shares(
        base, count, features, number(numbers, TEMPERATURE, temperature), block, similarity, difference, direct,
        transposed + block * share, row_radial, column_radial + block * count, BLOCK_I, BLOCK_J, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    tl.store(room + block, loss)
    if takes_last(counters + relation, blocks):
        tl.store(totals + relation, ordered_sum(room, blocks, 64))
        add_shares(
            base, count, features, blocks, direct, transposed, row_radial, column_radial, grad,
            tl.where(is_frame, 0, first_row), tl.where(is_frame, frames, rows),
            tl.where(is_frame, 1.0 / samples, grad_scale), BLOCK_A, BLOCK_K,
        )  # fmt: skip
        relations = 0
        if FRAMES:
            relations += samples
        if BATCH:
            relations += 1
        if takes_last_of_any(counters + samples + 1, relations):
            frame_loss = 0.0
            batch_loss = 0.0
            if FRAMES:
                frame_loss = ordered_sum(totals, samples, 64) / samples
            elif DMD:
                frame_loss = tl.load(terms + 3)
            elif frame_term is not None:
                frame_loss = tl.load(frame_term)
            if BATCH:
                batch_loss = tl.load(totals + samples)
            if DMD:
                dmd_loss = tl.load(terms + 1)
                store_objective_terms(
                    terms, dmd_loss, batch_loss, frame_loss, numbers, batch_weight, frame_weight, relation_weight
                )
            else:
                store_terms(terms, batch_loss, frame_loss, numbers, batch_weight, frame_weight)
