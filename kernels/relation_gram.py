"""Relations of whole latents (pool=None): Gram matrices of N ≤ 128 long vectors in one streaming pass.

With d = f - r and m = (r + f)/2, the pass accumulates X = x xᵀ, R = r rᵀ, T = d mᵀ + m dᵀ (so that f fᵀ = R + T
without cancellation) and ‖f‖². From a_i² = R_ii, b_i = ‖f_i‖, k_i = b_i - a_i = T_ii/(a_i + b_i):

    S_ij = X_ij/(n_i n_j)        Δ_ij = (T_ij - R_ij/(a_i a_j)·(k_i a_j + b_i k_j)) / (b_i b_j)

and the loss, G, and M with ∂L/∂x = M x as in ``codmd.reference``. Dots are IEEE float32. The long axis is split over
programs, a third of which read x alone and the others r and f: each leaves only upper triangles of its own matrices.
The last block of a group of splits adds the group, the last group's block adds the groups, both in order.
"""

import triton
import triton.language as tl

from .divergence import divergence_rows
from .relation_algebra import NORM_FLOOR, store_tile, unit_diagonal, unless_alone
from .relation_pool import frame_validity, ordered_sum, store_terms


@triton.jit
def load_rows(base, row, valid, column, inside, stride, step):
    """float32 [N, L] of ``base[row·stride + column·step]``; 0 outside and for vectors that take no part."""
    at = base + row.to(tl.int64)[:, None] * stride + column.to(tl.int64)[None, :] * step
    return tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def add_pieces(total, pieces, first, last, size, step, BLOCK: tl.constexpr):
    """total[:size] = Σ pieces[p·step : p·step + size] for first ≤ p < last, in order."""
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.zeros([BLOCK], tl.float32)
        for piece in tl.range(first, last, loop_unroll_factor=4):
            value += tl.load(pieces + tl.cast(piece, tl.int64) * step + at, mask=at < size, other=0.0)
        tl.store(total + at, value, mask=at < size)


@triton.jit
def triangle(i, j, count):
    """Where (i, j), i ≤ j, lies in a packed upper triangle of ``count`` rows."""
    return i * (2 * count - i - 1) // 2 + j


@triton.jit
def gram_norms(grams, i, count):
    """1/n_x, a, b, k of vectors i, and whether ‖x‖, ‖f‖ and both scores reach the floor; shaped like ``i``."""
    inside = i < count
    diagonal = triangle(i, i, count)
    half = count * (count + 1) // 2
    t = tl.load(grams + 2 * half + diagonal, mask=inside, other=0.0)
    x_norm = tl.sqrt_rn(tl.load(grams + diagonal, mask=inside, other=1.0))
    r_norm = tl.sqrt_rn(tl.load(grams + half + diagonal, mask=inside, other=1.0))
    f_norm = tl.sqrt_rn(tl.load(grams + 3 * half + i, mask=inside, other=1.0))
    a = tl.maximum(r_norm, NORM_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    b = tl.maximum(f_norm, NORM_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    k = t / tl.maximum(r_norm + f_norm, NORM_FLOOR)
    clamped = (r_norm < NORM_FLOOR) | (f_norm < NORM_FLOOR)
    return 1.0 / tl.maximum(x_norm, NORM_FLOOR), a, b, k, x_norm >= NORM_FLOOR, f_norm >= NORM_FLOOR, clamped == 0


@triton.jit
def relation_of_grams(
    grams, frame_mask, sample, count, mask_b, mask_f, temperature, scratch, matrix, scale,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """L = (1/n) Σ KL from X, R, T (upper triangles) and ‖f‖²; writes ``scale``·M [count, count].

    ``scratch`` is [count + 2, count]: G, and its row and column sums of G∘S.
    """
    row_radial = scratch + count * count
    column_radial = row_radial + count
    half = count * (count + 1) // 2
    j = tl.arange(0, BLOCK_J)[None, :]
    j_valid = frame_validity(frame_mask, sample, j, count, mask_b, mask_f)
    n = tl.sum(tl.sum(j_valid.to(tl.float32), 1), 0)
    j_valid = unless_alone(j_valid, n)
    j_x, j_a, j_b, j_k, _j_x_free, j_f_free, j_free = gram_norms(grams, j, count)
    kl = 0.0
    column_sum = tl.zeros([1, BLOCK_J], tl.float32)
    for start in range(0, count, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)[:, None]
        spread = i + tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
        i_valid = unless_alone(frame_validity(frame_mask, sample, spread, count, mask_b, mask_f), n)
        i_x, i_a, i_b, i_k, x_free, i_f_free, i_free = gram_norms(grams, spread, count)
        at = triangle(tl.minimum(spread, j), tl.maximum(spread, j), count)
        inside = (spread < count) & (j < count)
        x = tl.load(grams + at, mask=inside, other=0.0)
        r = tl.load(grams + half + at, mask=inside, other=0.0)
        t = tl.load(grams + 2 * half + at, mask=inside, other=0.0)
        similarity = (x * i_x) * j_x
        r_cosine = r / i_a / j_a
        difference = (t - r_cosine * (i_k * j_a + i_b * j_k)) / i_b / j_b
        # Below the floor r + d has no digit left: such a fake vector counts as zero (a NaN norm stays NaN).
        f_cosine = tl.where(i_f_free & j_f_free, (r + t) / i_b / j_b, 0.0 * i_b * j_b)
        difference = tl.where(i_free & j_free, difference, f_cosine - r_cosine)
        similarity, difference = unit_diagonal(similarity, difference, spread == j, x_free, i_free)
        block_kl, q_minus_p = divergence_rows(similarity, difference, i_valid, j_valid, temperature)
        g = q_minus_p / (temperature * tl.maximum(n, 1.0))
        store_tile(scratch, i, j, count, count, g)
        tl.store(row_radial + i, tl.sum(g * similarity, 1, keep_dims=True), mask=i < count)
        column_sum += tl.sum(g * similarity, 0, keep_dims=True)
        kl += block_kl
    tl.store(column_radial + j, column_sum, mask=j < count)
    # All threads wrote the scratch and all read it.
    tl.debug_barrier()
    for start in range(0, count, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)[:, None]
        spread = i + tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
        inside = (spread < count) & (j < count)
        i_x, _i_a, _i_b, _i_k, free, _i_f_free, _i_free = gram_norms(grams, spread, count)
        h = tl.load(scratch + spread * count + j, mask=inside, other=0.0)
        h += tl.load(scratch + j * count + spread, mask=inside, other=0.0)
        radial = tl.load(row_radial + spread, mask=inside, other=0.0)
        radial += tl.load(column_radial + spread, mask=inside, other=0.0)
        radial = tl.where(free & (spread == j), radial, 0.0)
        store_tile(matrix, i, j, count, count, (h - radial) * i_x * j_x * scale)
    return kl / tl.maximum(n, 1.0)


@triton.jit
def tile_address(base, tile, per_run, run_lines, b, s_b, s_c, s_h, VEC: tl.constexpr):
    """``base`` moved to sample b and to the run of ``tile``."""
    run = tile // per_run
    c, h = (run // run_lines).to(tl.int64), (run % run_lines).to(tl.int64)
    return base + (b * s_b + c * s_c + h * s_h) * VEC


@triton.jit
def mean_rows(
    base, frame_mask, sample, frames, mask_b, mask_f, column, inside, stride, step,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The mean over the valid rows of ``base[row·stride + column·step]``, [L]."""
    total = tl.zeros([BLOCK_L], tl.float32)
    count = 0.0
    for block in range(BLOCKS):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = frame_validity(frame_mask, sample, row, frames, mask_b, mask_f)
        total += tl.sum(load_rows(base, row, valid, column, inside, stride, step), 0)
        count += tl.sum(valid.to(tl.float32), 0)
    return total / tl.maximum(count, 1.0)


@triton.jit
def student_gram(
    student, frame_mask, pooled, sample, b, i, j, i_valid, j_valid, first, last, pair, frames, runs, run_lines, length,
    x_b, x_f, x_c, x_h, x_w, mask_b, mask_f,
    BLOCKS: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, GRAMS: tl.constexpr,
):  # fmt: skip
    """X [N, N] of tiles ``first : last``; stores the time averages of x there."""
    xx = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    per_run = tl.cdiv(length, BLOCK_L)
    lane = tl.arange(0, BLOCK_L)
    for tile in range(first, last):
        start = tile % per_run * BLOCK_L
        column = start + lane
        inside = lane // VEC < (length - start) // VEC
        x_at = tile_address(student, tile, per_run, run_lines, b, x_b, x_c, x_h, VEC)
        if GRAMS:
            x = load_rows(x_at, i, i_valid, column, inside, x_f * VEC, x_w)
            xj = x
            if BLOCKS > 1:
                xj = load_rows(x_at, j, j_valid, column, inside, x_f * VEC, x_w)
            xx = tl.dot(x, tl.trans(xj), xx, input_precision="ieee")
        if pooled is not None:  # noqa: SIM102 (decided at compile time, the next at run time)
            if pair == 0:
                if GRAMS and BLOCKS == 1:
                    mean = tl.sum(x, 0) / tl.maximum(tl.sum(i_valid.to(tl.float32), 0), 1.0)
                else:
                    mean = mean_rows(
                        x_at, frame_mask, sample, frames, mask_b, mask_f, column, inside, x_f * VEC, x_w,
                        BLOCKS, BLOCK_N, BLOCK_L,
                    )  # fmt: skip
                line = pooled + b * (3 * runs.to(tl.int64) * length + 1)
                tl.store(line + tl.cast(tile // per_run, tl.int64) * length + column, mean, mask=inside)
    return xx


@triton.jit
def score_grams(
    real, fake, frame_mask, pooled, sample, b, i, j, i_valid, j_valid, first, last, pair, frames, runs, run_lines,
    length, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, mask_b, mask_f,
    BLOCKS: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    GRAMS: tl.constexpr, DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """R, T [N, N] and ‖f‖² [N] of tiles ``first : last``; stores the time averages of r and d there.

    They come before the dots, which need every register.
    """
    rr = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    tt = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    ff = tl.zeros([BLOCK_N], tl.float32)
    per_run = tl.cdiv(length, BLOCK_L)
    lane = tl.arange(0, BLOCK_L)
    for tile in range(first, last):
        start = tile % per_run * BLOCK_L
        column = start + lane
        inside = lane // VEC < (length - start) // VEC
        r_at = tile_address(real, tile, per_run, run_lines, b, r_b, r_c, r_h, VEC)
        f_at = tile_address(fake, tile, per_run, run_lines, b, f_b, f_c, f_h, VEC)
        if GRAMS:
            r = load_rows(r_at, i, i_valid, column, inside, r_f * VEC, r_w)
            f = load_rows(f_at, i, i_valid, column, inside, f_f * VEC, f_w)
            if DIFFERENCE:
                d = f
                f = r + d
            else:
                d = f - r
        if pooled is not None:  # noqa: SIM102 (decided at compile time, the next at run time)
            if pair == 0:
                if GRAMS and BLOCKS == 1:
                    count = tl.maximum(tl.sum(i_valid.to(tl.float32), 0), 1.0)
                    mean_r, mean_d = tl.sum(r, 0) / count, tl.sum(d, 0) / count
                else:
                    mean_r = tl.zeros([BLOCK_L], tl.float32)
                    mean_d = tl.zeros([BLOCK_L], tl.float32)
                    valid_rows = 0.0
                    for block in range(BLOCKS):
                        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
                        valid = frame_validity(frame_mask, sample, row, frames, mask_b, mask_f)
                        rs = load_rows(r_at, row, valid, column, inside, r_f * VEC, r_w)
                        mean_r += tl.sum(rs, 0)
                        mean_d += tl.sum(load_rows(f_at, row, valid, column, inside, f_f * VEC, f_w) - rs, 0)
                        valid_rows += tl.sum(valid.to(tl.float32), 0)
                    mean_r, mean_d = mean_r / tl.maximum(valid_rows, 1.0), mean_d / tl.maximum(valid_rows, 1.0)
                features = runs.to(tl.int64) * length
                line = pooled + b * (3 * features + 1) + features
                line += tl.cast(tile // per_run, tl.int64) * length
                tl.store(line + column, mean_r, mask=inside)
                tl.store(line + features + column, mean_d, mask=inside)
        if GRAMS:
            middle = 0.5 * (r + f)
            if BLOCKS == 1:
                rr = tl.dot(r, tl.trans(r), rr, input_precision="ieee")
                tt = tl.dot(d, tl.trans(middle), tt, input_precision="ieee")
            else:
                rj = load_rows(r_at, j, j_valid, column, inside, r_f * VEC, r_w)
                dj = load_rows(f_at, j, j_valid, column, inside, f_f * VEC, f_w)
                if not DIFFERENCE:
                    dj -= rj
                rr = tl.dot(r, tl.trans(rj), rr, input_precision="ieee")
                tt = tl.dot(d, tl.trans(rj + 0.5 * dj), tt, input_precision="ieee")
                tt = tl.dot(middle, tl.trans(dj), tt, input_precision="ieee")
            ff += tl.sum(f * f, 1)
    if BLOCKS == 1:
        tt += tl.trans(tt)
    return rr, tt, ff


@triton.jit(
    do_not_specialize=["samples", "frames", "runs", "run_lines", "tiles", "pieces_at"],
    do_not_specialize_on_alignment=["frame_mask", "frame_term", "terms", "matrices", "pooled", "workspace", "counters"],
)
def gram_kernel(
    student, real, fake,  # [B, F, runs of `length` elements]; `fake` holds d itself if DIFFERENCE
    frame_mask,  # [B, F], != 0 is valid, or None
    frame_term,  # [1] or None: the frame term, when this launch computes the batch term
    terms,  # [3]
    matrices,  # [B, F, F]: M of the mean over samples
    pooled,  # [B, 3K + 1] or None: time averages of x, r, d, and the number of valid frames
    workspace,  # a relation's grams X, R, T, ‖f‖² are SIZE = 3·F(F + 1)/2 + F floats, X from one kind of program, the
    # others from the other: grams [B, SIZE], sums of groups [B, ...], scratch [B, F + 2, F], losses [B], and from
    # pieces_at on the pieces [B, ...] of all splits
    counters,  # [B·(all groups + 1) + 1], zero before and after
    samples, frames, runs, run_lines, length, tiles, pieces_at,
    x_b, x_f, x_c, x_h, x_w, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, mask_b, mask_f,
    temperature, batch_weight, frame_weight,
    SPLITS_X: tl.constexpr, SPLITS_S: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_J: tl.constexpr,
    GRAMS: tl.constexpr, DIFFERENCE: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Grid [B·(SPLITS_X + SPLITS_S)·BLOCKS(BLOCKS + 1)/2]: splits of x, then of r and f, for every pair of row blocks.

    Strides of b, f, c, h are in units of VEC elements. With BATCH the relation is the batch term.
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
        xx = student_gram(
            student, frame_mask, pooled, sample, b, i, j, i_valid, j_valid,
            split * share, tl.minimum(tiles, split * share + share), pair, frames, runs, run_lines, length,
            x_b, x_f, x_c, x_h, x_w, mask_b, mask_f, BLOCKS, VEC, BLOCK_N, BLOCK_L, GRAMS,
        )  # fmt: skip
        if GRAMS:
            tl.store(piece + at, xx, mask=upper)
    else:
        share = tl.cdiv(tiles, SPLITS_S)
        rr, tt, ff = score_grams(
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
        sums = workspace + samples.to(tl.int64) * size + b * sums_size
        scratch = workspace + samples.to(tl.int64) * (size + sums_size) + b * (frames + 2) * frames
        losses = workspace + samples.to(tl.int64) * (size + sums_size + (frames + 2) * frames)

        group = split // GROUP
        last = tl.minimum(group * GROUP + GROUP, tl.where(of_student, SPLITS_X, SPLITS_S))
        tickets = counters + sample * (GROUPS + 1)
        ticket = tickets + tl.where(of_student, group, GROUPS_X + group)
        own_sum = sums + tl.where(of_student, 0, GROUPS_X * half) + group * piece_size
        # Every thread's stores must precede the one thread's ticket.
        tl.debug_barrier()
        if tl.atomic_add(ticket, 1) == (last - group * GROUP) * PAIRS - 1:
            tl.store(ticket, 0)
            add_pieces(own_sum, pieces, group * GROUP, last, piece_size, piece_size, 1024)
            tl.debug_barrier()
            if tl.atomic_add(tickets + GROUPS, 1) == GROUPS - 1:
                tl.store(tickets + GROUPS, 0)
                add_pieces(grams, sums, 0, GROUPS_X, half, half, 1024)
                add_pieces(grams + half, sums + GROUPS_X * half, 0, GROUPS_S, scores_size, scores_size, 1024)
                tl.debug_barrier()
                loss = relation_of_grams(
                    grams, frame_mask, sample, frames, mask_b, mask_f, temperature, scratch,
                    matrices + b * frames * frames, 1.0 / samples, 16, BLOCK_J,
                )  # fmt: skip
                tl.store(losses + sample, loss)
                tl.debug_barrier()
                every = counters + samples * (GROUPS + 1)
                if tl.atomic_add(every, 1) == samples - 1:
                    tl.store(every, 0)
                    mean = ordered_sum(losses, samples, 16) / samples
                    if BATCH:
                        frame = 0.0
                        if frame_term is not None:
                            frame = tl.load(frame_term)
                        store_terms(terms, mean, frame, batch_weight, frame_weight)
                    else:
                        store_terms(terms, 0.0, mean, batch_weight, frame_weight)
