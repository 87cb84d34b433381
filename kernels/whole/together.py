"""Frame and batch relations of whole latents (pool=None) in the same passes: plans and launches.

Where the Gram matrices of all samples fit the registers of one program, forward and backward read every latent once and
keep no table of time averages: what stays between them are the matrices M.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import limits
from ..launch import (
    INTERPRETING,
    TRITON,
    Launcher,
    alignment,
    counters,
    current_stream,
    mask_key,
    mask_strides,
    multiprocessors,
)
from ..tiling import GROUP, Geometry, cdiv, next_power_of_2
from .apply_batch import apply_batch_kernel
from .gram_batch import gram_batch_kernel
from .matrices import relations_kernel
from .runs import Runs

MOST_PRODUCTS = 8192
"""Elements of the Gram matrices of all samples, padded, that the registers of eight warps hold twice."""

MOST_ROWS = 256
"""Rows of all samples, padded, of a tile of 16 columns."""

BLOCK_J = 16
"""Depth of a dot of the gradient: an IEEE float32 dot holds its operands in registers."""

DOTS_OF_EIGHT = INTERPRETING or TRITON >= (3, 8)
"""Whether ``tl.dot`` takes 8 columns, and 2 rows; the compiler of older releases of Triton asks for 16."""

_plans: dict[Any, Any] = {}


def _blocks(samples: int, frames: int) -> tuple[int, int]:
    return next_power_of_2(samples), max(16, next_power_of_2(frames))


def _columns(block_b: int, block_n: int, vec: int) -> int:
    """Columns of a tile: with the largest Gram matrices, one address an element leaves registers for one dot of 8."""
    if vec == 1 and block_b * block_n**2 == MOST_PRODUCTS:
        return 8
    return 32 if block_b * block_n <= 64 else 16


def is_together(samples: int, frames: int) -> bool:
    """Whether the batch gradient of whole latents is the matrix M ``[1, B, B]``, and no table of averages is kept."""
    block_b, block_n = _blocks(samples, frames)
    fits = block_b * block_n <= MOST_ROWS and block_b * block_n**2 <= MOST_PRODUCTS
    return DOTS_OF_EIGHT and samples > 1 and frames > 1 and fits


class ForwardPlan:
    """Launches of :func:`gram_batch_kernel` and :func:`relations_kernel`; ``with_frames``: with the frame relations."""

    def __init__(self, samples: int, frames: int, runs: Runs, processors: int, with_frames: bool) -> None:
        block_b, block_n = _blocks(samples, frames)
        block_l = _columns(block_b, block_n, runs.vec)
        tiles = runs.tiles(block_l)
        most = cdiv(tiles, 4)
        # Half as many bytes and dots for x as for r and f.
        splits_x = max(1, min(processors // 3, most))
        splits_s = max(1, min(processors - splits_x, most))
        groups_x, groups_s = cdiv(splits_x, GROUP), cdiv(splits_s, GROUP)

        def triangles(vectors: int, grams: int) -> int:
            return grams * vectors * (vectors + 1) // 2

        x_size = triangles(samples, 1) + (samples * triangles(frames, 1) if with_frames else 0)
        s_size = triangles(samples, 2) + samples
        s_size += samples * (triangles(frames, 2) + frames) if with_frames else 0
        largest = max(samples, frames)
        room = triangles(largest, 3) + largest + (largest + 2) * largest
        results_at = groups_x * x_size + groups_s * s_size
        pieces_at = results_at + 2 * samples + 1 + (samples + 1) * room
        self.workspace = pieces_at + splits_x * x_size + splits_s * s_size
        self.counters = groups_x + groups_s
        self.sizes = samples, frames, runs.lines, runs.length, tiles, pieces_at, *sum(runs.strides, ())
        self.result_sizes = samples, frames, results_at
        self.grams = Launcher(
            gram_batch_kernel,
            splits_x + splits_s,
            (splits_x, splits_s, GROUP, runs.vec, block_b, block_n, block_l, with_frames),
            warps=4 if block_b * block_n**2 <= 2048 else 8,
            registers=255,
        )
        self.relations = Launcher(
            relations_kernel,
            samples + 1 if with_frames else 1,
            (groups_x, groups_s, max(16, block_b), block_n, with_frames),
            warps=4,
            registers=255,
        )


class BackwardPlan:
    """Launch of :func:`apply_batch_kernel`."""

    def __init__(self, samples: int, frames: int, runs: Runs, processors: int) -> None:
        block_b, block_n = _blocks(samples, frames)
        block_l = max(16, min(64, 4096 // (block_b * block_n)))
        tiles = runs.tiles(block_l)
        splits = max(1, min(tiles, 8 * processors))
        self.sizes = samples, frames, runs.lines, runs.length, tiles, *sum(runs.strides, ())
        self.launch = Launcher(
            apply_batch_kernel,
            splits,
            (splits, runs.vec, block_b, block_n, block_l, BLOCK_J),
            warps=max(4, block_b * block_n * block_l // 512),
            registers=255,
        )


def relation_forward(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    temperature: float,
    batch_weight: float,
    frame_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 terms ``[3]``, M / B of the frame relations ``[B, F, F]`` (empty without weight), M ``[1, B, B]``."""
    device = student.device
    samples, frames = student.shape[0], student.shape[1 if layout == "bfchw" else 2]
    with_frames = frame_weight != 0
    strides = student.stride(), real.stride(), fake.stride()
    aligned = alignment(student, real, fake)
    key = (
        "grams", student.shape, strides, aligned, student.dtype, device, layout, with_frames, mask_key(frame_mask)
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        geometries = tuple(Geometry.of(student.shape, s, layout) for s in strides)
        limits.check(geometries[0].sizes, None, True, with_frames)
        runs = Runs(geometries, (student.element_size(),) * 3, aligned is True)
        plan = _plans[key] = ForwardPlan(samples, frames, runs, multiprocessors(device), with_frames)
    terms = torch.empty(3, dtype=torch.float32, device=device)
    matrices = torch.empty((samples, frames, frames) if with_frames else 0, dtype=torch.float32, device=device)
    batch_matrix = torch.empty((1, samples, samples), dtype=torch.float32, device=device)
    workspace = torch.empty(plan.workspace, dtype=torch.float32, device=device)
    stream = current_stream(student)
    tickets = counters(student, stream, plan.counters)
    mask = mask_strides(frame_mask)
    plan.grams(stream, student, real, fake, frame_mask, workspace, tickets, *plan.sizes, *mask)
    plan.relations(
        stream, frame_mask, terms, matrices, batch_matrix, workspace, tickets, *plan.result_sizes, *mask,
        float(temperature), float(batch_weight), float(frame_weight),
    )  # fmt: skip
    return terms, matrices, batch_matrix


def relation_backward(
    out: Tensor,
    grad_total: Tensor | None,
    grad_batch: Tensor | None,
    grad_frame: Tensor | None,
    student: Tensor,
    frame_mask: Tensor | None,
    matrices: Tensor,
    batch_matrix: Tensor,
    layout: str,
    batch_weight: float,
    frame_weight: float,
) -> None:
    """Write the gradient of the student's latents into ``out``, from the student's values and both kinds of M."""
    aligned = out.data_ptr() % 16 == 0, student.data_ptr() % 16 == 0
    has_frames = matrices.numel() > 0 and not (grad_total is None and grad_frame is None)
    key = (
        "apply", out.shape, out.stride(), student.stride(), aligned, out.dtype, out.device, layout, has_frames,
        mask_key(frame_mask), *(g is None or g.dtype for g in (grad_total, grad_batch, grad_frame)),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        geometries = tuple(Geometry.of(out.shape, s, layout) for s in (out.stride(), student.stride()))
        runs = Runs(geometries, (out.element_size(),) * 2, all(aligned))
        plan = _plans[key] = BackwardPlan(*geometries[0].sizes[:2], runs, multiprocessors(out.device))
    plan.launch(
        current_stream(out), out, student, frame_mask, grad_total, grad_batch, grad_frame,
        matrices if has_frames else None, batch_matrix, *plan.sizes, *mask_strides(frame_mask), float(batch_weight),
        float(frame_weight),
    )  # fmt: skip
