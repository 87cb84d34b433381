"""The relation of many vectors, or of gathered ones: row blocks in parallel, the last block adds the gradient.

Row block I computes S and Δ of rows i ∈ I against all N columns, a tile at a time, then G of whole rows.
ĝ = G x̂ + Gᵀ x̂ needs other blocks' rows, so a block stores its rows of G x̂ ("direct") and its share
Σ_{i∈I} G_ij x̂_i of every column ("transposed"). The block that completes a relation adds the shares in a fixed order;
the block that completes the last relation writes the terms.
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
    similarity, difference, base, first_row, j_valid, n, count, features, temperature,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Σ KL of BLOCK_I rows, as many at a time as fit; G takes the place of their Δ."""
    BLOCK_R: tl.constexpr = BLOCK_I if BLOCK_I * BLOCK_J <= 4096 else 4096 // BLOCK_J
    column = tl.arange(0, BLOCK_J)[None, :]
    kl = 0.0
    for start in range(0, BLOCK_I, BLOCK_R):
        i = first_row + start + tl.arange(0, BLOCK_R)[:, None]
        valid = unless_alone(validity(base, i, count, features), n)
        inside = (i < count) & (column < count)
        s = tl.load(similarity + i * count + column, mask=inside, other=0.0)
        delta = tl.load(difference + i * count + column, mask=inside, other=0.0)
        more, g = row_gradient(s, delta, valid, j_valid, n, temperature)
        kl += more
        store_tile(difference, i, column, count, count, g)
    return kl


@triton.jit
def row_gradient(similarity, difference, i_valid, j_valid, n, temperature):
    """Σ KL of rows, and G."""
    kl, q_minus_p = divergence_rows(similarity, difference, i_valid, j_valid, temperature)
    return kl, q_minus_p / (temperature * tl.maximum(n, 1.0))


@triton.jit
def block_shares(
    base, count, features, temperature, block, similarity, difference, direct, transposed,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(1/n) Σ KL of one block of rows; stores direct [N, K] (its rows) and transposed [N, K] (all).

    A line of S and G of up to BLOCK_C vectors stays in registers.
    """
    every = tl.arange(0, BLOCK_J)[:, None]
    j_valid = validity(base, every, count, features)
    n = tl.sum(tl.sum(j_valid.to(tl.float32), 1), 0)
    j_valid = unless_alone(j_valid, n)
    first_row = block * BLOCK_I
    i = first_row + tl.arange(0, BLOCK_I)[:, None]
    i_valid = unless_alone(validity(base, i, count, features), n)
    i_norms = feature_norms(base, i, i_valid, features, BLOCK_K)
    if BLOCK_J <= BLOCK_C:
        j_norms = feature_norms(base, every, j_valid, features, BLOCK_K)
        s, delta = relation_tile(base, i, every, i_valid, j_valid, i_norms, j_norms, features, BLOCK_K)
        kl, g = row_gradient(s, delta, i_valid, tl.trans(j_valid), n, temperature)
        for first in range(0, features, BLOCK_K):
            unit = features_of(base, i, i_valid, features, first, BLOCK_K) / i_norms[0]
            other = features_of(base, every, j_valid, features, first, BLOCK_K) / j_norms[0]
            store_share(direct, i, features, first, count, tl.dot(g, other, input_precision="ieee"))
            store_share(transposed, every, features, first, count, tl.dot(tl.trans(g), unit, input_precision="ieee"))
    else:
        for start in range(0, count, BLOCK_C):
            j = start + tl.arange(0, BLOCK_C)[:, None]
            valid = unless_alone(validity(base, j, count, features), n)
            norms = feature_norms(base, j, valid, features, BLOCK_K)
            s, delta = relation_tile(base, i, j, i_valid, valid, i_norms, norms, features, BLOCK_K)
            store_tile(similarity, i, tl.trans(j), count, count, s)
            store_tile(difference, i, tl.trans(j), count, count, delta)
        # All threads wrote the rows and all read them, here and below.
        tl.debug_barrier()
        kl = block_divergence(
            similarity, difference, base, first_row, tl.trans(j_valid), n, count, features, temperature,
            BLOCK_I, BLOCK_J,
        )  # fmt: skip
        tl.debug_barrier()
        for first in range(0, features, BLOCK_K):
            unit = features_of(base, i, i_valid, features, first, BLOCK_K) / i_norms[0]
            value = tl.zeros([BLOCK_I, BLOCK_K], tl.float32)
            for start in range(0, count, BLOCK_C):
                j = start + tl.arange(0, BLOCK_C)[:, None]
                valid = unless_alone(validity(base, j, count, features), n)
                n_j, _, _, _, _, _ = feature_norms(base, j, valid, features, BLOCK_K)
                inside = (i < count) & (tl.trans(j) < count)
                g = tl.load(difference + i * count + tl.trans(j), mask=inside, other=0.0)
                other = features_of(base, j, valid, features, first, BLOCK_K) / n_j
                value = tl.dot(g, other, value, input_precision="ieee")
                store_share(transposed, j, features, first, count, tl.dot(tl.trans(g), unit, input_precision="ieee"))
            store_share(direct, i, features, first, count, value)
    return kl / tl.maximum(n, 1.0)


@triton.jit
def store_share(shares, i, features, first, count, value):
    """shares[i, first:] = value for i < ``count``; lines are padded to steps of BLOCK_K, to be stored 16 bytes wide."""
    BLOCK_K: tl.constexpr = value.shape[1]
    at = i * (tl.cdiv(features, BLOCK_K) * BLOCK_K) + first + tl.arange(0, BLOCK_K)[None, :]
    tl.store(tl.multiple_of(shares, 16) + at, value, mask=i < count)


@triton.jit
def add_shares(
    base, count, features, blocks, direct, transposed, grad, first_row, rows, grad_scale,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows ``first_row : first_row + rows`` of ``grad_scale``·∂L/∂x from all blocks' shares."""
    padded = tl.cdiv(features, BLOCK_K) * BLOCK_K
    share = tl.cast(count, tl.int64) * padded
    direct, transposed = tl.multiple_of(direct, 16), tl.multiple_of(transposed, 16)
    for start in range(first_row, first_row + rows, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)[:, None]
        inside = i < first_row + rows
        valid = validity(base, i, first_row + rows, features)
        n_x, _, _, _, free, _ = feature_norms(base, i, valid, features, BLOCK_K)
        inverse = 1.0 / n_x
        radial = tl.zeros(i.shape, tl.float32)
        for first in range(0, features, BLOCK_K):
            at = i * padded + first + tl.arange(0, BLOCK_K)[None, :]
            value = tl.load(direct + at, mask=inside, other=0.0)
            for block in tl.range(0, blocks, loop_unroll_factor=UNROLL):
                value += tl.load(transposed + block * share + at, mask=inside, other=0.0)
            unit = features_of(base, i, valid, features, first, BLOCK_K) * inverse
            radial += tl.sum(value * unit, 1, keep_dims=True)
            tl.store(direct + at, value, mask=inside)
        tl.debug_barrier()
        radial = tl.where(free, radial, 0.0)
        for first in range(0, features, BLOCK_K):
            value = tl.load(direct + i * padded + first + tl.arange(0, BLOCK_K)[None, :], mask=inside, other=0.0)
            unit = features_of(base, i, valid, features, first, BLOCK_K) * inverse
            store_gradient(grad, i - first_row, rows, features, first, value, unit, radial, grad_scale * inverse)


@triton.jit(
    do_not_specialize=[
        "averages_at", "shares_at", "first_row", "rows", "samples", "frames", "features", "frame_blocks",
        "batch_blocks", "batch_count", "batch_at", "totals_at", "frame_room", "frame_direct_at", "frame_transposed_at",
        "frame_similarity_at", "frame_difference_at", "batch_direct_at", "batch_transposed_at", "batch_similarity_at",
        "batch_difference_at",
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
    # batch relation, then a loss of every relation; a room holds losses [blocks], direct [n, K'], transposed
    # [blocks, n, K'] (K' a multiple of BLOCK_K) and, of more than BLOCK_C vectors, similarity and difference [n, n];
    # see RowsPlan
    counters,  # [B + 2], zero before and after
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    grad_scale, averages_at, shares_at, first_row, rows,
    samples, frames, features, frame_blocks, batch_blocks, batch_count, batch_at, totals_at, frame_room,
    frame_direct_at, frame_transposed_at, frame_similarity_at, frame_difference_at,
    batch_direct_at, batch_transposed_at, batch_similarity_at, batch_difference_at,
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
    similarity = room + tl.where(is_frame, frame_similarity_at, batch_similarity_at)
    difference = room + tl.where(is_frame, frame_difference_at, batch_difference_at)
    totals = workspace + shares_at + totals_at
    share = tl.cast(count, tl.int64) * (tl.cdiv(features, BLOCK_K) * BLOCK_K)

    loss = block_shares(
        base, count, features, number(numbers, TEMPERATURE, temperature), block, similarity, difference, direct,
        transposed + block * share, BLOCK_I, BLOCK_J, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    tl.store(room + block, loss)
    if takes_last(counters + relation, blocks):
        tl.store(totals + relation, ordered_sum(room, blocks, 64))
        add_shares(
            base, count, features, blocks, direct, transposed, grad,
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
