"""Losses and matrices M of the frame relations and of the batch relation of whole latents, one program a relation.

A program adds its relation's Grams over the groups that :mod:`.gram_batch` left, in order, and computes the
loss and M (see :mod:`.algebra`). The last program writes the terms.
"""

import triton
import triton.language as tl

from ..blocks import TEMPERATURE, number, ordered_sum, store_terms, takes_last
from .algebra import add_pieces, relation_of_grams
from .gram_batch import valid_rows


@triton.jit
def gather_grams(
    grams, sums, count, x_at, s_at, x_size, s_size, GROUPS_X: tl.constexpr, GROUPS_S: tl.constexpr
):  # fmt: skip
    """X, R, T, ‖f‖² of a relation of ``count`` vectors, at ``x_at`` and ``s_at`` of the groups' sums."""
    half = count * (count + 1) // 2
    add_pieces(grams, sums + x_at, 0, GROUPS_X, half, x_size, GROUPS_X, 256)
    add_pieces(grams + half, sums + GROUPS_X * x_size + s_at, 0, GROUPS_S, 2 * half + count, s_size, GROUPS_S, 512)


@triton.jit(
    do_not_specialize=["samples", "frames", "losses_at", "valid_at", "rooms_at", "room", "scratch_at"],
    do_not_specialize_on_alignment=[
        "frame_mask", "terms", "matrices", "batch_matrix", "workspace", "counters", "numbers"
    ],
)  # fmt: skip
def relations_kernel(
    frame_mask,  # [B, F], != 0 is valid, or None
    terms,  # [3]
    matrices,  # [B, F, F]: M / B of the frame relations
    batch_matrix,  # [1, B, B]: M of the batch relation
    workspace,  # sums of groups, losses [B + 1], valid samples [B], and rooms [B + 1, room] of grams and, from
    # scratch_at on there, of scratch; see TogetherPlan
    counters,  # [1], zero before and after
    numbers,  # [6] or None: the values that follow
    temperature, batch_weight, frame_weight, relation_weight, real_scale, fake_scale,
    samples, frames, losses_at, valid_at, rooms_at, room, scratch_at, mask_b, mask_f,
    GROUPS_X: tl.constexpr, GROUPS_S: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    FRAMES: tl.constexpr,
):  # fmt: skip
    """Grid [B + 1] if FRAMES, else [1]: the batch relation, then the frame relation of each sample."""
    relation = tl.program_id(0)
    half = frames * (frames + 1) // 2
    half_b = samples * (samples + 1) // 2
    x_frames = samples * half if FRAMES else 0
    s_frames = samples * (2 * half + frames) if FRAMES else 0
    x_size = x_frames + half_b
    s_size = s_frames + 2 * half_b + samples
    losses = workspace + losses_at
    valid_samples = workspace + valid_at
    grams = workspace + rooms_at + relation * room
    scratch = grams + scratch_at
    temperature = number(numbers, TEMPERATURE, temperature)
    if relation == 0:
        gather_grams(grams, workspace, samples, x_frames, s_frames, x_size, s_size, GROUPS_X, GROUPS_S)
        b = tl.arange(0, BLOCK_B)
        valid = valid_rows(frame_mask, b, tl.arange(0, BLOCK_N), samples, frames, mask_b, mask_f)
        tl.store(valid_samples + b, tl.max(valid.to(tl.float32), 1), mask=b < samples)
        # All threads wrote the grams and the samples that take part, and all read them.
        tl.debug_barrier()
        loss = relation_of_grams(
            grams, valid_samples, relation, samples, 0, 1, temperature, scratch, batch_matrix, 1.0, BLOCK_B, BLOCK_B
        )
        tl.store(losses, loss)
    else:
        sample = relation - 1
        x_at = sample * half
        s_at = sample * (2 * half + frames)
        gather_grams(grams, workspace, frames, x_at, s_at, x_size, s_size, GROUPS_X, GROUPS_S)
        tl.debug_barrier()
        loss = relation_of_grams(
            grams, frame_mask, sample, frames, mask_b, mask_f, temperature, scratch,
            matrices + sample * frames * frames, 1.0 / samples, BLOCK_N, BLOCK_N,
        )  # fmt: skip
        tl.store(losses + relation, loss)
    if takes_last(counters, tl.num_programs(0)):
        frame = 0.0
        if FRAMES:
            frame = ordered_sum(losses + 1, samples, 16) / samples
        store_terms(terms, tl.load(losses), frame, numbers, batch_weight, frame_weight)
