"""Relation loss of whole latents (pool=None), and batch relations of long gathered features.

The frame term takes one launch. The batch term takes two more: the Grams of the time averages that the first launch
leaves in ``pooled``, and the product of their small matrix with those averages. Samples of one frame are their own
averages: with the axes exchanged, their batch relation is a frame relation, in one launch and without tables. Few
samples of few frames take :mod:`.together`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codmd.ops.contract import Found, Pending, Relation, Upstream

from .. import limits
from ..launch import current_stream, multiprocessors
from ..plans import PLANS, alignment, dtype_of, mask_key, number_arguments, pair_of_strides
from ..tickets import counters
from ..tiling import Geometry
from . import together
from .plans import ApplyPlan, GramPlan
from .runs import Runs


def _first_stage(call: Relation, grams: bool, means: bool, exchanged: bool = False) -> tuple[Found, Tensor | None]:
    """M / B of the frame relations, if ``grams``, with their terms; the rows of time averages, if ``means``.

    ``exchanged``: frames are samples, and the terms those of the batch relation alone.
    """
    student, real, fake, frame_mask, layout, _, batch, _, numbers = call
    device, single = student.device, torch.float32
    samples, frames = student.shape[0], student.shape[1 if layout == "bfchw" else 2]
    matrices = rows = None
    nothing = torch.empty(0, dtype=single, device=device)
    terms = (torch.empty if grams else torch.zeros)(3, dtype=single, device=device)
    if not grams and not means:
        return Found(terms, None, None, nothing, nothing), None
    strides, aligned = (student.stride(), real.stride(), fake.stride()), alignment(student, real, fake)

    def make() -> GramPlan:
        geometries = tuple(Geometry.of(student.shape, s, layout) for s in strides)
        sizes = geometries[0].sizes
        limits.check((frames, samples, *sizes[2:]) if exchanged else sizes, None, batch, grams and not exchanged)
        runs = Runs(geometries, (student.element_size(),) * 3, aligned is True)
        mask = pair_of_strides(frame_mask)
        processors, half = multiprocessors(device), student.element_size() == 2
        return GramPlan(samples, frames, runs, processors, grams, False, exchanged, means, mask, half)

    key = (
        GramPlan, student.shape, strides, aligned, student.dtype, device, layout, grams, means, batch, exchanged,
        mask_key(frame_mask), type(numbers),
    )  # fmt: skip
    plan = PLANS.get(key) or PLANS.of(key, make)
    if grams:
        matrices = torch.empty((samples, frames, frames), dtype=single, device=device)
    if means:
        rows = torch.empty((samples, 3 * (student[0].numel() // frames) + 1), dtype=single, device=device)
    workspace = torch.empty(plan.workspace, dtype=single, device=device)
    stream = current_stream(student)
    plan.launch(
        stream, student, real, fake, frame_mask, None, terms if grams else None, matrices, rows, workspace,
        counters(student, stream, plan.counters), *number_arguments(numbers),
    )  # fmt: skip
    return Found(terms, None, None, nothing if matrices is None else matrices, nothing), rows


def is_exchanged(samples: int, frames: int) -> bool:
    """Whether one-frame samples take the place of frames."""
    return frames == 1 and 1 < samples <= limits.MOST_WHOLE


def keeps_matrix(samples: int, frames: int) -> bool:
    """Whether the batch gradient is the matrix M ``[1, B, B]``, not the gradient of the time averages ``[B, K]``."""
    return is_exchanged(samples, frames) or together.is_together(samples, frames)


def _exchange(tensor: Tensor, layout: str) -> Tensor:
    return tensor.transpose(0, 1 if layout == "bfchw" else 2)


def _exchanged(call: Relation) -> Relation:
    mask = None if call.frame_mask is None else call.frame_mask.t()
    student, real, fake = (_exchange(v, call.layout) for v in (call.student, call.real, call.fake))
    return call._replace(student=student, real=real, fake=fake, frame_mask=mask)


def relation(call: Relation) -> Found:
    """The relation of one process: M / B of the frame relations ``[B, F, F]``, and the gradient of the batch term.

    That is ``[B, K]``, or M of the batch relation ``[1, B, B]`` where :func:`keeps_matrix`.
    """
    student = call.student
    samples, frames = student.shape[0], student.shape[1 if call.layout == "bfchw" else 2]
    means = call.batch and samples > 1
    if means and is_exchanged(samples, frames):
        found, _ = _first_stage(_exchanged(call), True, False, True)
        return found._replace(frame_grad=found.batch_grad, batch_grad=found.frame_grad)
    if means and together.is_together(samples, frames):
        return together.relation(call)
    found, rows = _first_stage(call, call.frame and frames > 1, means)
    if rows is None:
        return found
    terms, batch_grad = batch_relation(call.numbers, rows, found.terms[2:], 0, samples, 1.0)
    return found._replace(terms=terms, batch_grad=batch_grad)


def features(call: Relation) -> Pending:
    """The stage before a gather."""
    frames = call.student.shape[1 if call.layout == "bfchw" else 2]
    found, rows = _first_stage(call, call.frame and frames > 1, True)
    assert rows is not None
    return Pending(rows, found)


def batch_relation(
    numbers: object, rows: Tensor, frame_term: Tensor, first: int, count: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The batch relation of gathered rows: terms ``[3]``, ``scale``·gradient of ``count`` rows from ``first`` on."""
    device = rows.device
    stream = current_stream(rows)
    vectors, row = rows.shape
    features = (row - 1) // 3

    def make() -> tuple[GramPlan, ApplyPlan]:
        sizes = 1, vectors, 1, 1, features
        averages, gradient = Geometry(sizes, (0, row, 0, 0, 1)), Geometry(sizes, (0, features, 0, 0, 1))
        processors, mask = multiprocessors(device), (0, row)
        gram_runs, runs = Runs((averages,) * 3, (4,) * 3, False), Runs((gradient, averages), (4, 4), False)
        return (
            GramPlan(1, vectors, gram_runs, processors, True, True, True, mask_strides=mask),
            ApplyPlan(1, vectors, first, count, runs, processors, mask),
        )

    key = (batch_relation, vectors, row, count, first, device, rows.data_ptr() % 16, type(numbers))  # fmt: skip
    gram, apply = PLANS.get(key) or PLANS.of(key, make)
    terms = torch.empty(3, dtype=torch.float32, device=device)
    matrix = torch.empty((1, vectors, vectors), dtype=torch.float32, device=device)
    workspace = torch.empty(gram.workspace, dtype=torch.float32, device=device)
    real, difference, valid = rows[:, features:], rows[:, 2 * features :], rows[:, 3 * features :]
    gram.launch(
        stream, rows, real, difference, valid, frame_term, terms, matrix, None, workspace,
        counters(rows, stream, gram.counters), *number_arguments(numbers),
    )  # fmt: skip
    grad = torch.empty((count, features), dtype=torch.float32, device=device)
    apply.launch(stream, grad, rows, valid, None, None, None, matrix, None, None, 0.0, 0.0, float(scale), 0.0, 0.0, 0.0)
    return terms, grad


def gradient(out: Tensor, upstream: Upstream, call: Relation, found: Found) -> None:
    """Write the gradient of the student's latents into ``out``, from the student's values and M."""
    student, frame_mask, layout, numbers = call.student, call.frame_mask, call.layout, call.numbers
    matrices, batch_grad = found.frame_grad, found.batch_grad
    total, _, batch, frame = upstream
    frames = student.shape[1 if layout == "bfchw" else 2]
    exchanged = batch_grad.ndim == 3 and frames == 1
    if batch_grad.ndim == 3 and not exchanged:
        together.gradient(out, upstream, call, found)
        return
    if exchanged:
        out, student = _exchange(out, layout), _exchange(student, layout)
        frame_mask = None if frame_mask is None else frame_mask.t()
        matrices, batch_grad, frame = batch_grad, matrices, batch
    strides, aligned = (out.stride(), student.stride()), alignment(out, student)
    has_matrices = matrices.numel() > 0 and not (total is None and frame is None)
    has_batch = batch_grad.numel() > 0 and not (total is None and batch is None)

    def make() -> ApplyPlan:
        geometries = tuple(Geometry.of(out.shape, s, layout) for s in strides)
        relations, vectors = geometries[0].sizes[:2]
        runs = Runs(geometries, (out.element_size(),) * 2, aligned is True)
        mask = pair_of_strides(frame_mask)
        processors, half = multiprocessors(out.device), out.element_size() == 2
        return ApplyPlan(relations, vectors, 0, vectors, runs, processors, mask, exchanged, half)

    key = (
        ApplyPlan, out.shape, strides, aligned, out.dtype, out.device, layout, has_matrices, has_batch, exchanged,
        mask_key(frame_mask), dtype_of(total), dtype_of(batch), dtype_of(frame),
        type(numbers),
    )  # fmt: skip
    plan = PLANS.get(key) or PLANS.of(key, make)
    plan.launch(
        current_stream(out), out, student, frame_mask, total, batch, frame, matrices if has_matrices else None,
        batch_grad if has_batch else None, *number_arguments(numbers),
    )  # fmt: skip
