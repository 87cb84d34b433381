"""Conventions that need more than one pass over the latents: the reference's own composition behind the operators."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from codmd.ops.contract import Objective
from codmd.ops.objective_checks import Options
from codmd.ops.operator import is_traced
from codmd.reference import dmd as equations
from codmd.reference import guidance

logger = logging.getLogger("codmd")


def loss_and_terms(call: Objective, options: Options, backend: str, return_terms: bool) -> tuple[Tensor, ...]:
    """(loss,), or (loss, mean|g|, norm) when ``return_terms``.

    Raises:
        ValueError: ``backend`` names another than the reference.
    """
    _report(backend, call.convention.unfusable)
    loss = _loss(call, options) if is_traced(call.student) else _Stepwise.apply(call.student, call, options)
    if not return_terms:
        return (loss,)
    with torch.no_grad(), torch.autocast(call.student.device.type, enabled=False):
        found = _direction(call, options)
        if call.convention.norm_scope == "block":
            frame_axis = guidance.FRAME_AXIS[call.layout]
            assert frame_axis is not None
            per_frame = found.norm.movedim(frame_axis, 1).flatten(1)
            norm = torch.stack([per_frame[:, start] for start in call.convention.segments(per_frame.shape[1])[:-1]], 1)
        else:
            norm = found.norm.flatten()
        return loss, equations.mean_magnitude(found, call.mask), norm


def teacher_prediction(call: Objective, options: Options) -> guidance.Prediction:
    """The teacher's x0, with guidance in the convention's arithmetic."""
    return guidance.x0_prediction(
        call.real, call.real_uncond, options.guidance, call.convention, call.layout, call.noisy, call.sigma
    )


def critic_prediction(call: Objective, options: Options) -> guidance.Prediction:
    """The critic's x0, with guidance in the convention's arithmetic."""
    return guidance.x0_prediction(
        call.fake, call.fake_uncond, options.fake_guidance, call.convention, call.layout, call.noisy, call.sigma
    )


def guided(prediction: Any, call: Objective, options: Options) -> Tensor:
    """The guided x0 of ``teacher_prediction`` or ``critic_prediction`` in the student's dtype; no gradient."""
    with torch.no_grad(), torch.autocast(call.student.device.type, enabled=False):
        return prediction(call, options).guided.to(call.student.dtype)


def _direction(call: Objective, options: Options) -> equations.Direction:
    teacher, critic = teacher_prediction(call, options), critic_prediction(call, options)
    student, c, u = call.student, call.augment_real, call.augment_uncond
    given = options.guidance, call.convention, call.layout, call.sample_weight, call.mask
    if c is None or u is None:
        return equations.direction(student, critic, teacher, *given)
    return equations.decoupled_direction(student, critic, teacher, c, u, *given)


def _loss(call: Objective, options: Options) -> Tensor:
    with torch.autocast(call.student.device.type, enabled=False):
        return equations.loss_of_direction(
            call.student, _direction(call, options), call.convention, call.mask, call.sample_weight
        )


class _Stepwise(torch.autograd.Function):
    """The reference composition, computed again in the backward pass instead of keeping its intermediates."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Objective, options: Options) -> Tensor:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in call))
        ctx.values = [None if isinstance(value, Tensor) else value for value in call]
        ctx.options = options
        return _loss(call, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        student, *_ = ctx.saved_tensors
        call = Objective(*(o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.values, strict=True)))
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_loss(call._replace(student=leaf), ctx.options), leaf, grad)
        return gradient, None, None


def _report(requested: str, reason: str) -> None:
    """Log, once, why a convention does not run fused; an explicit backend other than the reference is an error."""
    if requested not in ("auto", "reference"):
        raise ValueError(f"backend={requested!r} cannot serve this convention: {reason}. Use backend='reference'")
    if not torch.compiler.is_compiling():
        _log_once(reason)


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("codmd: this DMD convention runs on the reference: %s", reason)
