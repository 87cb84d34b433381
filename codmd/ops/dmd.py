"""``dmd_loss``: the distribution matching loss of every public codebase, value and gradient (arXiv 2311.18828).

The forward pass reads the latents once and keeps the norms and one factor per sample; the backward pass reads the
predictions again and writes the gradient. Eager calls go straight from an ``autograd.Function`` to the backend; traced
calls go through ``torch.ops.codmd``. Conventions that no single pass can serve run step by step on the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from codmd import conventions, reference
from codmd.conventions import Convention
from codmd.ops import _dmd_backend, _dmd_inputs, _stepwise
from codmd.ops._boundary import (
    EagerFunction,
    dense_strides,
    empty_gradient,
    gradient_strides,
    is_traced,
    once_differentiable,
)
from codmd.ops._dmd_inputs import Inputs


class DmdTerms(NamedTuple):
    """What ``dmd_loss(..., return_terms=True)`` returns; only ``loss`` has a gradient.

    ``magnitude`` is mean|g| over the selected elements, ``norm`` has one value per sample ``[B]``, per block
    ``[B, blocks]`` or for the whole batch ``[1]``, ``real`` is the guided x0 prediction in the student's dtype, or
    ``None`` without ``return_real=True``.
    """

    loss: Tensor
    magnitude: Tensor
    norm: Tensor
    real: Tensor | None


def dmd_loss(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None = None,
    fake_uncond: Tensor | None = None,
    *,
    guidance: float = 3.5,
    fake_guidance: float | None = None,
    convention: str | Convention = "self_forcing",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    layout: str | None = None,
    prediction: str = "x0",
    noisy: Tensor | None = None,
    sigma: Tensor | None = None,
    backend: str = "auto",
    return_terms: bool = False,
    return_real: bool = False,
) -> Tensor | DmdTerms:
    """Distribution matching: L = ½ mean(g²) in value and ∂L/∂student = g/numel, g = (fake - real)/mean|student - real|.

    That is the convention ``"self_forcing"``; others differ in guidance, norm, guard, NaN policy, penalty and
    reduction, see ``docs/conventions.md``. Value and gradient are those of that codebase in float32 arithmetic;
    ``replace(conventions.self_forcing, arithmetic="emulate")`` also repeats its roundings.

    Args:
        student: generated latents, ``[B, F, C, H, W]`` (layout ``"bfchw"``), ``[B, C, F, H, W]`` (``"bcfhw"``) or
            images ``[B, C, H, W]`` (``"bchw"``); float32, bfloat16, float16 (float64 on the reference); any strides.
        fake: the critic's prediction, like ``student``, without gradient.
        real: the teacher's (conditional) prediction, like ``student``, without gradient.
        real_uncond: the teacher's unconditional prediction; ``None`` means that ``real`` is used as it is.
        fake_uncond: the critic's unconditional prediction, likewise.
        guidance: scale of the teacher's guidance *in the convention's form*; see :meth:`Convention.guidance_scale`.
        fake_guidance: scale of the critic's guidance; ``None`` means ``guidance``.
        convention: a name, an instance of :mod:`codmd.conventions`, or a ``replace`` of one.
        mask: boolean, broadcastable to ``student``; ``True`` selects. The mean is over the selected elements; nothing
            selected gives 0 and a zero gradient. The norm is over all elements.
        sample_weight: ``[B]``, multiplies each sample's loss (under ``fastgen`` and ``modelopt``: its g).
        layout: ``None`` means the convention's.
        prediction: ``"x0"``, or ``"flow"``: the predictions are velocities v and x0 = noisy - sigma·v.
        noisy: x_t, like ``student``; for ``"flow"``.
        sigma: noise level, ``[B]`` or ``[B, F]``; for ``"flow"``.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.
        return_terms: return :class:`DmdTerms`: mean|g| and the norms come from the same pass.
        return_real: the terms also hold the guided ``real``; a pass of its own writes it.

    Returns:
        The 0-dim loss: float32, or float64 where inputs or the convention's reduction are float64. A non-finite
        student gives a non-finite loss; a non-finite prediction does what the convention's NaN policy says.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. ``RuntimeError`` on a second
            differentiation.

    Source: DMD, arXiv 2311.18828, equations 7 and 8; the conventions' codebases are linked in ``docs/conventions.md``.
    """
    inputs = _dmd_inputs.check(
        student, fake, real, real_uncond, fake_uncond, guidance, fake_guidance, convention, mask, sample_weight,
        layout, prediction, noisy, sigma, backend,
    )  # fmt: skip
    if not return_terms:
        if return_real:
            raise ValueError("return_real=True needs return_terms=True: the guided real is one of the terms")
        return loss_of(inputs, backend)
    if inputs.convention.fusable:
        loss, magnitude, norm = _fused_terms(inputs, backend)
    else:
        loss, magnitude, norm = _stepwise.loss_and_terms(inputs, backend, True)
    if not return_real:
        return DmdTerms(loss, magnitude, norm, None)
    guided = _stepwise.guided(_stepwise.teacher_prediction, inputs)
    return DmdTerms(loss, magnitude, norm, guided.squeeze(1) if student.ndim == 4 else guided)


def loss_of(inputs: Inputs, backend: str) -> Tensor:
    """The loss alone: in one pass, or step by step where the convention asks for it."""
    if not inputs.convention.fusable:
        return _stepwise.loss_and_terms(inputs, backend, False)[0]
    if is_traced(inputs.student):
        return _traced(inputs, False, backend)[0][0]
    return _Loss.apply(inputs.student, inputs, backend)


def _fused_terms(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, mean|g|, norms) in one pass; only the loss has a gradient."""
    if is_traced(inputs.student):
        values, norm = _traced(inputs, True, backend)
        loss, size = values.unbind()
        return loss, size.detach(), norm.detach()
    return _Terms.apply(inputs.student, inputs, backend)


def _traced(inputs: Inputs, magnitude: bool, backend: str) -> tuple[Tensor, Tensor]:
    values, norm, _ = torch.ops.codmd.dmd_loss(*_dmd_inputs.traced(inputs), magnitude, backend)
    return values, norm


def _forward(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    noisy: Tensor | None,
    sigma: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    layout: str,
    convention: str,
    real_scale: float,
    fake_scale: float,
    magnitude: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [2] = loss and mean|g|, norms, factors) of a traced call."""
    return _dmd_backend.select(backend, student).dmd_forward(
        student, fake, real, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight, layout,
        conventions.decode(convention), real_scale, fake_scale, magnitude,
    )  # fmt: skip


def _eager_forward(ctx: Any, inputs: Inputs, magnitude: bool, backend: str) -> tuple[Tensor, Tensor]:
    """(values [2] = loss and mean|g|, norms); what the backward pass needs goes to ``ctx``."""
    student = inputs.student
    run = _dmd_backend.select(backend, student)
    values, norms, factors = run.dmd_forward(*inputs.fused, magnitude)
    ctx.save_for_backward(*inputs[1:5], inputs.sigma, inputs.mask, norms, factors)
    shape = student.shape
    ctx.student = run, shape, gradient_strides(student), student.dtype
    ctx.options = inputs.fused[9:]
    return values, norms


def _eager_backward(ctx: Any, grad: Tensor) -> Tensor:
    run, shape, strides, dtype = ctx.student
    out = empty_gradient(shape, strides, dtype, grad.device)
    run.dmd_backward(out, grad, *ctx.saved_tensors, *ctx.options)
    return out


class _Loss(EagerFunction):
    """The loss alone: one output costs the eager call less than three."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, inputs: Inputs, backend: str) -> Tensor:
        return _eager_forward(ctx, inputs, False, backend)[0][0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _eager_backward(ctx, grad), None, None


class _Terms(EagerFunction):
    @staticmethod
    def forward(ctx: Any, student: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        values, norms = _eager_forward(ctx, inputs, True, backend)
        loss, size = values.unbind()
        ctx.mark_non_differentiable(size, norms)
        return loss, size, norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _eager_backward(ctx, grad), None, None


LATENTS = (
    "Tensor student, Tensor fake, Tensor real, Tensor? real_uncond, Tensor? fake_uncond, Tensor? noisy, "
    "Tensor? sigma, Tensor? mask, Tensor? sample_weight"
)
OPTIONS = "str layout, str convention, float real_scale, float fake_scale"
SAVED = (
    "Tensor fake, Tensor real, Tensor? real_uncond, Tensor? fake_uncond, Tensor? sigma, Tensor? mask, "
    "Tensor norms, Tensor factors"
)
STUDENT = "SymInt[] size, SymInt[] stride, ScalarType dtype"

_dmd_loss = torch.library.custom_op(
    "codmd::dmd_loss",
    _forward,
    mutates_args=(),
    schema=f"({LATENTS}, {OPTIONS}, bool magnitude, str backend) -> (Tensor, Tensor, Tensor)",
)


def empty_moments(student: Tensor, layout: str, convention: str) -> tuple[Tensor, Tensor, Tensor]:
    """Fake (values, norms, factors)."""
    rule, dtype = conventions.decode(convention), reference.compute_dtype(student.dtype)
    samples, frames = student.shape[0], student.shape[1 if layout == "bfchw" else 2]
    shapes = {"sample": (samples,), "batch": (1,), "block": (samples, len(rule.segments(frames)) - 1)}
    norms = student.new_empty(shapes[rule.norm_scope], dtype=dtype)
    return student.new_empty(2, dtype=dtype), norms, student.new_empty(samples, dtype=dtype)


@_dmd_loss.register_fake
def _(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_moments(student, arguments[8], arguments[9])


@torch.library.custom_op(
    "codmd::dmd_loss_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {SAVED}, {STUDENT}, {OPTIONS}, str backend) -> Tensor",
)
def _dmd_loss_backward(grad: Tensor, *arguments: Any) -> Tensor:
    saved, (size, stride, dtype), (layout, convention, real_scale, fake_scale, backend) = (
        arguments[:8],
        arguments[8:11],
        arguments[11:],
    )
    out = torch.empty_strided(size, stride, dtype=dtype, device=grad.device)
    _dmd_backend.select(backend, out).dmd_backward(
        out, grad, *saved, layout, conventions.decode(convention), real_scale, fake_scale
    )
    return out


@_dmd_loss_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> Tensor:
    size, stride, dtype = arguments[8:11]
    return torch.empty_strided(size, stride, dtype=dtype, device=grad.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, *others = inputs[:9]
    _, norms, factors = output
    ctx.save_for_backward(*others[:4], *others[5:7], norms, factors)
    ctx.student = list(student.shape), list(dense_strides(student.shape, student.stride())), student.dtype
    ctx.options = *inputs[9:13], inputs[14]
    ctx.set_materialize_grads(False)


def _traced_backward(ctx: Any, grad_values: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_values is None:
        return (None,) * 15
    grad = torch.ops.codmd.dmd_loss_backward(grad_values[0], *ctx.saved_tensors, *ctx.student, *ctx.options)
    return grad, *[None] * 14


_dmd_loss.register_autograd(_traced_backward, setup_context=_setup_context)
