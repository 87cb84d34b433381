"""What sizes, strides and options decide about the DMD loss and about gradients: tilings, workspaces, launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from codmd.conventions import Convention
from codmd.ops.contract import Grid, Objective
from codmd.ops.shapes import norm_shape

from .. import limits
from ..launch import Launcher, multiprocessors
from ..plans import Workspace, padded, pair_of_strides
from ..pooled.plans import FEATURES, RowsPlan, in_parallel, one_tile
from ..tiling import Geometry, Tiling, cdiv, next_power_of_2, pieces_of_a_program, tile_planes
from .algebra import MOMENTS
from .decoupled import TOTALS, decoupled_kernel
from .gradient import gradient_kernel
from .moments import COUNT_BITS, moments_kernel

TILE_BYTES = 2048
"""Bytes of one tensor in a tile of 4 warps, or 2 wavefronts: one 16-byte vector a thread, of up to six tensors."""

WHOLE = 1 << 20
"""Frames of a segment where the norm's scope is a sample or the batch."""

TILES = 2
"""Of a piece of the forward pass: one sum of features between warps for both."""

SUMS_TILE = 128
"""Samples times segments whose sums the last block takes at once."""

NONE = (1, 1, 1, 1, 1)
"""Strides of an absent tensor: to Triton a 1 is a constant, which a launch need not pass."""

TERMS = 5
"""Total, dmd, batch, frame, mean|g|."""

LATENTS = 6
"""The first fields of an objective: student, predictions and noisy latents."""

MOST_COUNTED = (1 << int(COUNT_BITS.value)) - 1
"""Elements of each kind that a lane can count."""


def _cut(
    latents: tuple[Any, ...],
    mask: Tensor | None,
    layout: str,
    grid: Grid,
    tile_bytes: int | None,
    tiles: int | None = None,
) -> tuple[Tiling, tuple[int, ...], tuple[int, int, int, int, int]]:
    """The tiling, every tensor's five strides (1 where absent; the mask's last and unscaled), the canonical sizes."""
    present = tuple(t for t in latents if t is not None)
    geometries = tuple(Geometry.of(t.shape, t.stride(), layout) for t in present)
    companions = () if mask is None else (Geometry.of(mask.shape, mask.stride(), layout),)
    aligned = all(t.data_ptr() % 16 == 0 for t in present)
    processors = multiprocessors(present[0].device)
    itemsize = present[0].element_size()
    tile = tile_planes(geometries, grid, itemsize, aligned, processors, tile_bytes, companions, tiles)
    sizes = geometries[0].sizes
    width = sizes[4]

    def strides(scaled: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
        # Elements of a flat plane one column wide lie a line apart.
        return (*scaled[:3], 0, geometry.strides[3]) if tile.flat and width == 1 else scaled

    scaled = iter(strides(s, g) for s, g in zip(tile.strides, geometries, strict=True))
    found = sum((NONE if t is None else next(scaled) for t in latents), ())
    return tile, found + (strides(companions[0].strides, companions[0]) if companions else NONE), sizes


def _tiles(tile: Tiling, lines: int, width: int) -> int:
    """Tiles of a piece."""
    splits = tile.splits // tile.column_tiles
    return cdiv(cdiv(lines * width, splits), tile.tile_w) if tile.flat else cdiv(cdiv(lines, splits), tile.tile_h)


def _countable(tile: Tiling, lines: int, width: int) -> Tiling:
    """More splits of planes so large that a lane would meet more elements than it can count."""
    whole = _tiles(replace(tile, splits=tile.column_tiles), lines, width)
    splits = max(tile.splits // tile.column_tiles, cdiv(whole, MOST_COUNTED))
    return replace(tile, splits=splits * tile.column_tiles)


def _scope(convention: Convention) -> tuple[Any, ...]:
    """SCOPE, BLOCK, FIRST_ALONE."""
    block = convention.norm_block if convention.norm_scope == "block" else WHOLE
    return convention.norm_scope, block, convention.independent_first_frame


def _norms_of_a_level(rule: Convention, samples: int, segments: int) -> int:
    return 1 if rule.norm_scope == "batch" else samples * segments


def _size(shape: int | tuple[int, ...]) -> torch.Size:
    return torch.Size([shape] if isinstance(shape, int) else shape)


class MomentsPlan:
    """Workspace and launches of a forward pass; ``gather``: the batch relation waits for other processes' rows.

    ``pieces`` are the floats of the results and of the workspace within one allocation of ``room``, each 16-byte
    aligned: norms, factors, frame gradient, batch gradient, workspace, terms.
    """

    def __init__(self, call: Objective, gather: bool) -> None:
        sigma, sample_weight, frame_mask, rule = call.sigma, call.sample_weight, call.frame_mask, call.convention
        pool = call.pool if call.related else (1, 1)
        tile, strides, (samples, frames, channels, height, width) = _cut(
            (*call[:LATENTS], call.augment_real), call.mask, call.layout, pool, 2 * TILE_BYTES, TILES
        )
        tile = _countable(tile, cdiv(height, pool[0]), width)
        segments = len(rule.segments(frames)) - 1
        features, has_frames, has_batch = 0, False, False
        if call.related:
            limits.check((samples, frames, channels, height, width), pool, call.batch, call.frame)
            features = channels * pool[0] * pool[1]
            has_frames = call.frame and frames > 1
            has_batch = call.batch and samples > 1 and not gather
        parallel = in_parallel(frames * has_frames, samples * has_batch)
        self.rows: RowsPlan | None = None
        if parallel:
            self.rows = RowsPlan(samples if has_frames else 0, frames, samples if has_batch else 0, features, True)
        row = 3 * features + 1
        pieces_of_frame = channels * pool[0] * tile.splits
        most = MOST_COUNTED // _tiles(tile, cdiv(height, pool[0]), width)
        per = pieces_of_a_program(samples * frames, pieces_of_frame, multiprocessors(call.student.device), most)
        programs = cdiv(pieces_of_frame, per)
        moments, sums = int(MOMENTS.value) * samples * frames * programs, int(MOMENTS.value) * samples * segments
        workspace = Workspace(
            tables=samples * row * frames, losses=samples, averages=samples * row * has_batch,
            pieces=samples * tile.splits * row * frames if tile.splits > 1 else 0,
            shares=self.rows.room if self.rows else 0,
            moments=moments, sums=2 * sums,
        )  # fmt: skip
        self.workspace = workspace
        self.rows_at = workspace.at("averages", "shares")
        self.samples, self.sums_shape = samples, (samples, int(MOMENTS.value), segments)
        self.norm_shape = norm_shape(call)
        self.value = None if call.augment_real is None else ValuePlan(call, workspace.at("sums"))
        self.frame_grad_shape = (samples, frames, features) if has_frames else 0
        self.batch_grad_shape = (samples, features) if has_batch else 0
        self.rows_shape = samples, row
        found = self.norm_shape, samples, self.frame_grad_shape, self.batch_grad_shape, workspace.size
        self.pieces = [*(padded(_size(shape).numel()) for shape in found), TERMS]
        self.room = sum(self.pieces)
        self.counters = samples + 1
        huber = rule.penalty == "huber"
        here = not parallel
        self.launch = Launcher(
            moments_kernel,
            samples * frames * programs,
            (
                *pool, *tile.constants, *_scope(rule), rule.guard, rule.nan, huber, rule.reduction == "sum",
                rule.norm_divides == "loss", rule.weight_on == "direction", call.related, has_frames and here,
                has_batch and here, has_batch or gather, parallel,
                one_tile(frames) if has_frames and here else next_power_of_2(frames), one_tile(samples), FEATURES,
                next_power_of_2(segments),
                max(1, min(next_power_of_2(samples), SUMS_TILE // next_power_of_2(segments))),
            ),
            warps=8,
            wavefronts=4,
            registers=128,
            fixed=(
                *workspace.at("losses", "averages", "pieces", "moments", "sums"),
                per, samples, frames, channels, features, segments, height, width, *strides, *pair_of_strides(sigma),
                1 if sample_weight is None else sample_weight.stride(0), *pair_of_strides(frame_mask),
                float(rule.huber_c if huber else 0.0), float(rule.eps), float(rule.coefficient),
            ),
        )  # fmt: skip


class ValuePlan:
    """Workspace and launch of :func:`decoupled_kernel`, the second read of a decoupled loss."""

    def __init__(self, call: Objective, sums_at: tuple[int, ...]) -> None:
        latents, rule = (
            (call.real, call.fake, call.fake_uncond, call.augment_real, call.augment_uncond),
            call.convention,
        )
        tile, strides, (samples, frames, channels, height, width) = _cut(
            latents, call.mask, call.layout, (1, 1), TILE_BYTES
        )
        segments, programs = len(rule.segments(frames)) - 1, channels * tile.splits
        totals = int(TOTALS.value) * samples
        workspace = Workspace(totals=2 * totals, pieces=totals * frames * programs)
        self.room = workspace.size
        columns = next_power_of_2(segments)
        self.launch = Launcher(
            decoupled_kernel,
            samples * frames * programs,
            (
                *tile.constants, *_scope(rule), rule.nan, rule.reduction == "sum", rule.weight_on == "direction",
                WHOLE, columns, max(1, min(next_power_of_2(samples), SUMS_TILE // columns)),
            ),
            warps=4,
            wavefronts=2,
            fixed=(
                *sums_at, *workspace.at("pieces"), samples, frames, channels, segments, height, width, *strides,
                1 if call.sample_weight is None else call.sample_weight.stride(0),
                _norms_of_a_level(rule, samples, segments), float(rule.coefficient),
            ),
        )  # fmt: skip


class GradientPlan:
    """Launch of :func:`gradient_kernel`: of the pooled relation alone where ``rule`` is None."""

    def __init__(
        self,
        latents: tuple[Tensor | None, ...],
        sigma: Tensor | None,
        mask: Tensor | None,
        frame_mask: Tensor | None,
        layout: str,
        pool: Grid,
        rule: Convention | None,
    ) -> None:
        tile, strides, (samples, frames, channels, height, width) = _cut(
            latents, mask, layout, pool, TILE_BYTES if rule else None
        )
        features = channels * pool[0] * pool[1]
        huber, segments, norm, repair, level = False, 1, ("batch", 1, False), False, 1
        if rule is not None:
            huber, segments, norm = rule.penalty == "huber", len(rule.segments(frames)) - 1, _scope(rule)
            repair = rule.nan == "to_num"
            if latents[-1] is not None:
                level = _norms_of_a_level(rule, samples, segments)
        self.launch = Launcher(
            gradient_kernel,
            samples * frames * channels * pool[0] * tile.splits,
            (*pool, *tile.constants, *norm, huber, repair, rule is not None, next_power_of_2(frames)),
            warps=4,
            wavefronts=2 if rule else None,
            fixed=(
                frames, channels, features, segments, height, width, *strides, *pair_of_strides(sigma),
                *pair_of_strides(frame_mask), level, float(rule.huber_c if rule and huber else 0.0),
            ),
        )  # fmt: skip
