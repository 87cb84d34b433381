"""What sizes, strides and options decide about the DMD and CoDMD passes: tilings, offsets, launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import limits
from ..launch import Launcher, multiprocessors
from ..limits import grid_of
from ..pooled.plans import ONE_TILE, ROWS_OF_A_TILE, RowsPlan, block_of
from ..tiling import Geometry, Tiling, cdiv, next_power_of_2, tile_planes
from .algebra import MOMENTS
from .gradient import gradient_kernel
from .moments import COUNT_BITS, moments_kernel

TILE_BYTES = 2048
"""Bytes of one tensor in a tile of 4 warps, or 2 wavefronts: one 16-byte vector a thread, of up to six tensors."""

WHOLE = 1 << 20
"""Frames of a segment where the norm's scope is a sample or the batch."""

SUMS_TILE = 128
"""Samples times segments whose sums the last block takes at once."""

NONE = (0, 0, 0, 0, 0)

MOST_COUNTED = (1 << int(COUNT_BITS.value)) - 1
"""Elements of each kind that a lane can count."""


def _cut(
    latents: tuple[Tensor | None, ...], mask: Tensor | None, layout: str, grid: tuple[int, int]
) -> tuple[Tiling, tuple[int, ...], tuple[int, int, int, int, int]]:
    """The tiling, every tensor's five strides (0 where absent; the mask's last and unscaled), the canonical sizes."""
    present = tuple(t for t in latents if t is not None)
    geometries = tuple(Geometry.of(t.shape, t.stride(), layout) for t in present)
    companions = () if mask is None else (Geometry.of(mask.shape, mask.stride(), layout),)
    aligned = all(t.data_ptr() % 16 == 0 for t in present)
    processors = multiprocessors(present[0].device)
    tile = tile_planes(geometries, grid, present[0].element_size(), aligned, processors, TILE_BYTES, companions)
    sizes = geometries[0].sizes
    width = sizes[4]

    def strides(scaled: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
        # Elements of a flat plane one column wide lie a line apart.
        return (*scaled[:3], 0, geometry.strides[3]) if tile.flat and width == 1 else scaled

    scaled = iter(strides(s, g) for s, g in zip(tile.strides, geometries, strict=True))
    found = sum((NONE if t is None else next(scaled) for t in latents), ())
    return tile, found + (strides(companions[0].strides, companions[0]) if companions else NONE), sizes


def _countable(tile: Tiling, lines: int, width: int) -> Tiling:
    """More splits of planes so large that a lane would meet more elements than it can count."""
    tiles = cdiv(lines * width, tile.tile_w) if tile.flat else cdiv(lines, tile.tile_h)
    splits = max(tile.splits // tile.column_tiles, cdiv(tiles, MOST_COUNTED))
    return replace(tile, splits=splits * tile.column_tiles)


def _pair(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _scope(convention: Any) -> tuple[Any, ...]:
    """SCOPE, BLOCK, FIRST_ALONE."""
    block = convention.norm_block if convention.norm_scope == "block" else WHOLE
    return convention.norm_scope, block, convention.independent_first_frame


def _size(shape: int | tuple[int, ...]) -> torch.Size:
    return torch.Size([shape] if isinstance(shape, int) else shape)


class Relation(NamedTuple):
    """What of the relation a forward pass computes; ``gather``: the batch relation waits for other processes' rows."""

    pool: str | tuple[int, int]
    batch: bool
    frame: bool
    gather: bool


class MomentsPlan:
    """Sizes, offsets and launches of a forward pass; ``relation`` is None for the DMD loss alone.

    ``pieces`` are the floats of a CoDMD pass's results and of its workspace within one allocation of ``room``, each
    16-byte aligned: terms, norms, factors, frame gradient, batch gradient, workspace.
    """

    def __init__(
        self,
        latents: tuple[Tensor | None, ...],
        others: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        layout: str,
        convention: Any,
        relation: Relation | None,
    ) -> None:
        sigma, mask, sample_weight, frame_mask = others
        grid = (1, 1) if relation is None else grid_of(relation.pool)
        tile, strides, (samples, frames, channels, height, width) = _cut(latents, mask, layout, grid)
        tile = _countable(tile, cdiv(height, grid[0]), width)
        segments = len(convention.segments(frames)) - 1
        features, has_frames, has_batch = 0, False, False
        if relation is not None:
            limits.check((samples, frames, channels, height, width), relation.pool, relation.batch, relation.frame)
            features = channels * grid[0] * grid[1]
            has_frames = relation.frame and frames > 1
            has_batch = relation.batch and samples > 1 and not relation.gather
        parallel = (has_frames and frames > ONE_TILE) or (has_batch and samples > ONE_TILE)
        row = 3 * features + 1
        programs = channels * grid[0] * tile.splits
        self.pooled_at = samples * (row * frames + 1)
        scratch_at = self.pooled_at + (0 if relation is not None and relation.gather else samples * row)
        self.shares_at = scratch_at + (samples * tile.splits * 3 * features * frames if tile.splits > 1 else 0)
        self.rows: RowsPlan | None = None
        room = max(samples * frames * (2 * frames + 2) * has_frames, samples * (2 * samples + 2) * has_batch)
        if parallel:
            self.rows = RowsPlan(samples if has_frames else 0, frames, samples if has_batch else 0, features, True)
            room = self.rows.room
        moments_at = self.shares_at + room
        sums_at = moments_at + int(MOMENTS.value) * samples * frames * programs
        sums_at += sums_at % 2
        self.workspace = sums_at + 2 * int(MOMENTS.value) * samples * segments
        self.sums = sums_at, (samples, int(MOMENTS.value), segments)
        self.samples = samples
        self.norm_shape = {"sample": samples, "batch": 1, "block": (samples, segments)}[convention.norm_scope]
        self.frame_grad_shape = (samples, frames, features) if has_frames else 0
        self.batch_grad_shape = (samples, features) if has_batch else 0
        self.pooled_shape = samples, row
        found = torch.Size([4]), *map(_size, (self.norm_shape, samples, self.frame_grad_shape, self.batch_grad_shape))
        self.pieces = [size.numel() + -size.numel() % 4 for size in found] + [self.workspace]
        self.room = sum(self.pieces)
        self.counters = samples + 2
        sizes = (
            scratch_at, self.shares_at, moments_at, sums_at,
            samples, frames, channels, features, segments, height, width, *strides, *_pair(sigma),
            0 if sample_weight is None else sample_weight.stride(0), *_pair(frame_mask),
        )  # fmt: skip
        huber = convention.penalty == "huber"
        scalars = float(convention.huber_c if huber else 0.0), float(convention.eps), float(convention.coefficient)
        here = not parallel
        self.launch = Launcher(
            moments_kernel,
            samples * frames * programs,
            (
                *grid, *tile.constants, *_scope(convention), convention.guard, convention.nan, huber,
                convention.reduction == "sum", convention.norm_divides == "loss",
                convention.weight_on == "direction", relation is not None, has_frames and here, has_batch and here,
                ROWS_OF_A_TILE, block_of(frames) if has_frames and here else next_power_of_2(frames),
                block_of(min(samples, ONE_TILE)), 16,
                next_power_of_2(segments),
                max(1, min(next_power_of_2(samples), SUMS_TILE // next_power_of_2(segments))),
            ),
            warps=4,
            wavefronts=2,
            registers=168,
            fixed=sizes + scalars,
        )  # fmt: skip


class GradientPlan:
    """Launch of a backward pass."""

    def __init__(
        self,
        latents: tuple[Tensor | None, ...],
        others: tuple[Tensor | None, Tensor | None, Tensor | None],
        layout: str,
        convention: Any,
        pool: str | tuple[int, int] | None,
        dmd: bool,
    ) -> None:
        sigma, mask, frame_mask = others
        grid = (1, 1) if pool is None else grid_of(pool)
        tile, strides, (samples, frames, channels, height, width) = _cut(latents, mask, layout, grid)
        features = channels * grid[0] * grid[1]
        segments = len(convention.segments(frames)) - 1
        huber = convention.penalty == "huber"
        fixed = (
            frames, channels, features, segments, height, width, *strides, *_pair(sigma), *_pair(frame_mask),
            float(convention.huber_c if huber else 0.0),
        )  # fmt: skip
        self.launch = Launcher(
            gradient_kernel,
            samples * frames * channels * grid[0] * tile.splits,
            (
                *grid, *tile.constants, *_scope(convention), huber, convention.nan == "to_num", dmd,
                next_power_of_2(frames),
            ),
            warps=4,
            wavefronts=2,
            fixed=fixed,
        )  # fmt: skip
