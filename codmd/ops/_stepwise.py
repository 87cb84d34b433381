"""Conventions that need more than one pass over the latents: the reference's own composition behind the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from codmd.ops import _dmd_backend
from codmd.ops._boundary import is_traced
from codmd.ops._dmd_inputs import Inputs
from codmd.reference import dmd as equations
from codmd.reference import guidance


def loss_and_terms(inputs: Inputs, backend: str, return_terms: bool) -> tuple[Tensor, ...]:
    """(loss,), or (loss, mean|g|, norm) when ``return_terms``."""
    _dmd_backend.report_stepwise(backend, inputs.convention.unfusable)
    loss = _stepwise_loss(*inputs) if is_traced(inputs.student) else _Stepwise.apply(*inputs)
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
    return equations.direction(
        inputs.student, critic, teacher, inputs.guidance, inputs.convention, inputs.layout, inputs.sample_weight
    )


def _stepwise_loss(*arguments: Any) -> Tensor:
    inputs = Inputs(*arguments)
    with torch.autocast(inputs.student.device.type, enabled=False):
        return equations.loss_of_direction(
            inputs.student, _direction(inputs), inputs.convention, inputs.mask, inputs.sample_weight
        )


class _Stepwise(torch.autograd.Function):
    """The reference composition, computed again in the backward pass instead of keeping its intermediates."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = Inputs(*arguments)
        ctx.save_for_backward(*inputs[:9])
        ctx.options = inputs[9:]
        return _stepwise_loss(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, *others = ctx.saved_tensors
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_stepwise_loss(leaf, *others, *ctx.options), leaf, grad)
        return gradient, *[None] * 14
