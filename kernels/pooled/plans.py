"""What sizes, strides and options decide about the relation of pooled features: tilings, workspaces, launches."""

from __future__ import annotations

from torch import Tensor

from codmd.ops.contract import Grid

from .. import limits
from ..launch import TRITON, Launcher
from ..plans import Workspace, pair_of_strides
from ..tiling import Geometry, cdiv, next_power_of_2, tile_planes
from .pool import pool_kernel
from .rows import relation_rows_kernel

ONE_TILE = 32
"""Vectors of a relation that the last block computes alone; above, row blocks run in parallel."""

ROWS_OF_A_TILE = 16 if TRITON >= (3, 8) else 8
"""Rows of a tile of the relation that a pass over the latents ends with; older releases of Triton spill with 16."""

REGISTERS, REGISTERS_BOTH_TERMS = 128, 168
"""Four (three) blocks of four warps on a multiprocessor: 48 (36) KB of loads in flight, more than the memory needs."""

FLOATS_PER_ROW_TILE = 2048


def block_of(vectors: int) -> int:
    """Tile edge for ``vectors``: a power of two that a dot accepts."""
    return max(16, next_power_of_2(vectors))


def row_blocks(vectors: int) -> tuple[int, int, int]:
    """(BLOCK_I, BLOCK_J, row blocks) of a relation of ``vectors`` in :func:`relation_rows_kernel`."""
    block_j = block_of(vectors)
    block_i = max(1, min(16, FLOATS_PER_ROW_TILE // block_j))
    return block_i, block_j, cdiv(vectors, block_i)


def in_parallel(frames: int, samples: int) -> bool:
    """Whether the relations of so many vectors (0: none is computed) take row blocks of a launch of their own."""
    return max(frames, samples) > ONE_TILE


def matrices(samples: int, has_frames: bool, frames: int, has_batch: bool) -> int:
    """Floats of scratch of the relations that the last blocks of a pass compute alone, one kind after the other."""
    return max(samples * (2 * frames + 2) * frames * has_frames, (2 * samples + 2) * samples * has_batch)


class RowsPlan:
    """Launch of :func:`relation_rows_kernel` for ``samples`` frame relations and one batch relation.

    Args:
        samples: frame relations, 0 for none.
        frames: vectors of each.
        batch: vectors of the batch relation, 0 for none.
        features: K.
        dmd: the terms are those of an objective.
    """

    def __init__(self, samples: int, frames: int, batch: int, features: int, dmd: bool = False) -> None:
        block_i, block_j, _ = row_blocks(max(frames if samples else 0, batch))
        frame_blocks, batch_blocks = cdiv(frames, block_i), cdiv(batch, block_i) if batch else 0

        def room(count: int, blocks: int) -> Workspace:
            share, square = count * features, count * count
            return Workspace(
                losses=blocks, direct=share, transposed=blocks * share, row_radial=count,
                column_radial=blocks * count, by_column=square, by_row=square,
            )  # fmt: skip

        of_frame, of_batch = room(frames, frame_blocks), room(batch, batch_blocks)
        every = Workspace(frames=samples * of_frame.size, batch=of_batch.size, totals=samples + 1)
        names = "direct", "transposed", "row_radial", "column_radial", "by_column", "by_row"
        self.room = every.size
        self.relations = samples, frames
        self.batch = batch
        self.counters = samples + 2
        self.launch = Launcher(
            relation_rows_kernel,
            samples * frame_blocks + batch_blocks,
            (samples > 0, batch > 0, dmd, block_i, block_j, 16),
            warps=max(4, min(8, block_i * block_j // 128)),
            registers=255,
            fixed=(
                samples, frames, features, frame_blocks, batch_blocks, batch, *every.at("batch", "totals"),
                of_frame.size, *of_frame.at(*names), *of_batch.at(*names),
            ),
        )  # fmt: skip


class ForwardPlan:
    """Workspace and launches of a forward call; ``gather`` leaves the batch term to :func:`.passes.gathered`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[tuple[int, ...], ...],
        layout: str,
        pool: Grid,
        itemsize: int,
        aligned: bool,
        processors: int,
        batch: bool,
        frame: bool,
        gather: bool,
        frame_mask: Tensor | None,
    ) -> None:
        geometries = tuple(Geometry.of(shape, s, layout) for s in strides)
        limits.check(geometries[0].sizes, pool, batch, frame)
        samples, frames, channels, height, width = geometries[0].sizes
        features = channels * pool[0] * pool[1]
        has_frames, has_batch = frame and frames > 1, batch and samples > 1 and not gather
        parallel = in_parallel(frames * has_frames, samples * has_batch)
        self.tiling = tiling = tile_planes(geometries, pool, itemsize, aligned, processors)
        self.rows: RowsPlan | None = None
        if parallel:
            self.rows = RowsPlan(samples if has_frames else 0, frames, samples if has_batch else 0, features)
        row = 3 * features + 1
        pieces = samples * tiling.splits * 3 * features * frames if tiling.splits > 1 else 0
        room = self.rows.room if self.rows else matrices(samples, has_frames, frames, has_batch)
        workspace = Workspace(
            tables=samples * row * frames, losses=samples, averages=0 if gather else samples * row, pieces=pieces,
            matrices=room,
        )  # fmt: skip
        self.workspace = workspace.size
        self.rows_at = workspace.at("averages", "matrices")
        self.frame_grad_shape = (samples, frames, features) if has_frames else 0
        self.batch_grad_shape = (samples, features) if has_batch else 0
        self.rows_shape = samples, row
        self.counters = samples + 2
        self.launch = Launcher(
            pool_kernel,
            samples * frames * channels * pool[0] * tiling.splits,
            (
                *pool,
                *tiling.constants,
                # The registers of both terms leave no room for tiles of 16 rows.
                8 if has_frames and has_batch else ROWS_OF_A_TILE,
                next_power_of_2(frames) if parallel or not has_frames else block_of(frames),
                block_of(min(samples, ONE_TILE)),
                16,
                has_frames and not parallel,
                has_batch and not parallel,
                not parallel,
            ),
            warps=4,
            registers=REGISTERS_BOTH_TERMS if has_frames and has_batch else REGISTERS,
            fixed=(
                *workspace.at("losses", "averages", "pieces", "matrices"), samples, frames, channels, features, height,
                width, *sum(tiling.strides, ()), *pair_of_strides(frame_mask),
            ),
        )  # fmt: skip
