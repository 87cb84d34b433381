"""Frame and batch relations of whole latents (pool=None) in the same passes: plans and launches.

Where the Gram matrices of all samples fit the registers of one program, forward and backward read every latent once and
keep no table of time averages: what stays between them are the matrices M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codmd.ops.contract import Found, Relation, Upstream

from .. import limits
from ..launch import INTERPRETING, TRITON, Launcher, current_stream, multiprocessors
from ..plans import PLANS, Workspace, alignment, dtype_of, mask_key, number_arguments, pair_of_strides
from ..tickets import counters
from ..tiling import GROUP, Geometry, cdiv, next_power_of_2
from .apply_batch import apply_batch_kernel
from .gram_batch import gram_batch_kernel
from .matrices import relations_kernel
from .runs import Runs

MOST_ROWS = 256
"""Rows of all samples, padded, of a tile of 16 columns."""

MOST_FRAMES = 32
"""Rows of a sample, padded, whose Gram matrices the registers of a warp hold."""

MOST_PRODUCTS = MOST_ROWS * MOST_FRAMES
"""Elements of the Gram matrices of all samples, that the registers of eight warps hold twice."""

BLOCK_J = 16
"""Depth of a dot of the gradient: an IEEE float32 dot holds its operands in registers."""

DOTS_OF_EIGHT = INTERPRETING or TRITON >= (3, 8)
"""Whether ``tl.dot`` takes 8 columns, and 2 rows; the compiler of older releases of Triton asks for 16."""


def _blocks(samples: int, frames: int) -> tuple[int, int]:
    return next_power_of_2(samples), max(16, next_power_of_2(frames))


def _columns(block_b: int, block_n: int) -> int:
    """Columns of a tile in float32: the largest Gram matrices leave registers for the operands of one dot of 8."""
    if block_b * block_n**2 == MOST_PRODUCTS:
        return 8
    return 32 if block_b * block_n <= 64 else 16


def is_together(samples: int, frames: int) -> bool:
    """Whether the batch gradient of whole latents is the matrix M ``[1, B, B]``, and no table of averages is kept."""
    block_b, block_n = _blocks(samples, frames)
    return DOTS_OF_EIGHT and samples > 1 < frames and block_n <= MOST_FRAMES and block_b * block_n <= MOST_ROWS


class TogetherPlan:
    """Launches of :func:`gram_batch_kernel` and :func:`relations_kernel`; ``with_frames``: with the frame relations."""

    def __init__(
        self, samples: int, frames: int, runs: Runs, processors: int, with_frames: bool, mask_strides: tuple[int, int],
        half_precision: bool,
    ) -> None:  # fmt: skip
        block_b, block_n = _blocks(samples, frames)
        slices = 0
        if half_precision:
            slices = cdiv(8, block_b)
            block_l, block_x = 16 * slices, 32 * slices
        else:
            block_l = block_x = _columns(block_b, block_n)
        tiles = runs.tiles(block_l)
        most = cdiv(tiles, 4)
        # Half as many bytes for x as for r and f; on tensor cores a third of the instructions.
        splits_x = max(1, min(processors * 3 // 11 if half_precision else processors // 3, most))
        splits_s = max(1, min(processors - splits_x, most))
        groups_x, groups_s = cdiv(splits_x, GROUP), cdiv(splits_s, GROUP)

        def triangles(vectors: int, grams: int) -> int:
            return grams * vectors * (vectors + 1) // 2

        x_size = triangles(samples, 1) + (samples * triangles(frames, 1) if with_frames else 0)
        s_size = triangles(samples, 2) + samples
        s_size += samples * (triangles(frames, 2) + frames) if with_frames else 0
        largest = max(samples, frames)
        room = Workspace(grams=triangles(largest, 3) + largest, scratch=(largest + 2) * largest)
        workspace = Workspace(
            sums=groups_x * x_size + groups_s * s_size, losses=samples + 1, valid=samples,
            rooms=(samples + 1) * room.size, pieces=splits_x * x_size + splits_s * s_size,
        )  # fmt: skip
        self.workspace = workspace.size
        self.counters = groups_x + groups_s
        self.grams = Launcher(
            gram_batch_kernel,
            splits_x + splits_s,
            (
                splits_x, splits_s, GROUP, runs.vec, block_b, block_n, block_l, slices, block_x, runs.count == 1,
                with_frames,
            ),
            warps=8 if half_precision or block_b * block_n**2 > 2048 else 4,
            registers=255,
            fixed=(
                samples, frames, runs.count, runs.lines, runs.length, tiles, *workspace.at("pieces"),
                *sum(runs.strides, ()), *mask_strides,
            ),
        )  # fmt: skip
        self.relations = Launcher(
            relations_kernel,
            samples + 1 if with_frames else 1,
            (groups_x, groups_s, max(16, block_b), block_n, with_frames),
            warps=4,
            registers=255,
            fixed=(
                samples, frames, *workspace.at("losses", "valid", "rooms"), room.size, *room.at("scratch"),
                *mask_strides,
            ),
        )  # fmt: skip


class TogetherGradientPlan:
    """Launch of :func:`apply_batch_kernel`."""

    def __init__(
        self, samples: int, frames: int, runs: Runs, processors: int, mask_strides: tuple[int, int],
        half_precision: bool,
    ) -> None:  # fmt: skip
        block_b, block_n = _blocks(samples, frames)
        slices = 0
        block_l = max(16, min(64, 4096 // (block_b * block_n)))
        warps = max(4, block_b * block_n * block_l // 512)
        if half_precision:
            slices, warps = cdiv(8, block_b), 8
            block_l = 32 * slices
        tiles = runs.tiles(block_l)
        splits = max(1, min(tiles, 8 * processors))
        self.launch = Launcher(
            apply_batch_kernel,
            splits,
            (splits, runs.vec, block_b, block_n, block_l, BLOCK_J, slices, runs.count == 1),
            warps=warps,
            registers=255,
            fixed=(samples, frames, runs.count, runs.lines, runs.length, tiles, *sum(runs.strides, ()), *mask_strides),
        )


def relation(call: Relation) -> Found:
    """M / B of the frame relations ``[B, F, F]`` (empty unless wanted) and M of the batch relation ``[1, B, B]``."""
    student, real, fake, frame_mask, layout, _, _, frame, numbers = call
    device = student.device
    samples, frames = student.shape[0], student.shape[1 if layout == "bfchw" else 2]
    strides = student.stride(), real.stride(), fake.stride()
    aligned = alignment(student, real, fake)

    def make() -> TogetherPlan:
        geometries = tuple(Geometry.of(student.shape, s, layout) for s in strides)
        limits.check(geometries[0].sizes, None, True, frame)
        runs = Runs(geometries, (student.element_size(),) * 3, aligned is True)
        processors, half = multiprocessors(device), student.element_size() == 2
        return TogetherPlan(samples, frames, runs, processors, frame, pair_of_strides(frame_mask), half)

    key = (
        TogetherPlan, student.shape, strides, aligned, student.dtype, device, layout, frame, mask_key(frame_mask),
        type(numbers),
    )  # fmt: skip
    plan = PLANS.get(key) or PLANS.of(key, make)
    terms = torch.empty(3, dtype=torch.float32, device=device)
    matrices = torch.empty((samples, frames, frames) if frame else 0, dtype=torch.float32, device=device)
    batch_matrix = torch.empty((1, samples, samples), dtype=torch.float32, device=device)
    workspace = torch.empty(plan.workspace, dtype=torch.float32, device=device)
    stream = current_stream(student)
    tickets = counters(student, stream, plan.counters)
    plan.grams(stream, student, real, fake, frame_mask, workspace, tickets)
    plan.relations(stream, frame_mask, terms, matrices, batch_matrix, workspace, tickets, *number_arguments(numbers))
    return Found(terms, None, None, matrices, batch_matrix)


def gradient(out: Tensor, upstream: Upstream, call: Relation, found: Found) -> None:
    """Write the gradient of the student's latents into ``out``, from the student's values and both kinds of M."""
    total, _, batch, frame = upstream
    student, frame_mask, layout, numbers = call.student, call.frame_mask, call.layout, call.numbers
    strides, aligned = (out.stride(), student.stride()), alignment(out, student)
    has_frames = found.frame_grad.numel() > 0 and not (total is None and frame is None)

    def make() -> TogetherGradientPlan:
        geometries = tuple(Geometry.of(out.shape, s, layout) for s in strides)
        runs = Runs(geometries, (out.element_size(),) * 2, aligned is True)
        processors = multiprocessors(out.device)
        mask, half = pair_of_strides(frame_mask), out.element_size() == 2
        return TogetherGradientPlan(*geometries[0].sizes[:2], runs, processors, mask, half)

    key = (
        TogetherGradientPlan, out.shape, strides, aligned, out.dtype, out.device, layout, has_frames,
        mask_key(frame_mask), dtype_of(total), dtype_of(batch), dtype_of(frame), type(numbers),
    )  # fmt: skip
    plan = PLANS.get(key) or PLANS.of(key, make)
    plan.launch(
        current_stream(out), out, student, frame_mask, total, batch, frame,
        found.frame_grad if has_frames else None, found.batch_grad, *number_arguments(numbers),
    )  # fmt: skip
