"""The fused DMD and CoDMD losses behind the operator boundary: plans, allocations and launches.

Forward: one launch (a second for more than 32 frames of CoDMD; the batch relation is :func:`relation_batch`).
Backward: one launch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .dmd_algebra import MOMENTS
from .dmd_gradient import gradient_kernel
from .dmd_moments import COUNT_BITS, moments_kernel
from .launch import Launcher, counters, current_stream, multiprocessors
from .relation_pooled import ONE_TILE, RowsPlan, block_of, grid_of
from .tiling import Geometry, Tiling, cdiv, next_power_of_2, tile_planes

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


def _key(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    return tuple(None if t is None else (t.stride(), t.data_ptr() % 16 == 0, t.dtype) for t in tensors)


def _pair(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _scope(convention: Any) -> tuple[Any, ...]:
    """SCOPE, BLOCK, FIRST_ALONE."""
    block = convention.norm_block if convention.norm_scope == "block" else WHOLE
    return convention.norm_scope, block, convention.independent_first_frame


class MomentsPlan:
    """Sizes, offsets and launches of a forward pass; ``pool`` is None for the DMD loss alone."""

    def __init__(
        self,
        latents: tuple[Tensor | None, ...],
        mask: Tensor | None,
        layout: str,
        convention: Any,
        pool: str | tuple[int, int] | None,
        frame_weight: float,
        gather: bool,
    ) -> None:
        grid = (1, 1) if pool is None else grid_of(pool)
        tile, strides, (samples, frames, channels, height, width) = _cut(latents, mask, layout, grid)
        tile = _countable(tile, cdiv(height, grid[0]), width)
        relation = pool is not None
        features = channels * grid[0] * grid[1] if relation else 0
        segments = len(convention.segments(frames)) - 1
        self.has_frames = relation and frame_weight != 0 and frames > 1
        parallel = self.has_frames and frames > ONE_TILE
        row = 3 * features + 1
        programs = channels * grid[0] * tile.splits
        scratch_at = samples * (row * frames + 1) + (0 if gather else samples * row)
        matrices_at = scratch_at + (samples * tile.splits * 3 * features * frames if tile.splits > 1 else 0)
        self.rows: RowsPlan | None = None
        if parallel:
            self.rows = RowsPlan(samples, frames, 0, features)
            room = self.rows.room
        else:
            room = samples * frames * (2 * frames + 2) * self.has_frames
        self.shares_at = matrices_at
        moments_at = matrices_at + room
        self.workspace = moments_at + int(MOMENTS.value) * samples * frames * programs
        self.offsets = scratch_at, matrices_at, moments_at
        self.sizes = samples, frames, channels, features, segments, height, width
        self.strides = strides
        shapes = {"sample": (samples,), "batch": (1,), "block": (samples, segments)}
        self.norm_shape = shapes[convention.norm_scope]
        self.sums_shape = samples, int(MOMENTS.value), segments
        self.samples = samples
        self.frame_grad_shape = (samples, frames, features) if self.has_frames else (0,)
        self.pooled_shape = samples, row
        self.counters = samples + 2
        huber = convention.penalty == "huber"
        self.scalars = (
            float(convention.huber_c if huber else 0.0), float(convention.eps), float(convention.coefficient),
        )  # fmt: skip
        self.launch = Launcher(
            moments_kernel,
            samples * frames * programs,
            (
                *grid, *tile.constants, *_scope(convention), convention.guard, convention.nan, huber,
                convention.reduction == "sum", convention.norm_divides == "loss",
                convention.weight_on == "direction", relation, self.has_frames and not parallel,
                16, block_of(frames) if self.has_frames and not parallel else next_power_of_2(frames), 16,
                next_power_of_2(segments),
                max(1, min(next_power_of_2(samples), SUMS_TILE // next_power_of_2(segments))),
            ),
            warps=4,
            wavefronts=2,
            registers=168,
        )  # fmt: skip


class GradientPlan:
    """Launch of a backward pass."""

    def __init__(
        self,
        latents: tuple[Tensor | None, ...],
        mask: Tensor | None,
        layout: str,
        convention: Any,
        pool: str | tuple[int, int] | None,
        dmd: bool,
    ) -> None:
        grid = (1, 1) if pool is None else grid_of(pool)
        tile, self.strides, (samples, frames, channels, height, width) = _cut(latents, mask, layout, grid)
        features = channels * grid[0] * grid[1]
        self.sizes = frames, channels, features, len(convention.segments(frames)) - 1, height, width
        huber = convention.penalty == "huber"
        self.huber_c = float(convention.huber_c if huber else 0.0)
        self.launch = Launcher(
            gradient_kernel,
            samples * frames * channels * grid[0] * tile.splits,
            (
                *grid, *tile.constants, *_scope(convention), huber, convention.nan == "to_num", dmd,
                next_power_of_2(frames),
            ),
            warps=4,
            wavefronts=2,
        )  # fmt: skip


_plans: dict[Any, Any] = {}


def _forward(
    latents: tuple[Tensor | None, ...],
    sigma: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    layout: str,
    convention: Any,
    real_scale: float,
    fake_scale: float,
    frame_mask: Tensor | None = None,
    pool: str | tuple[int, int] | None = None,
    temperature: float = 1.0,
    frame_weight: float = 0.0,
    gather: bool = False,
) -> tuple[Tensor, ...]:
    student = latents[0]
    assert student is not None
    tensors, small = (*latents, mask), (sigma, sample_weight, frame_mask)
    key = (
        student.shape, student.device, _key(tensors), _key(small), layout, convention.encoded, pool, frame_weight != 0,
        gather,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = MomentsPlan(latents, mask, layout, convention, pool, frame_weight, gather)
    device = student.device
    stream = current_stream(device)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    values, norms, factors = empty(2), empty(*plan.norm_shape), empty(plan.samples)
    frame = empty(1) if pool is not None else None
    frame_grad = empty(*plan.frame_grad_shape)
    pooled = empty(*plan.pooled_shape) if gather else None
    workspace = empty(plan.workspace)
    sums = torch.empty(plan.sums_shape, dtype=torch.float64, device=device)
    tickets = counters(device, stream, plan.counters)
    plan.launch(
        stream, *latents, sigma, mask, sample_weight, frame_mask, values, norms, factors, frame, frame_grad, pooled,
        workspace, sums, tickets, *plan.offsets, *plan.sizes, *plan.strides, *_pair(sigma),
        0 if sample_weight is None else sample_weight.stride(0), *_pair(frame_mask),
        float(real_scale), float(fake_scale), *plan.scalars, float(temperature),
    )  # fmt: skip
    if plan.rows is not None:
        terms = empty(3)
        plan.rows.launch(
            stream, workspace, None, terms, frame_grad, frame_grad, workspace, tickets, 0, plan.shares_at,
            *plan.rows.sizes, 0, 0, float(temperature), 0.0, 1.0, 1.0,
        )  # fmt: skip
        frame = terms[2:]
    return values, norms, factors, frame, frame_grad, pooled  # type: ignore[return-value]


def _backward(
    out: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    scores: tuple[Tensor | None, ...],
    sigma: Tensor | None,
    mask: Tensor | None,
    frame_mask: Tensor | None,
    norms: Tensor,
    factors: Tensor,
    frame_grad: Tensor | None,
    batch_grad: Tensor | None,
    layout: str,
    convention: Any,
    real_scale: float,
    fake_scale: float,
    pool: str | tuple[int, int] | None,
    batch_weight: float,
    frame_weight: float,
) -> None:
    grad_total, grad_dmd, grad_batch, grad_frame = grads
    dmd = grad_total is not None or grad_dmd is not None
    if frame_grad is not None and (not frame_grad.numel() or (grad_total is None and grad_frame is None)):
        frame_grad = None
    if batch_grad is not None and (not batch_grad.numel() or (grad_total is None and grad_batch is None)):
        batch_grad = None
    tensors = out, *scores, mask
    key = (
        "backward", out.shape, out.device, _key(tensors), _key((sigma, frame_mask)), layout, convention.encoded, pool,
        dmd, frame_grad is None, batch_grad is None, *(g is None or g.dtype for g in grads),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = GradientPlan((out, *scores), mask, layout, convention, pool, dmd)
    plan.launch(
        current_stream(out.device), out, *scores, sigma, mask, frame_mask, norms, factors,
        grad_total, grad_dmd, grad_batch, grad_frame, frame_grad, batch_grad, *plan.sizes, *plan.strides,
        *_pair(sigma), *_pair(frame_mask), float(real_scale), float(fake_scale), plan.huber_c,
        float(batch_weight), float(frame_weight),
    )  # fmt: skip
