"""The relation of many vectors (N > 64), or of gathered ones: row blocks in parallel, last block adds the gradient.

Row block I computes S, Δ and G of rows i ∈ I against all N columns. ĝ = G x̂ + Gᵀ x̂ needs other blocks' rows, so a
block stores its rows of G x̂ ("direct") and its share Σ_{i∈I} G_ij x̂_i of every column ("transposed"), and likewise the
row and column sums of G∘S that make up the radial part. The block that completes a relation adds the shares in a fixed
order; the block that completes the last relation writes the terms.
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
    unless_alone,
)
from .algebra import UNROLL, feature_norms, outer_products, row_block, store_gradient, validity


@triton.jit
def block_shares(
    base, stride_i, stride_k, count, features, temperature, block, by_column, by_row, direct, transposed, row_radial,
    column_radial,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(1/n) Σ KL of one block of rows; stores direct [N, K] (its rows), transposed [N, K] (all) and radial sums."""
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)[:, None]
    j = tl.arange(0, BLOCK_J)[None, :]
    j_valid = validity(base, j, count, stride_i, stride_k, features)
    n = tl.sum(tl.sum(j_valid.to(tl.float32), 1), 0)
    j_valid = unless_alone(j_valid, n)
    j_norms = feature_norms(base, j, j_valid, stride_i, stride_k, features)
    kl, column_sum = row_block(
        base, i, j, j_valid, j_norms, n, stride_i, stride_k, count, features, temperature, by_column, by_row,
        row_radial, BLOCK_I, BLOCK_J,
    )  # fmt: skip
    tl.store(column_radial + j, column_sum, mask=j < count)
    # All threads wrote the scratch rows and all read them.
    tl.debug_barrier()
    first_row = block * BLOCK_I
    last_row = tl.minimum(first_row + BLOCK_I, count)
    for first in range(0, features, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        value = outer_products(
            by_column, 1, count, count, i, base, stride_i, stride_k, features, k, 0, count, BLOCK_I, BLOCK_K
        )
        store_tile(direct, i, k, count, features, value)
        for start in range(0, count, BLOCK_I):
            column = start + tl.arange(0, BLOCK_I)[:, None]
            value = outer_products(
                by_row, count, 1, count, column, base, stride_i, stride_k, features, k, first_row, last_row,
                BLOCK_I, BLOCK_K,
            )  # fmt: skip
            store_tile(transposed, column, k, count, features, value)
    return kl / tl.maximum(n, 1.0)


@triton.jit
def add_shares(
    base, stride_i, stride_k, count, features, blocks, direct, transposed, row_radial, column_radial, grad, first_row,
    rows, grad_scale,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows ``first_row : first_row + rows`` of ``grad_scale``·∂L/∂x from all blocks' shares."""
    share = tl.cast(count, tl.int64) * features
    for start in range(0, rows, BLOCK_I):
        i = first_row + start + tl.arange(0, BLOCK_I)[:, None]
        inside = i < first_row + rows
        valid = validity(base, i, first_row + rows, stride_i, stride_k, features)
        n_x, _, _, _, free, _ = feature_norms(base, i, valid, stride_i, stride_k, features)
        radial = tl.load(row_radial + i, mask=inside, other=0.0)
        for block in tl.range(0, blocks, loop_unroll_factor=UNROLL):
            radial += tl.load(column_radial + block * count + i, mask=inside, other=0.0)
        radial = tl.where(free, radial, 0.0)
        line = i * features
        for first in range(0, features, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)[None, :]
            mask = inside & (k < features)
            value = tl.load(direct + line + k, mask=mask, other=0.0)
            for block in tl.range(0, blocks, loop_unroll_factor=UNROLL):
                value += tl.load(transposed + block * share + line + k, mask=mask, other=0.0)
            store_gradient(
                base, value, radial, 1.0 / n_x, i, k, first_row, rows, stride_i, stride_k, features, grad, grad_scale
            )


@triton.jit(
    do_not_specialize=[
        "averages_at", "shares_at", "first_row", "rows", "samples", "frames", "features", "frame_blocks",
        "batch_blocks", "batch_count", "batch_at", "totals_at", "frame_room", "frame_direct_at", "frame_transposed_at",
        "frame_row_radial_at", "frame_column_radial_at", "frame_by_column_at", "frame_by_row_at", "batch_direct_at",
        "batch_transposed_at", "batch_row_radial_at", "batch_column_radial_at", "batch_by_column_at", "batch_by_row_at",
    ],
    do_not_specialize_on_alignment=[
        "source", "gathered", "frame_term", "terms", "frame_grad", "batch_grad", "workspace", "counters", "numbers"
    ],
)  # fmt: skip
def relation_rows_kernel(
    source,  # tables [B, 3K + 1, F], and averages [N, 3K + 1] from averages_at on
    gathered,  # [N, 3K + 1] in place of the source's averages, or None
    frame_term,  # [1] or None: the frame term computed elsewhere
    terms,  # [3]; [5] if DMD, of which dmd and mean|g|, and the frame term unless FRAMES, are there already
    frame_grad,  # [B, F, K]
    batch_grad,  # [rows, K]
    workspace,  # from shares_at on a room [frame_room] of every frame relation, from batch_at on there that of the
    # batch relation, then a loss of every relation; a room holds losses [blocks], direct [n, K], transposed
    # [blocks, n, K], row_radial [n], column_radial [blocks, n], by_column [n, n], by_row [n, n]; see RowsPlan
    counters,  # [B + 2], zero before and after
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    grad_scale, averages_at, shares_at, first_row, rows,
    samples, frames, features, frame_blocks, batch_blocks, batch_count, batch_at, totals_at, frame_room,
    frame_direct_at, frame_transposed_at, frame_row_radial_at, frame_column_radial_at, frame_by_column_at,
    frame_by_row_at,
    batch_direct_at, batch_transposed_at, batch_row_radial_at, batch_column_radial_at, batch_by_column_at,
    batch_by_row_at,
    FRAMES: tl.constexpr, BATCH: tl.constexpr, DMD: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid [B·frame_blocks (if FRAMES) + batch_blocks (if BATCH)]."""
    pid = tl.program_id(0)
    frame_programs = samples * frame_blocks
    is_frame = pid < frame_programs
    relation = tl.where(is_frame, pid // frame_blocks, samples)
    block = tl.where(is_frame, pid % frame_blocks, pid - frame_programs)
    blocks = tl.where(is_frame, frame_blocks, batch_blocks)
    count = tl.where(is_frame, frames, batch_count)
    stride_i = tl.where(is_frame, 1, 3 * features + 1)
    stride_k = tl.where(is_frame, frames, 1)
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
    by_column = room + tl.where(is_frame, frame_by_column_at, batch_by_column_at)
    by_row = room + tl.where(is_frame, frame_by_row_at, batch_by_row_at)
    totals = workspace + shares_at + totals_at
    share = tl.cast(count, tl.int64) * features

    loss = block_shares(
        base, stride_i, stride_k, count, features, number(numbers, TEMPERATURE, temperature), block, by_column, by_row,
        direct, transposed + block * share, row_radial, column_radial + block * count,
        BLOCK_I, BLOCK_J, BLOCK_K,
    )  # fmt: skip
    tl.store(room + block, loss)
    if takes_last(counters + relation, blocks):
        tl.store(totals + relation, ordered_sum(room, blocks, 64))
        add_shares(
            base, stride_i, stride_k, count, features, blocks, direct, transposed, row_radial, column_radial, grad,
            tl.where(is_frame, 0, first_row), tl.where(is_frame, frames, rows),
            tl.where(is_frame, 1.0 / samples, grad_scale), BLOCK_I, BLOCK_K,
        )  # fmt: skip
        relations = 0
        if FRAMES:
            relations += samples
        if BATCH:
            relations += 1
        if takes_last(counters + samples + 1, relations):
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
