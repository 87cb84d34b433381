"""Relations of whole latents (pool=None): Gram matrices of N ≤ 128 long vectors in one streaming pass.

The long axis is split over programs, a third of which read x alone and the others r and f (see
:mod:`.stream`): each leaves only upper triangles of its own matrices. The last block of a group of splits
adds the group, the last group's block adds the groups, both in order, and computes the loss and M (see
:mod:`.algebra`).
"""

import triton
import triton.language as tl

from ..blocks import TEMPERATURE, frame_validity, number, ordered_sum, store_terms, takes_last, takes_last_of_any
from . import cores, stream
from .algebra import add_pieces, relation_of_grams, triangle


@triton.jit(
    do_not_specialize=[
        "samples", "frames", "runs", "run_lines", "tiles", "sums_at", "scratch_at", "losses_at", "pieces_at"
    ],
    do_not_specialize_on_alignment=[
        "frame_mask", "frame_term", "terms", "matrices", "pooled", "workspace", "counters", "numbers"
    ],
)  # fmt: skip
def gram_kernel(
    student, real, fake,  # [B, F, runs of `length` elements]; `fake` holds d itself if DIFFERENCE
    frame_mask,  # [B, F], != 0 is valid, or None
    frame_term,  # [1] or None: the frame term, when this launch computes the batch term
    terms,  # [3]
    matrices,  # [B, F, F]: M of the mean over samples
    pooled,  # [B, 3K + 1] or None: time averages of x, r, d, and the number of valid frames
    workspace,  # a relation's grams X, R, T, ‖f‖² are SIZE = 3·F(F + 1)/2 + F floats, X from one kind of program, the
    # others from the other: grams [B, SIZE], sums of groups [B, ...], scratch [B, F + 2, F], losses [B] and the pieces
    # [B, ...] of all splits; see GramPlan
    counters,  # [B·(all groups + 1) + 1], zero before and after
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    samples, frames, runs, run_lines, length, tiles, sums_at, scratch_at, losses_at, pieces_at,
    x_b, x_f, x_c, x_h, x_w, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, mask_b, mask_f,
    SPLITS_X: tl.constexpr, SPLITS_S: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_J: tl.constexpr,
    SLICES: tl.constexpr, BLOCK_X: tl.constexpr, JOINED: tl.constexpr,
    GRAMS: tl.constexpr, DIFFERENCE: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Grid [B·(SPLITS_X + SPLITS_S)·BLOCKS(BLOCKS + 1)/2]: splits of x, then of r and f, for every pair of row blocks.

    Strides of b, f, c, h are in units of VEC elements. SLICES of a tile go to tensor cores, of x in tiles of
    BLOCK_X columns; 0: IEEE dots. JOINED: a vector is one run. With BATCH the relation is the batch term.
    """
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    GROUPS_X: tl.constexpr = (SPLITS_X + GROUP - 1) // GROUP
    GROUPS_S: tl.constexpr = (SPLITS_S + GROUP - 1) // GROUP
    GROUPS: tl.constexpr = GROUPS_X + GROUPS_S
    pid = tl.program_id(0)
    pair = pid % PAIRS
    split = pid // PAIRS % (SPLITS_X + SPLITS_S)
    sample = pid // (PAIRS * (SPLITS_X + SPLITS_S))
    b = sample.to(tl.int64)
    of_student = split < SPLITS_X
    split = tl.where(of_student, split, split - SPLITS_X)
    first_block = 0
    second_block = pair
    for block in tl.static_range(1, BLOCKS):
        # Pair p of the upper triangle: row block 0 has BLOCKS pairs, row block 1 has BLOCKS - 1, ...
        passed = block * BLOCKS - block * (block - 1) // 2
        first_block = tl.where(pair >= passed, block, first_block)
        second_block = tl.where(pair >= passed, pair - passed + block, second_block)
    i = first_block * BLOCK_N + tl.arange(0, BLOCK_N)
    j = second_block * BLOCK_N + tl.arange(0, BLOCK_N)
    i_valid = frame_validity(frame_mask, sample, i, frames, mask_b, mask_f)
    j_valid = frame_validity(frame_mask, sample, j, frames, mask_b, mask_f)
    if SLICES:
        own = tl.zeros([SLICES], tl.int32)
        own_valid = tl.broadcast_to(i_valid[None, :], [SLICES, BLOCK_N])
        means = pooled
        if pooled is not None:
            means += b * (3 * runs.to(tl.int64) * length + 1)

    half = frames * (frames + 1) // 2
    scores_size = 2 * half + frames
    piece_size = tl.where(of_student, half, scores_size)
    pieces = workspace + pieces_at + b * (SPLITS_X * half + SPLITS_S * scores_size)
    pieces += tl.where(of_student, 0, SPLITS_X * half)
    piece = pieces + split.to(tl.int64) * piece_size
    upper = (i[:, None] <= j[None, :]) & (j < frames)[None, :]
    at = triangle(i[:, None], j[None, :], frames)
    if of_student:
        share = tl.cdiv(tiles, SPLITS_X)
        if SLICES:
            xx, _averages_xx = cores.student_grams(
                student + b * x_b * VEC, means, own, i, own_valid, split, runs, run_lines, length,
                0, x_f, x_c, x_h, x_w, SPLITS_X, SLICES, JOINED, VEC, 1, BLOCK_N, BLOCK_X, True,
            )  # fmt: skip
            xx = tl.reshape(xx, [BLOCK_N, BLOCK_N])
        else:
            xx = stream.student_gram(
                student, frame_mask, pooled, sample, b, i, j, i_valid, j_valid,
                split * share, tl.minimum(tiles, split * share + share), pair, frames, runs, run_lines, length,
                x_b, x_f, x_c, x_h, x_w, mask_b, mask_f, BLOCKS, VEC, BLOCK_N, BLOCK_L, GRAMS,
            )  # fmt: skip
        if GRAMS:
            tl.store(piece + at, xx, mask=upper)
    else:
        share = tl.cdiv(tiles, SPLITS_S)
        if SLICES:
            rr, tt, ff, _rr, _tt, _ff = cores.score_grams(
                real + b * r_b * VEC, fake + b * f_b * VEC, means, own, i, own_valid, split, runs, run_lines, length,
                0, r_f, r_c, r_h, r_w, 0, f_f, f_c, f_h, f_w, SPLITS_S, SLICES, JOINED, VEC, 1, BLOCK_N, BLOCK_L, True,
            )  # fmt: skip
            rr, tt = tl.reshape(rr, [BLOCK_N, BLOCK_N]), tl.reshape(tt, [BLOCK_N, BLOCK_N])
            ff = tl.reshape(ff, [BLOCK_N])
        else:
            rr, tt, ff = stream.score_grams(
                real, fake, frame_mask, pooled, sample, b, i, j, i_valid, j_valid,
                split * share, tl.minimum(tiles, split * share + share), pair, frames, runs, run_lines, length,
                r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, mask_b, mask_f,
                BLOCKS, VEC, BLOCK_N, BLOCK_L, GRAMS, DIFFERENCE,
            )  # fmt: skip
        if GRAMS:
            tl.store(piece + at, rr, mask=upper)
            tl.store(piece + half + at, tt, mask=upper)
            tl.store(piece + 2 * half + i, ff, mask=(i < frames) & (i == j))
        if pooled is not None:  # noqa: SIM102 (decided at compile time, the next at run time)
            if (pair == 0) & (split == 0):
                count = 0.0
                for start in range(0, frames, BLOCK_N):
                    row = start + tl.arange(0, BLOCK_N)
                    valid = frame_validity(frame_mask, sample, row, frames, mask_b, mask_f)
                    count += tl.sum(valid.to(tl.float32), 0)
                features = runs.to(tl.int64) * length
                tl.store(pooled + b * (3 * features + 1) + 3 * features, count)

    if GRAMS:
        size = half + scores_size
        sums_size = GROUPS_X * half + GROUPS_S * scores_size
        grams = workspace + b * size
        sums = workspace + sums_at + b * sums_size
        scratch = workspace + scratch_at + b * (frames + 2) * frames
        losses = workspace + losses_at

        group = split // GROUP
        last = tl.minimum(group * GROUP + GROUP, tl.where(of_student, SPLITS_X, SPLITS_S))
        tickets = counters + sample * (GROUPS + 1)
        ticket = tickets + tl.where(of_student, group, GROUPS_X + group)
        own_sum = sums + tl.where(of_student, 0, GROUPS_X * half) + group * piece_size
        if takes_last(ticket, (last - group * GROUP) * PAIRS):
            add_pieces(own_sum, pieces, group * GROUP, last, piece_size, piece_size, GROUP, 512)
            if takes_last(tickets + GROUPS, GROUPS):
                add_pieces(grams, sums, 0, GROUPS_X, half, half, GROUPS_X, 256)
                add_pieces(grams + half, sums + GROUPS_X * half, 0, GROUPS_S, scores_size, scores_size, GROUPS_S, 512)
                tl.debug_barrier()
                loss = relation_of_grams(
                    grams, frame_mask, sample, frames, mask_b, mask_f, number(numbers, TEMPERATURE, temperature),
                    scratch, matrices + b * frames * frames, 1.0 / samples, BLOCK_J if BLOCK_J <= 32 else 16, BLOCK_J,
                )  # fmt: skip
                tl.store(losses + sample, loss)
                if takes_last_of_any(counters + samples * (GROUPS + 1), samples):
                    mean = ordered_sum(losses, samples, 16) / samples
                    if BATCH:
                        frame = 0.0
                        if frame_term is not None:
                            frame = tl.load(frame_term)
                        store_terms(terms, mean, frame, numbers, batch_weight, frame_weight)
                    else:
                        store_terms(terms, 0.0, mean, numbers, batch_weight, frame_weight)
