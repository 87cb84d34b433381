"""Relation loss of whole latents (pool=None), and batch relations of long gathered features.

The frame term takes one launch. The batch term takes two more: the Grams of the time averages that the first launch
leaves in ``pooled``, and the product of their small matrix with those averages. Samples of one frame are their own
averages: with the axes exchanged, their batch relation is a frame relation, in one launch and without tables. Few
samples of few frames take :mod:`.together`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import limits
from ..launch import alignment, counters, current_stream, mask_key, mask_strides, multiprocessors
from ..tiling import Geometry
from . import together
from .plans import ApplyPlan, GramPlan
from .runs import Runs

_plans: dict[Any, Any] = {}


def _gram_plan(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    grams: bool,
    means: bool,
    batch: bool,
    exchanged: bool,
) -> GramPlan:
    strides = student.stride(), real.stride(), fake.stride()
    aligned = alignment(student, real, fake)
    key = (
        "gram", student.shape, strides, aligned, student.dtype, student.device, layout, grams, means, batch,
        exchanged, mask_key(frame_mask),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        geometries = tuple(Geometry.of(student.shape, s, layout) for s in strides)
        samples, frames, *plane = geometries[0].sizes
        if exchanged:
            limits.check((frames, samples, *plane), None, True, False)
        else:
            limits.check((samples, frames, *plane), None, batch, grams)
        runs = Runs(geometries, (student.element_size(),) * 3, aligned is True)
        processors = multiprocessors(student.device)
        plan = _plans[key] = GramPlan(samples, frames, runs, processors, grams, False, exchanged, means)
    return plan


def _first_stage(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    temperature: float,
    weight: float,
    means: bool,
    batch: bool,
    exchanged: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Terms of the frame relation alone (None without one), its M / B, and the rows of time averages if ``means``.

    ``exchanged``: frames are samples, and the terms those of the batch relation alone.
    """
    device = student.device
    samples, frames = student.shape[0], student.shape[1 if layout == "bfchw" else 2]
    grams = weight != 0 and frames > 1
    terms, matrices, pooled = None, torch.empty(0, device=device), None
    if not grams and not means:
        return terms, matrices, pooled
    if grams:
        terms = torch.empty(3, dtype=torch.float32, device=device)
        matrices = torch.empty((samples, frames, frames), dtype=torch.float32, device=device)
    plan = _gram_plan(student, real, fake, frame_mask, layout, grams, means, batch, exchanged)
    stream = current_stream(student)
    if means:
        features = student[0].numel() // frames
        pooled = torch.empty((samples, 3 * features + 1), dtype=torch.float32, device=device)
    workspace = torch.empty(plan.workspace, dtype=torch.float32, device=device)
    weights = (float(weight), 0.0) if exchanged else (0.0, float(weight))
    plan.launch(
        stream, student, real, fake, frame_mask, None, terms, matrices, pooled, workspace,
        counters(student, stream, plan.counters), *plan.sizes, *mask_strides(frame_mask), float(temperature), *weights,
    )  # fmt: skip
    return terms, matrices, pooled


def is_exchanged(samples: int, frames: int) -> bool:
    """Whether one-frame samples take the place of frames."""
    return frames == 1 and 1 < samples <= limits.MOST_WHOLE


def keeps_matrix(samples: int, frames: int) -> bool:
    """Whether the batch gradient is the matrix M ``[1, B, B]``, not the gradient of the time averages ``[B, K]``."""
    return is_exchanged(samples, frames) or together.is_together(samples, frames)


def _exchange(tensor: Tensor, layout: str) -> Tensor:
    return tensor.transpose(0, 1 if layout == "bfchw" else 2)


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
    """float32 terms ``[3]``, M / B of the frame relation ``[B, F, F]``, gradient of the batch term.

    That is ``[B, K]``, or M of the batch relation ``[1, B, B]`` where :func:`keeps_matrix`.
    """
    samples, frames = student.shape[0], student.shape[1 if layout == "bfchw" else 2]
    means = batch_weight != 0 and samples > 1
    nothing = torch.empty(0, dtype=torch.float32, device=student.device)
    if means and is_exchanged(samples, frames):
        latents = (_exchange(v, layout) for v in (student, real, fake))
        mask = None if frame_mask is None else frame_mask.t()
        terms, matrix, _ = _first_stage(*latents, mask, layout, temperature, batch_weight, False, True, True)
        assert terms is not None
        return terms, nothing, matrix
    if means and together.is_together(samples, frames):
        return together.relation_forward(
            student, real, fake, frame_mask, layout, temperature, batch_weight, frame_weight
        )
    terms, matrices, pooled = _first_stage(
        student, real, fake, frame_mask, layout, temperature, frame_weight, means, means
    )
    if pooled is None:
        return torch.zeros(3, device=student.device) if terms is None else terms, matrices, nothing
    frame = None if terms is None else terms[2:]
    terms, batch_grad = relation_batch(pooled, frame, 0, samples, temperature, batch_weight, frame_weight, 1.0)
    return terms, matrices, batch_grad


def relation_frames(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    temperature: float,
    frame_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stage before a gather: frame term ``[1]``, M / B, and ``[B, 3K + 1]``: ψ_x, ψ_r, ψ_d, valid frames."""
    terms, matrices, pooled = _first_stage(
        student, real, fake, frame_mask, layout, temperature, frame_weight, True, False
    )
    assert pooled is not None
    return pooled.new_zeros(1) if terms is None else terms[2:], matrices, pooled


def relation_batch(
    pooled: Tensor,
    frame: Tensor | None,
    first_row: int,
    rows: int,
    temperature: float,
    batch_weight: float,
    frame_weight: float,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    """The batch relation of ``[N, 3K + 1]`` rows: terms ``[3]``, ``grad_scale``·gradient of the caller's rows."""
    device = pooled.device
    stream = current_stream(pooled)
    vectors, row = pooled.shape
    features = (row - 1) // 3
    key = "batch", vectors, row, rows, first_row, device, pooled.data_ptr() % 16, frame is None
    plans = _plans.get(key)
    if plans is None:
        sizes = 1, vectors, 1, 1, features
        averages, gradient = Geometry(sizes, (0, row, 0, 0, 1)), Geometry(sizes, (0, features, 0, 0, 1))
        processors = multiprocessors(device)
        plans = _plans[key] = (
            GramPlan(1, vectors, Runs((averages,) * 3, (4,) * 3, False), processors, True, True, True),
            ApplyPlan(1, vectors, rows, Runs((gradient, averages), (4, 4), False), processors),
        )
    gram, apply = plans
    terms = torch.empty(3, dtype=torch.float32, device=device)
    matrix = torch.empty((1, vectors, vectors), dtype=torch.float32, device=device)
    workspace = torch.empty(gram.workspace, dtype=torch.float32, device=device)
    scalars = float(temperature), float(batch_weight), float(frame_weight)
    real, difference, valid = pooled[:, features:], pooled[:, 2 * features :], pooled[:, 3 * features :]
    gram.launch(
        stream, pooled, real, difference, valid, frame, terms, matrix, None, workspace,
        counters(pooled, stream, gram.counters), *gram.sizes, 0, row, *scalars,
    )  # fmt: skip
    grad = torch.empty((rows, features), dtype=torch.float32, device=device)
    apply.launch(
        stream, grad, pooled, valid, None, None, None, matrix, None,
        *apply.sizes, first_row, rows, *apply.strides, 0, row, 0.0, float(grad_scale),
    )  # fmt: skip
    return terms, grad


def relation_backward(
    out: Tensor,
    grad_total: Tensor | None,
    grad_batch: Tensor | None,
    grad_frame: Tensor | None,
    student: Tensor,
    frame_mask: Tensor | None,
    matrices: Tensor,
    batch_grad: Tensor,
    layout: str,
    batch_weight: float,
    frame_weight: float,
) -> None:
    """Write the gradient of the student's latents into ``out``, from the student's values and M."""
    frames = student.shape[1 if layout == "bfchw" else 2]
    if batch_grad.ndim == 3 and frames > 1:
        together.relation_backward(
            out, grad_total, grad_batch, grad_frame, student, frame_mask, matrices, batch_grad, layout, batch_weight,
            frame_weight,
        )  # fmt: skip
        return
    if batch_grad.ndim == 3:
        mask = None if frame_mask is None else frame_mask.t()
        relation_backward(
            _exchange(out, layout), grad_total, None, grad_batch, _exchange(student, layout), mask, batch_grad,
            batch_grad.new_empty(0), layout, 0.0, batch_weight,
        )  # fmt: skip
        return
    aligned = out.data_ptr() % 16 == 0, student.data_ptr() % 16 == 0
    has_frames = matrices.numel() > 0 and not (grad_total is None and grad_frame is None)
    has_batch = batch_grad.numel() > 0 and not (grad_total is None and grad_batch is None)
    key = (
        "apply", out.shape, out.stride(), student.stride(), aligned, out.dtype, out.device, layout, has_frames,
        has_batch, mask_key(frame_mask), *(g is None or g.dtype for g in (grad_total, grad_batch, grad_frame)),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        geometries = tuple(Geometry.of(out.shape, s, layout) for s in (out.stride(), student.stride()))
        limits.check(geometries[0].sizes, None, has_batch, has_frames)
        samples, frames = geometries[0].sizes[:2]
        runs = Runs(geometries, (out.element_size(),) * 2, all(aligned))
        plan = _plans[key] = ApplyPlan(samples, frames, frames, runs, multiprocessors(out.device))
    plan.launch(
        current_stream(out), out, student, frame_mask, grad_total, grad_batch, grad_frame,
        matrices if has_frames else None, batch_grad if has_batch else None,
        *plan.sizes, 0, plan.rows, *plan.strides, *mask_strides(frame_mask), float(batch_weight), float(frame_weight),
    )  # fmt: skip
