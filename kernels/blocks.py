"""Device functions of several folders: validity, the floor of a norm, fixed-order sums, terms, upstream gradients."""

from typing import Any

import triton
import triton.language as tl

from .launch import INTERPRETING

INTERPRETED = tl.constexpr(INTERPRETING)
NORM_FLOOR = tl.constexpr(1e-12)
LEAST_OF_FEATURES = tl.constexpr(2**-12)
LEAST_OF_GRAMS = tl.constexpr(2**-6)
"""The least ‖f‖/‖r‖ at which f = r + d of a float32 d keeps digits; Grams square it."""

TEMPERATURE = tl.constexpr(0)
BATCH_WEIGHT = tl.constexpr(1)
FRAME_WEIGHT = tl.constexpr(2)
RELATION_WEIGHT = tl.constexpr(3)
REAL_SCALE = tl.constexpr(4)
FAKE_SCALE = tl.constexpr(5)
"""Places in a call's numbers, as :class:`codmd.ops.contract.Numbers` has them."""


@triton.jit
def number(numbers, place: tl.constexpr, value):
    """A number of the call: loaded where ``numbers`` [6] schedule it on the device, else ``value``."""
    if numbers is not None:
        return tl.load(numbers + place)
    else:
        return value


@tl.core.builtin
def drain_stores(_semantic: Any = None) -> None:
    """On AMD GPUs: wait until the stores of this wave have left it.

    There a barrier only orders waves of a block, and the release of a ticket only waits for the stores of the one wave
    that takes it. The stores of others might still be under way to an L2 cache that other blocks do not share.
    """
    if _semantic.builder.options.backend_name == "hip":
        wait = "s_waitcnt vmcnt(0)\nv_mov_b32 $0, 0"
        tl.inline_asm_elementwise(wait, "=v", [], dtype=tl.int32, is_pure=False, pack=1, _semantic=_semantic)


@triton.jit
def takes_last(counter, count):
    """Take one of ``count`` tickets: whether it is the last, whose block then sees what every block stored before.

    The counter is zero again afterwards.
    """
    # Every thread's stores must precede the one thread's ticket.
    if not INTERPRETED:
        drain_stores()
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1) == count - 1
    tl.store(counter, 0, mask=last)
    return last


@triton.jit
def takes_last_of_any(counter, count):
    """:func:`takes_last`; a barrier alone where the block is the only one."""
    last = count == 1
    tl.debug_barrier()
    if count > 1:
        last = takes_last(counter, count)
    return last


@triton.jit
def frame_validity(frame_mask, sample, frame, frames, mask_b, mask_f):
    """Bool like ``frame``: inside the video and not masked."""
    inside = frame < frames
    if frame_mask is None:
        return inside
    else:
        at = frame_mask + sample.to(tl.int64) * mask_b + frame.to(tl.int64) * mask_f
        return inside & (tl.load(at, mask=inside, other=0) != 0)


@triton.jit
def unless_alone(valid, n):
    """``valid``, all False where fewer than two vectors take part: such a relation is exactly 0."""
    return valid & (tl.broadcast_to(n, valid.shape) >= 2.0)


@triton.jit
def norm_of(square):
    """The square root; NaN where the sum of squares left the range, for a unit vector would be a finite 0."""
    return tl.where(square < float("inf"), tl.sqrt_rn(square), float("nan"))


@triton.jit
def at_least_floor(norm):
    """max(norm, NORM_FLOOR); a NaN stays."""
    return tl.maximum(norm, NORM_FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def square_of(value):
    """value²; float32's least normal number where a square other than zero would leave its range."""
    return tl.where(value != 0.0, tl.maximum(value * value, 1.1754943508222875e-38, tl.PropagateNan.ALL), 0.0)


@triton.jit
def kept_apart(r, d, zero):
    """d, which moves by one rounding where rounding made it -r although f is not ``zero``.

    ‖r + d‖ then tells an f far under r from a zero; see :func:`unless_lost`.
    """
    return tl.where((r + d == 0.0) & (zero == 0), d * 0.9999999403953552, d)


@triton.jit
def difference_of(r, f):
    """d = f - r, :func:`kept_apart`."""
    return kept_apart(r, f - r, f == 0.0)


@triton.jit
def unless_lost(f_norm, r_norm, least):
    """‖f‖; NaN where f = r + d has no digits left, below ``least``·‖r‖. Far under the floor f counts as zero there."""
    return tl.where((f_norm > 1e-16) & (f_norm < least * r_norm), float("nan"), f_norm)


@triton.jit
def unit_diagonal(similarity, difference, diagonal, x_free, score_free):
    """S_ii = 1 and Δ_ii = 0 exactly, as they are for vectors whose norm is not clamped.

    A rounding there would be divided by τ like every other and shift the whole row's KL.
    """
    similarity = tl.where(diagonal & x_free, 1.0, similarity)
    return similarity, tl.where(diagonal & score_free, 0.0, difference)


@triton.jit
def store_tile(matrix, i, j, rows, columns, value):
    """matrix[i, j] = value for i < rows, j < columns; row length ``columns``."""
    tl.store(matrix + i * columns + j, value, mask=(i < rows) & (j < columns))


@triton.jit
def ordered_sum(values, count, BLOCK: tl.constexpr):
    """Σ values[:count] in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(values + i, mask=i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def weighted_terms(batch, frame, numbers, batch_weight, frame_weight):
    """w_B·L_B + w_F·L_F."""
    return number(numbers, BATCH_WEIGHT, batch_weight) * batch + number(numbers, FRAME_WEIGHT, frame_weight) * frame


@triton.jit
def store_terms(terms, batch, frame, numbers, batch_weight, frame_weight):
    """terms = (total, batch term, frame term)."""
    tl.store(terms, weighted_terms(batch, frame, numbers, batch_weight, frame_weight))
    tl.store(terms + 1, batch)
    tl.store(terms + 2, frame)


@triton.jit
def store_objective_terms(terms, dmd, batch, frame, numbers, batch_weight, frame_weight, relation_weight):
    """The first four of (total, DMD loss, batch term, frame term, mean|g|)."""
    relation = weighted_terms(batch, frame, numbers, batch_weight, frame_weight)
    tl.store(terms, dmd + number(numbers, RELATION_WEIGHT, relation_weight) * relation)
    tl.store(terms + 1, dmd)
    tl.store(terms + 2, batch)
    tl.store(terms + 3, frame)


@triton.jit
def upstream(grad_total, weight, grad_term):
    """grad_total·weight + grad_term, where a missing gradient is 0."""
    scale = 0.0
    if grad_total is not None:
        scale += tl.load(grad_total).to(tl.float32) * weight
    if grad_term is not None:
        scale += tl.load(grad_term).to(tl.float32)
    return scale
