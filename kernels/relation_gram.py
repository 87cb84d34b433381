"""Relations of whole latents (pool=None): Gram matrices of N ≤ 128 long vectors in one streaming pass.

With d = f - r, the pass accumulates X = x xᵀ, R = r rᵀ, T = d fᵀ + r dᵀ (so that f fᵀ = R + T without cancellation)
and ‖f‖². From a_i² = R_ii, b_i = ‖f_i‖, k_i = b_i - a_i = T_ii/(a_i + b_i):

    S_ij = X_ij/(n_i n_j)        Δ_ij = (T_ij - R_ij/(a_i a_j)·(k_i a_j + b_i k_j)) / (b_i b_j)

and the loss, G, and M with ∂L/∂x = M x as in ``codmd.reference``. Dots are IEEE float32. The long axis is split over
programs; the last block of a group of splits adds the group, the last group's block adds the groups, both in order.
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
def add_pieces(total, pieces, first, last, size, BLOCK: tl.constexpr):
    """total[:size] = Σ pieces[p·size : (p + 1)·size] for first ≤ p < last, in order."""
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.zeros([BLOCK], tl.float32)
        for piece in tl.range(first, last, loop_unroll_factor=4):
            value += tl.load(pieces + tl.cast(piece, tl.int64) * size + at, mask=at < size, other=0.0)
        tl.store(total + at, value, mask=at < size)


@triton.jit
def gram_norms(grams, i, count, size):
    """1/n_x, a, b, k of vectors i, and whether ‖x‖, ‖f‖ and both scores reach the floor; shaped like ``i``."""
    inside = i < count
    diagonal = i * count + i
    square = count * count
    t = tl.load(grams + 2 * square + diagonal, mask=inside, other=0.0)
    x_norm = tl.sqrt_rn(tl.load(grams + diagonal, mask=inside, other=1.0))
    r_norm = tl.sqrt_rn(tl.load(grams + square + diagonal, mask=inside, other=1.0))
    f_norm = tl.sqrt_rn(tl.load(grams + 3 * square + i, mask=inside, other=1.0))
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
    size = 3 * count * count + count
    square = count * count
    j = tl.arange(0, BLOCK_J)[None, :]
    j_valid = frame_validity(frame_mask, sample, j, count, mask_b, mask_f)
    n = tl.sum(tl.sum(j_valid.to(tl.float32), 1), 0)
    j_valid = unless_alone(j_valid, n)
    j_x, j_a, j_b, j_k, _j_x_free, j_f_free, j_free = gram_norms(grams, j, count, size)
    kl = 0.0
    column_sum = tl.zeros([1, BLOCK_J], tl.float32)
    for start in range(0, count, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)[:, None]
        spread = i + tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
        i_valid = unless_alone(frame_validity(frame_mask, sample, spread, count, mask_b, mask_f), n)
        i_x, i_a, i_b, i_k, x_free, i_f_free, i_free = gram_norms(grams, spread, count, size)
        at = tl.minimum(spread, j) * count + tl.maximum(spread, j)
        inside = (spread < count) & (j < count)
        x = tl.load(grams + at, mask=inside, other=0.0)
        r = tl.load(grams + square + at, mask=inside, other=0.0)
        t = tl.load(grams + 2 * square + at, mask=inside, other=0.0)
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
        i_x, _i_a, _i_b, _i_k, free, _i_f_free, _i_free = gram_norms(grams, spread, count, size)
        h = tl.load(scratch + spread * count + j, mask=inside, other=0.0)
        h += tl.load(scratch + j * count + spread, mask=inside, other=0.0)
        radial = tl.load(row_radial + spread, mask=inside, other=0.0)
        radial += tl.load(column_radial + spread, mask=inside, other=0.0)
        radial = tl.where(free & (spread == j), radial, 0.0)
        store_tile(matrix, i, j, count, count, (h - radial) * i_x * j_x * scale)
    return kl / tl.maximum(n, 1.0)


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
    workspace,  # grams [B, GROUPS + 1, 3F² + F], scratch [B, F + 2, F], losses [B], pieces [B, SPLITS, 3F² + F]
    counters,  # [B·(GROUPS + 1) + 1], zero before and after
    samples, frames, runs, run_lines, length, tiles, pieces_at,
    x_b, x_f, x_c, x_h, x_w, r_b, r_f, r_c, r_h, r_w, f_b, f_f, f_c, f_h, f_w, mask_b, mask_f,
    temperature, batch_weight, frame_weight,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_J: tl.constexpr,
    GRAMS: tl.constexpr, DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """Grid [B·SPLITS·BLOCKS(BLOCKS + 1)/2]. Strides of b, f, c, h are in units of VEC elements."""
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    GROUPS: tl.constexpr = (SPLITS + GROUP - 1) // GROUP
    pid = tl.program_id(0)
    pair = pid % PAIRS
    split = pid // PAIRS % SPLITS
    sample = pid // (PAIRS * SPLITS)
    b = sample.to(tl.int64)
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

    xx = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    rr = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    tt = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    ff = tl.zeros([BLOCK_N], tl.float32)
    per_run = tl.cdiv(length, BLOCK_L)
    share = tl.cdiv(tiles, SPLITS)
    lane = tl.arange(0, BLOCK_L)
    for tile in range(split * share, tl.minimum(tiles, split * share + share)):
        run = tile // per_run
        start = tile % per_run * BLOCK_L
        c, h = (run // run_lines).to(tl.int64), (run % run_lines).to(tl.int64)
        column = start + lane
        inside = lane // VEC < (length - start) // VEC
        x_at = student + (b * x_b + c * x_c + h * x_h) * VEC
        r_at = real + (b * r_b + c * r_c + h * r_h) * VEC
        f_at = fake + (b * f_b + c * f_c + h * f_h) * VEC
        if GRAMS:
            x = load_rows(x_at, i, i_valid, column, inside, x_f * VEC, x_w)
            r = load_rows(r_at, i, i_valid, column, inside, r_f * VEC, r_w)
            f = load_rows(f_at, i, i_valid, column, inside, f_f * VEC, f_w)
            xj, rj, fj = x, r, f
            if BLOCKS > 1:
                xj = load_rows(x_at, j, j_valid, column, inside, x_f * VEC, x_w)
                rj = load_rows(r_at, j, j_valid, column, inside, r_f * VEC, r_w)
                fj = load_rows(f_at, j, j_valid, column, inside, f_f * VEC, f_w)
            if DIFFERENCE:
                d, dj = f, fj
                f, fj = r + d, rj + dj
            else:
                d, dj = f - r, fj - rj
            xx = tl.dot(x, tl.trans(xj), xx, input_precision="ieee")
            rr = tl.dot(r, tl.trans(rj), rr, input_precision="ieee")
            tt = tl.dot(d, tl.trans(fj), tt, input_precision="ieee")
            tt = tl.dot(r, tl.trans(dj), tt, input_precision="ieee")
            ff += tl.sum(f * f, 1)
        if pooled is not None:  # noqa: SIM102 (decided at compile time, the next at run time)
            if pair == 0:
                count = 0.0
                if GRAMS and BLOCKS == 1:
                    sum_x, sum_r, sum_d = tl.sum(x, 0), tl.sum(r, 0), tl.sum(d, 0)
                    count += tl.sum(i_valid.to(tl.float32), 0)
                else:
                    sum_x = tl.zeros([BLOCK_L], tl.float32)
                    sum_r = tl.zeros([BLOCK_L], tl.float32)
                    sum_d = tl.zeros([BLOCK_L], tl.float32)
                    for block in range(BLOCKS):
                        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
                        valid = frame_validity(frame_mask, sample, row, frames, mask_b, mask_f)
                        xs = load_rows(x_at, row, valid, column, inside, x_f * VEC, x_w)
                        rs = load_rows(r_at, row, valid, column, inside, r_f * VEC, r_w)
                        fs = load_rows(f_at, row, valid, column, inside, f_f * VEC, f_w)
                        sum_x += tl.sum(xs, 0)
                        sum_r += tl.sum(rs, 0)
                        sum_d += tl.sum(fs - rs, 0)
                        count += tl.sum(valid.to(tl.float32), 0)
                features = runs.to(tl.int64) * length
                line = pooled + b * (3 * features + 1)
                count_safe = tl.maximum(count, 1.0)
                line_at = line + tl.cast(run, tl.int64) * length + column
                tl.store(line_at, sum_x / count_safe, mask=inside)
                tl.store(line_at + features, sum_r / count_safe, mask=inside)
                tl.store(line_at + 2 * features, sum_d / count_safe, mask=inside)
                if tile == 0:
                    tl.store(line + 3 * features, count)

    if GRAMS:
        square = frames * frames
        size = 3 * square + frames
        grams = workspace + b * (GROUPS + 1) * size
        scratch = workspace + samples.to(tl.int64) * (GROUPS + 1) * size + b * (frames + 2) * frames
        losses = workspace + samples.to(tl.int64) * ((GROUPS + 1) * size + (frames + 2) * frames)
        pieces = workspace + pieces_at + b * SPLITS * size
        piece = pieces + split.to(tl.int64) * size
        upper = (i[:, None] <= j[None, :]) & (j < frames)[None, :]
        at = i[:, None] * frames + j[None, :]
        tl.store(piece + at, xx, mask=upper)
        tl.store(piece + square + at, rr, mask=upper)
        tl.store(piece + 2 * square + at, tt, mask=upper)
        tl.store(piece + 3 * square + i, ff, mask=(i < frames) & (i == j))

        group = split // GROUP
        last = tl.minimum(group * GROUP + GROUP, SPLITS)
        tickets = counters + sample * (GROUPS + 1)
        # Every thread's stores must precede the one thread's ticket.
        tl.debug_barrier()
        if tl.atomic_add(tickets + group, 1) == (last - group * GROUP) * PAIRS - 1:
            tl.store(tickets + group, 0)
            add_pieces(grams + (group + 1) * size, pieces, group * GROUP, last, size, 1024)
            tl.debug_barrier()
            if tl.atomic_add(tickets + GROUPS, 1) == GROUPS - 1:
                tl.store(tickets + GROUPS, 0)
                add_pieces(grams, grams + size, 0, GROUPS, size, 1024)
                tl.debug_barrier()
                loss = relation_of_grams(
                    grams, frame_mask, sample, frames, mask_b, mask_f, temperature, scratch,
                    matrices + b * square, 1.0 / samples, 16, BLOCK_J,
                )  # fmt: skip
                tl.store(losses + sample, loss)
                tl.debug_barrier()
                every = counters + samples * (GROUPS + 1)
                if tl.atomic_add(every, 1) == samples - 1:
                    tl.store(every, 0)
                    mean = ordered_sum(losses, samples, 16) / samples
                    if DIFFERENCE:
                        frame = 0.0
                        if frame_term is not None:
                            frame = tl.load(frame_term)
                        store_terms(terms, mean, frame, batch_weight, frame_weight)
                    else:
                        store_terms(terms, 0.0, mean, batch_weight, frame_weight)
