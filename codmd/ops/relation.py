"""``relation_loss`` and ``relation_matrix``: the relation term of CoDMD (arXiv 2606.21982).

The forward pass computes the loss *and* its gradient at the level of pooled features (a few kilobytes); the
backward pass broadcasts that gradient over the pixels. Eager calls go straight from an ``autograd.Function`` to
the backend; traced calls (``torch.compile``, ``export``, fake tensors) go through ``torch.ops.codmd``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from codmd import backends, distributed, reference
from codmd.ops import _checks
from codmd.ops._boundary import (
    EagerFunction,
    dense_strides,
    empty_gradient,
    gradient_strides,
    group_name_of,
    is_traced,
    once_differentiable,
    pool_of,
    remembered,
)
from codmd.reference.relation import Pool


class RelationTerms(NamedTuple):
    """What ``relation_loss(..., return_terms=True)`` returns: 0-dim tensors, each with its own gradient."""

    total: Tensor
    batch: Tensor
    frame: Tensor


def relation_loss(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    temperature: float = 0.1,
    batch_weight: float = 1.0,
    frame_weight: float = 1.0,
    layout: str = "bfchw",
    pool: Pool = "mean",
    frame_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    batch_grad: str = "global",
    backend: str = "auto",
    return_terms: bool = False,
) -> Tensor | RelationTerms:
    """Divergence between the student's relations and those the score difference asks for.

    With S the cosine similarities of pooled features and Δ = S(fake) - S(real), the loss is the mean over rows
    of KL(softmax((S(student) - Δ)/τ) ‖ softmax(S(student)/τ)); no gradient flows through the target. The frame
    term relates the frames of one sample, the batch term the samples' time-averaged features.

    Args:
        student: generated latents, ``[B, F, C, H, W]`` (layout ``"bfchw"``) or ``[B, C, F, H, W]``
            (``"bcfhw"``), float32, bfloat16, float16 (float64 on the reference); any strides.
        real: the teacher's x0 prediction after guidance, like ``student``, without gradient.
        fake: the critic's x0 prediction, like ``student``, without gradient.
        temperature: τ of both softmaxes, > 0.
        batch_weight: weight of the batch term, >= 0; at 0 it is neither computed nor gathered.
        frame_weight: weight of the frame term, >= 0.
        layout: ``"bfchw"`` or ``"bcfhw"``.
        pool: ``"mean"`` over all pixels, ``(rows, columns)`` regional means, or ``None`` for every pixel.
        frame_mask: boolean ``[B, F]``, ``True`` marks a valid frame. Other frames are neither rows nor columns
            and get no gradient; a sample with fewer than two valid frames adds 0 to the frame term.
        group: process group whose samples form the batch relation; ``None`` means this process alone. Under
            sequence or context parallelism this is the data-parallel group.
        batch_grad: ``"global"`` (after data-parallel averaging, the gradient of one process with the global
            batch) or ``"local"`` (1/world size of it, as CoDMD's published training does).
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.
        return_terms: return :class:`RelationTerms` instead of the weighted total.

    Returns:
        The 0-dim loss in float32 (float64 for float64 inputs), or its terms. Fewer than two frames (samples)
        make the frame (batch) term exactly 0. Non-finite inputs give a non-finite loss.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. ``RuntimeError`` on a
            second differentiation.

    Source: CoDMD, arXiv 2606.21982; gradients and the sound form in ``docs/mathematics.md``.
    """
    temperature, batch_weight, frame_weight = _options(
        temperature, batch_weight, frame_weight, layout, batch_grad, backend
    )
    _checks.check_latents(student, real=real, fake=fake)
    grid = _checks.check_pool(pool, layout, student.shape)
    _checks.check_frame_mask(frame_mask, student, layout)
    scores = student, real, fake, frame_mask
    options = temperature, batch_weight, frame_weight, layout, grid, group_name_of(group), batch_grad
    if is_traced(student):
        terms, _, _ = torch.ops.codmd.relation_loss(*scores, *options, backend)
        total, batch, frame = terms.unbind()
    elif return_terms:
        total, batch, frame = _Terms.apply(student, scores, options, backend)
    else:
        return _Total.apply(student, scores, options, backend)
    return RelationTerms(total, batch, frame) if return_terms else total


@remembered
def _options(
    temperature: float, batch_weight: float, frame_weight: float, layout: str, batch_grad: str, backend: str
) -> tuple[float, float, float]:
    """The checked numbers as float; raises where an option is not as described."""
    _checks.check_layout(layout)
    _checks.check_one_of("batch_grad", batch_grad, ("global", "local"))
    backends.check_name(backend)
    return (
        _checks.check_positive("temperature", temperature),
        _checks.check_weight("batch_weight", batch_weight),
        _checks.check_weight("frame_weight", frame_weight),
    )


def relation_matrix(latents: Tensor, axis: str = "frame", pool: Pool = "mean", layout: str = "bfchw") -> Tensor:
    """Cosine similarities S = u uᵀ among the frames of each sample, or among the samples of the batch.

    Composed of differentiable PyTorch operators on the reference's equations, in float32 at least.

    Args:
        latents: ``[B, F, C, H, W]`` or ``[B, C, F, H, W]`` as ``layout`` says.
        axis: ``"frame"`` or ``"batch"`` (of the time-averaged features).
        pool: as in :func:`relation_loss`.
        layout: ``"bfchw"`` or ``"bcfhw"``.

    Returns:
        ``[B, F, F]`` for frames, ``[B, B]`` for the batch; float32, or float64 for float64 latents.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    _checks.check_layout(layout)
    _checks.check_latents(latents)
    _checks.check_one_of("axis", axis, ("frame", "batch"))
    grid = _checks.check_pool(pool, layout, latents.shape)
    with torch.autocast(latents.device.type, enabled=False):
        features = reference.frame_features(latents, layout, pool_of(grid))
        return reference.relation(features if axis == "frame" else reference.batch_features(features))


def _forward(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    temperature: float,
    batch_weight: float,
    frame_weight: float,
    layout: str,
    grid: list[int] | None,
    group_name: str,
    batch_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(terms [3] = total, batch, frame; gradient of the frame term; gradient of the batch term)."""
    return _run_forward(
        backends.select(backend, student), student, real, fake, frame_mask, temperature, batch_weight, frame_weight,
        layout, grid, group_name, batch_grad,
    )  # fmt: skip


def _run_forward(
    run: ModuleType,
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    temperature: float,
    batch_weight: float,
    frame_weight: float,
    layout: str,
    grid: list[int] | None,
    group_name: str,
    batch_grad: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pool = pool_of(grid)
    group = distributed.resolve(group_name) if group_name and batch_weight else None
    if group is None or group.size() == 1:
        return run.relation_forward(
            student, real, fake, frame_mask, layout, pool, temperature, batch_weight, frame_weight
        )
    frame, frame_grad, pooled = run.relation_frames(
        student, real, fake, frame_mask, layout, pool, temperature, frame_weight
    )
    gathered = distributed.gather_rows(pooled, group_name)
    samples, scale = pooled.shape[0], distributed.gradient_scale(batch_grad, group.size())
    terms, rows_grad = run.relation_batch(
        gathered, frame, group.rank() * samples, samples, temperature, batch_weight, frame_weight, scale
    )
    return terms, frame_grad, rows_grad


def _eager_forward(ctx: Any, scores: tuple[Any, ...], options: tuple[Any, ...], backend: str) -> Tensor:
    """The terms [3]; what the backward pass needs goes to ``ctx``."""
    student, frame_mask, grid = scores[0], scores[3], options[4]
    run = backends.select(backend, student)
    terms, frame_grad, batch_grad = _run_forward(run, *scores, *options)
    ctx.save_for_backward(frame_grad, batch_grad, frame_mask, student if grid is None else None)
    shape = student.shape
    ctx.student = run, shape, gradient_strides(student), student.dtype
    ctx.options = options[3], pool_of(grid), options[1], options[2]
    ctx.set_materialize_grads(False)
    return terms


def _eager_backward(ctx: Any, total: Tensor | None, batch: Tensor | None, frame: Tensor | None) -> Tensor:
    frame_grad, batch_grad, frame_mask, student = ctx.saved_tensors
    run, shape, strides, dtype = ctx.student
    out = empty_gradient(shape, strides, dtype, frame_grad.device)
    run.relation_backward(out, total, batch, frame, student, frame_mask, frame_grad, batch_grad, *ctx.options)
    return out


class _Total(EagerFunction):
    """The total alone: one output costs the eager call less than three."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, scores: Any, options: Any, backend: str) -> Tensor:
        return _eager_forward(ctx, scores, options, backend)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None if total is None else _eager_backward(ctx, total, None, None)), None, None, None


class _Terms(EagerFunction):
    @staticmethod
    def forward(ctx: Any, student: Tensor, scores: Any, options: Any, backend: str) -> tuple[Tensor, ...]:
        return _eager_forward(ctx, scores, options, backend).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _eager_backward(ctx, *gradients), None, None, None


_OPTIONS = (
    "float temperature, float batch_weight, float frame_weight, str layout, int[]? grid, "
    "str group_name, str batch_grad, str backend"
)
_relation_loss = torch.library.custom_op(
    "codmd::relation_loss",
    _forward,
    mutates_args=(),
    schema=f"(Tensor student, Tensor real, Tensor fake, Tensor? frame_mask, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@_relation_loss.register_fake
def _(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    temperature: float,
    batch_weight: float,
    frame_weight: float,
    layout: str,
    grid: list[int] | None,
    group_name: str,
    batch_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    samples, frames, channels, height, width = student.shape
    if layout == "bcfhw":
        frames, channels = channels, frames
    length = channels * (height * width if grid is None else grid[0] * grid[1])
    rows = samples * distributed.resolve(group_name).size() if group_name else samples
    dtype = reference.compute_dtype(student.dtype)
    frame_shape = (samples, frames, frames if grid is None else length) if frame_weight and frames > 1 else (0,)
    batch_shape: tuple[int, ...] = (samples, length) if batch_weight and rows > 1 else (0,)
    if grid is None and batch_weight and rows == samples > 1:
        shape_of = getattr(backends.select(backend, student), "batch_grad_shape", None)
        batch_shape = batch_shape if shape_of is None else shape_of(samples, frames, length, None)
    return (
        student.new_empty(3, dtype=dtype),
        student.new_empty(frame_shape, dtype=dtype),
        student.new_empty(batch_shape, dtype=dtype),
    )


@torch.library.custom_op(
    "codmd::relation_loss_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_terms, Tensor? student, Tensor? frame_mask, Tensor frame_grad, Tensor batch_grad, "
        "SymInt[] size, SymInt[] stride, ScalarType dtype, str layout, int[]? grid, float batch_weight, "
        "float frame_weight, str backend) -> Tensor"
    ),
)
def _relation_loss_backward(
    grad_terms: Tensor,
    student: Tensor | None,
    frame_mask: Tensor | None,
    frame_grad: Tensor,
    batch_grad: Tensor,
    size: list[int],
    stride: list[int],
    dtype: torch.dtype,
    layout: str,
    grid: list[int] | None,
    batch_weight: float,
    frame_weight: float,
    backend: str,
) -> Tensor:
    out = torch.empty_strided(size, stride, dtype=dtype, device=grad_terms.device)
    total, batch, frame = grad_terms.unbind()
    backends.select(backend, out).relation_backward(
        out, total, batch, frame, student, frame_mask, frame_grad, batch_grad,
        layout, pool_of(grid), batch_weight, frame_weight,
    )  # fmt: skip
    return out


@_relation_loss_backward.register_fake
def _(grad_terms: Tensor, *arguments: Any) -> Tensor:
    _, _, _, _, size, stride, dtype = arguments[:7]
    return torch.empty_strided(size, stride, dtype=dtype, device=grad_terms.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, _, _, frame_mask, _, batch_weight, frame_weight, layout, grid, _, _, backend = inputs
    _, frame_grad, batch_grad = output
    ctx.save_for_backward(frame_grad, batch_grad, frame_mask, student if grid is None else None)
    ctx.student = list(student.shape), list(dense_strides(student.shape, student.stride())), student.dtype
    ctx.options = layout, grid, batch_weight, frame_weight, backend
    ctx.set_materialize_grads(False)


def _traced_backward(ctx: Any, grad_terms: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    frame_grad, batch_grad, frame_mask, student = ctx.saved_tensors
    if grad_terms is None:
        return (None,) * 12
    grad = torch.ops.codmd.relation_loss_backward(
        grad_terms, student, frame_mask, frame_grad, batch_grad, *ctx.student, *ctx.options
    )
    return grad, *[None] * 11


_relation_loss.register_autograd(_traced_backward, setup_context=_setup_context)
