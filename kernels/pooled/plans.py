"""What sizes, strides and options decide about the relation of pooled features: tilings, offsets, launches."""

from __future__ import annotations

from torch import Tensor

from .. import limits
from ..launch import TRITON, Launcher, mask_strides, multiprocessors
from ..limits import grid_of
from ..tiling import Geometry, cdiv, next_power_of_2, tile_planes
from .broadcast import broadcast_kernel
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


class RowsPlan:
    """Launch of :func:`relation_rows_kernel` for ``samples`` frame relations and one batch relation.

    Args:
        samples: frame relations, 0 for none.
        frames: vectors of each.
        batch: vectors of the batch relation, 0 for none.
        features: K.
        dmd: the terms are those of the CoDMD loss.
    """

    def __init__(self, samples: int, frames: int, batch: int, features: int, dmd: bool = False) -> None:
        block_i, block_j, _ = row_blocks(max(frames if samples else 0, batch))
        frame_blocks, batch_blocks = cdiv(frames, block_i), cdiv(batch, block_i) if batch else 0
        frame_room = frame_blocks + frames * ((features + 1) * (frame_blocks + 1) + 2 * frames)
        batch_room = batch_blocks + batch * ((features + 1) * (batch_blocks + 1) + 2 * batch)
        self.room = samples * frame_room + batch_room + samples + 1
        self.sizes = samples, frames, features, frame_blocks, batch_blocks, batch
        self.counters = samples + 2
        self.launch = Launcher(
            relation_rows_kernel,
            samples * frame_blocks + batch_blocks,
            (samples > 0, batch > 0, dmd, block_i, block_j, 16),
            warps=max(4, min(8, block_i * block_j // 128)),
            registers=255,
        )


class ForwardPlan:
    """Sizes, offsets and launches of a forward call; ``gather`` leaves the batch term to :func:`relation_batch`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[tuple[int, ...], ...],
        layout: str,
        pool: str | tuple[int, int],
        itemsize: int,
        aligned: bool,
        processors: int,
        batch: bool,
        frame: bool,
        gather: bool,
        frame_mask: Tensor | None,
    ) -> None:
        grid = grid_of(pool)
        geometries = tuple(Geometry.of(shape, s, layout) for s in strides)
        limits.check(geometries[0].sizes, pool, batch, frame)
        samples, frames, channels, height, width = geometries[0].sizes
        features = channels * grid[0] * grid[1]
        self.has_frames = frame and frames > 1
        self.has_batch = batch and samples > 1 and not gather
        parallel = (self.has_frames and frames > ONE_TILE) or (self.has_batch and samples > ONE_TILE)
        tiling = tile_planes(geometries, grid, itemsize, aligned, processors)
        self.tiling = tiling
        row = 3 * features + 1
        tables, pieces = samples * row * frames, samples * tiling.splits * 3 * features * frames
        self.gather = gather
        self.pooled_at = tables + samples
        scratch_at = self.pooled_at + (0 if gather else samples * row)
        self.shares_at = matrices_at = scratch_at + (pieces if tiling.splits > 1 else 0)
        self.frame_grad_shape = (samples, frames, features) if self.has_frames else 0
        self.batch_grad_shape = (samples, features) if self.has_batch else 0
        self.pooled_shape = (samples, row)
        sizes = samples, frames, channels, features, height, width
        self.rows: RowsPlan | None = None
        if parallel:
            self.rows = RowsPlan(samples if self.has_frames else 0, frames, samples if self.has_batch else 0, features)
        matrices = max(
            samples * frames * (2 * frames + 2) * self.has_frames, samples * (2 * samples + 2) * self.has_batch
        )
        self.workspace = self.shares_at + (self.rows.room if self.rows else matrices)
        self.counters = samples + 2
        self.pool = Launcher(
            pool_kernel,
            samples * frames * channels * grid[0] * tiling.splits,
            (
                *grid,
                *tiling.constants,
                # The registers of both terms leave no room for tiles of 16 rows.
                8 if self.has_frames and self.has_batch else ROWS_OF_A_TILE,
                next_power_of_2(frames) if parallel or not self.has_frames else block_of(frames),
                block_of(min(samples, ONE_TILE)),
                16,
                self.has_frames and not parallel,
                self.has_batch and not parallel,
                not parallel,
            ),
            warps=4,
            registers=REGISTERS_BOTH_TERMS if self.has_frames and self.has_batch else REGISTERS,
            fixed=(scratch_at, matrices_at, *sizes, *sum(tiling.strides, ()), *mask_strides(frame_mask)),
        )


def backward_launch(
    out: Tensor, layout: str, pool: str | tuple[int, int], batch: bool, frame: bool, frame_mask: Tensor | None
) -> Launcher:
    grid = grid_of(pool)
    geometry = Geometry.of(out.shape, out.stride(), layout)
    limits.check(geometry.sizes, pool, batch, frame)
    samples, frames, channels, height, width = geometry.sizes
    aligned = out.data_ptr() % 16 == 0
    tiling = tile_planes((geometry,), grid, out.element_size(), aligned, multiprocessors(out.device))
    sizes = frames, channels, channels * grid[0] * grid[1], height, width
    return Launcher(
        broadcast_kernel,
        samples * frames * channels * grid[0] * tiling.splits,
        (*grid, *tiling.constants, next_power_of_2(frames)),
        warps=4,
        fixed=(*sizes, *tiling.strides[0], *mask_strides(frame_mask)),
    )
