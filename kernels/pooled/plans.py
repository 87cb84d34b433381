"""What sizes, strides and options decide about the relation of pooled features: tilings, workspaces, launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from codmd.ops.contract import Grid

from .. import limits
from ..launch import Launcher
from ..plans import Workspace, pair_of_strides
from ..tiling import Geometry, cdiv, next_power_of_2, pieces_of_a_program, tile_planes
from .pool import pool_kernel
from .rows import relation_rows_kernel, rows_gradient_kernel

ONE_TILE = 32
"""Vectors of a relation that the last block computes alone; above, row blocks run in parallel."""

FEATURES = 16
"""Features of a step of the products."""

COLUMNS = 256
"""Of H that a row of the gradient takes at once, where rows run in parallel."""

TILE_BYTES = 8192
"""Bytes of one tensor in a tile of 8 warps, or 4 wavefronts: two 16-byte vectors a thread."""

REGISTERS = 128
"""Two blocks of eight warps on a multiprocessor: 24 KB of loads in flight and as much before each sum."""


def one_tile(vectors: int) -> int:
    """Edge of the tile that holds the relation of up to ``ONE_TILE`` vectors: a power of two that a dot accepts."""
    return max(16, next_power_of_2(min(vectors, ONE_TILE)))


def in_parallel(frames: int, samples: int) -> bool:
    """Whether the relations of so many vectors (0: none is computed) take launches of their own, :mod:`.rows`."""
    return max(frames, samples) > ONE_TILE


class RowsPlan:
    """Launches of :mod:`.rows` for ``samples`` frame relations and one batch relation; ``room`` is their workspace.

    Args:
        samples: frame relations, 0 for none.
        frames: vectors of each.
        batch: vectors of the batch relation, 0 for none.
        features: K.
        dmd: the terms are those of an objective.
    """

    def __init__(self, samples: int, frames: int, batch: int, features: int, dmd: bool = False) -> None:
        every = max(16, next_power_of_2(max(frames if samples else 0, batch)))
        # Up to 16 numbers of S, and as many of Δ, a lane.
        rows, warps, wavefronts = (2, 4, 2) if every <= 256 else (4, 8, 8)
        frame_blocks, batch_blocks = cdiv(frames, rows), cdiv(batch, rows)
        programs = samples * frame_blocks + batch_blocks

        def room(count: int) -> int:
            return count + 2 * count * count

        shares = Workspace(losses=programs, rooms=samples * room(frames) + room(batch))
        self.room = shares.size
        self.relations = samples, frames
        self.batch = batch
        shared, room_of_frames = (samples, frames, features, frame_blocks), room(frames)
        self._rows = Launcher(
            relation_rows_kernel,
            programs,
            (rows, every),
            warps=warps,
            wavefronts=wavefronts,
            fixed=(*shared, batch, *shares.at("rooms"), room_of_frames),
        )
        self._gradient = Launcher(
            rows_gradient_kernel,
            (samples * frames + batch) * cdiv(features, FEATURES) + 1,
            (samples > 0, batch > 0, dmd, every, min(every, COLUMNS), FEATURES),
            warps=4,
            wavefronts=2,
            fixed=(*shared, batch, batch_blocks, *shares.at("rooms"), room_of_frames),
        )

    def launch(
        self,
        stream: int,
        source: Tensor,
        gathered: Tensor | None,
        frame_term: Tensor | None,
        terms: Tensor,
        frame_grad: Tensor,
        batch_grad: Tensor,
        workspace: Tensor,
        scalars: tuple[Any, ...],
        grad_scale: float,
        at: tuple[int, ...],
        first_row: int,
        rows: int,
    ) -> None:
        """Rows of G, then ``rows`` rows from ``first_row`` on of the batch gradient, all of the frames', and terms.

        ``at`` is where averages and shares are, in the source and in the workspace.
        """
        self._rows(stream, source, gathered, workspace, *scalars[:2], *at)
        self._gradient(
            stream, source, gathered, frame_term, terms, frame_grad, batch_grad, workspace, *scalars, grad_scale,
            *at, first_row, rows,
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
        self.tiling = tiling = tile_planes(geometries, pool, itemsize, aligned, processors, TILE_BYTES, tiles=1)
        pieces_of_frame = channels * pool[0] * tiling.splits
        per = pieces_of_a_program(samples * frames, pieces_of_frame, processors, pieces_of_frame)
        self.rows: RowsPlan | None = None
        if parallel:
            self.rows = RowsPlan(samples if has_frames else 0, frames, samples if has_batch else 0, features)
        row = 3 * features + 1
        pieces = samples * tiling.splits * row * frames if tiling.splits > 1 else 0
        workspace = Workspace(
            tables=samples * row * frames, losses=samples, averages=samples * row * has_batch, pieces=pieces,
            shares=self.rows.room if self.rows else 0,
        )  # fmt: skip
        self.workspace = workspace.size
        self.rows_at = workspace.at("averages", "shares")
        self.frame_grad_shape = (samples, frames, features) if has_frames else 0
        self.batch_grad_shape = (samples, features) if has_batch else 0
        self.rows_shape = samples, row
        self.counters = samples + 1
        self.launch = Launcher(
            pool_kernel,
            samples * frames * cdiv(pieces_of_frame, per),
            (
                *pool,
                *tiling.constants,
                next_power_of_2(frames) if parallel or not has_frames else one_tile(frames),
                one_tile(samples),
                FEATURES,
                has_frames and not parallel,
                has_batch and not parallel,
                has_batch or gather,
                parallel,
            ),
            warps=8,
            wavefronts=4,
            registers=REGISTERS,
            fixed=(
                *workspace.at("losses", "averages", "pieces"), per, samples, frames, channels, features, height,
                width, *sum(tiling.strides, ()), *pair_of_strides(frame_mask),
            ),
        )  # fmt: skip
