"""Conventions that need more than one pass over the latents: the reference's own composition behind the operators."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from codmd.ops.objective_checks import Inputs
from codmd.ops.operator import is_traced
from codmd.reference import dmd as equations
from codmd.reference import guidance

logger = logging.getLogger("codmd")


def loss_and_terms(inputs: Inputs, backend: str, return_terms: bool) -> tuple[Tensor, ...]:
    """(loss,), or (loss, mean|g|, norm) when ``return_terms``.

    Raises:
        ValueError: ``backend`` names another than the reference.
    """
    _report(backend, inputs.convention.unfusable)
    loss = _loss(inputs) if is_traced(inputs.student) else _Stepwise.apply(inputs.student, inputs)
    if not return_terms:
        return (loss,)
    with torch.no_grad(), torch.autocast(inputs.student.device.type, enabled=False):
        found = _direction(inputs)
        if inputs.convention.norm_scope == "block":
            frame_axis = guidance.FRAME_AXIS[inputs.layout]
            assert frame_axis is not None
            per_frame = found.norm.movedim(frame_axis, 1).flatten(1)
            norm = torch.stack(
                [per_frame[:, start] for start in inputs.convention.segments(per_frame.shape[1])[:-1]], 1
            )
        else:
            norm = found.norm.flatten()
        return loss, equations.mean_magnitude(found, inputs.mask), norm


def teacher_prediction(inputs: Inputs) -> guidance.Prediction:
    """The teacher's x0, with guidance in the convention's arithmetic."""
    return guidance.x0_prediction(
        inputs.real, inputs.real_uncond, inputs.guidance, inputs.convention, inputs.layout, inputs.noisy, inputs.sigma
    )


def critic_prediction(inputs: Inputs) -> guidance.Prediction:
    """The critic's x0, with guidance in the convention's arithmetic."""
    return guidance.x0_prediction(
        inputs.fake,
        inputs.fake_uncond,
        inputs.fake_guidance,
        inputs.convention,
        inputs.layout,
        inputs.noisy,
        inputs.sigma,
    )


def guided(prediction: Any, inputs: Inputs) -> Tensor:
    """The guided x0 of ``teacher_prediction`` or ``critic_prediction`` in the student's dtype; no gradient."""
    with torch.no_grad(), torch.autocast(inputs.student.device.type, enabled=False):
        return prediction(inputs).guided.to(inputs.student.dtype)


def _direction(inputs: Inputs) -> equations.Direction:
    teacher, critic = teacher_prediction(inputs), critic_prediction(inputs)
    student, c, u = inputs.student, inputs.augment_real, inputs.augment_uncond
    given = inputs.guidance, inputs.convention, inputs.layout, inputs.sample_weight, inputs.mask
    if c is None or u is None:
        return equations.direction(student, critic, teacher, *given)
    return equations.decoupled_direction(student, critic, teacher, c, u, *given)


def _loss(inputs: Inputs) -> Tensor:
    with torch.autocast(inputs.student.device.type, enabled=False):
        return equations.loss_of_direction(
            inputs.student, _direction(inputs), inputs.convention, inputs.mask, inputs.sample_weight
        )


class _Stepwise(torch.autograd.Function):
    """The reference composition, computed again in the backward pass instead of keeping its intermediates."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, inputs: Inputs) -> Tensor:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
        return _loss(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        student, *_ = ctx.saved_tensors
        inputs = Inputs(*(o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.options, strict=True)))
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_loss(inputs._replace(student=leaf)), leaf, grad)
        return gradient, None


def _report(requested: str, reason: str) -> None:
    """Log, once, why a convention does not run fused; an explicit backend other than the reference is an error."""
    if requested not in ("auto", "reference"):
        raise ValueError(f"backend={requested!r} cannot serve this convention: {reason}. Use backend='reference'")
    if not torch.compiler.is_compiling():
        _log_once(reason)


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("codmd: this DMD convention runs on the reference: %s", reason)
