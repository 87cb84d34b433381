"""``codmd_loss``: distribution matching plus λ times the relation term, from one read of the latents.

The pass that sums the DMD moments also pools the features of student, guided real and fake; the backward pass writes
the gradient of both terms at once. Nothing the size of a latent is kept but the inputs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from codmd import backends, conventions, distributed
from codmd.conventions import Convention
from codmd.ops import _checks, _dmd_backend, _dmd_inputs, _stepwise
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
from codmd.ops._dmd_inputs import Inputs
from codmd.ops.dmd import LATENTS, OPTIONS, SAVED, STUDENT, empty_moments, loss_of
from codmd.ops.relation import relation_loss
from codmd.reference.relation import Pool


class CodmdTerms(NamedTuple):
    """What ``codmd_loss(..., return_terms=True)`` returns: 0-dim tensors, each with its own gradient.

    ``total`` = dmd + relation_weight · (batch_weight · batch + frame_weight · frame).
    """

    total: Tensor
    dmd: Tensor
    batch: Tensor
    frame: Tensor


class _Relation(NamedTuple):
    """The relation's options in schema order."""

    frame_mask: Tensor | None
    grid: list[int] | None
    temperature: float
    relation_weight: float
    batch_weight: float
    frame_weight: float
    group_name: str
    batch_grad: str


def codmd_loss(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None = None,
    guidance: float = 3.5,
    relation_weight: float = 0.1,
    *,
    fake_uncond: Tensor | None = None,
    fake_guidance: float | None = None,
    convention: str | Convention = "self_forcing",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    temperature: float = 0.1,
    batch_weight: float = 1.0,
    frame_weight: float = 1.0,
    layout: str | None = None,
    pool: Pool = "mean",
    frame_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    batch_grad: str = "global",
    prediction: str = "x0",
    noisy: Tensor | None = None,
    sigma: Tensor | None = None,
    backend: str = "auto",
    return_terms: bool = False,
) -> Tensor | CodmdTerms:
    """The objective of CoDMD, ``dmd_loss + relation_weight * relation_loss``, in one pass.

    Equal to the sum of the two operators within rounding. ``pool=None`` and conventions that cannot be fused
    (``arithmetic`` other than ``"float32"``) are composed of the two operators; the guided predictions are then
    materialised in the student's dtype.

    Args:
        student, fake, real, real_uncond, fake_uncond, guidance, fake_guidance, convention, mask, sample_weight,
            layout, prediction, noisy, sigma, backend: as in :func:`codmd.ops.dmd_loss`. ``mask`` and ``sample_weight``
            concern the DMD term alone.
        relation_weight: λ, >= 0; the relation is that of student, guided real and guided fake. At 0 it is not computed.
        temperature, batch_weight, frame_weight, pool, frame_mask, group, batch_grad: as in
            :func:`codmd.ops.relation_loss`. ``frame_mask`` concerns the relation alone.
        return_terms: return :class:`CodmdTerms`.

    Returns:
        The 0-dim total, or its terms; float32, or float64 where ``dmd_loss`` is. Images (``"bchw"``) have no frame
        term.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. ``RuntimeError`` on a second
            differentiation.

    Source: CoDMD, arXiv 2606.21982, the total objective; DMD, arXiv 2311.18828.
    """
    inputs = _dmd_inputs.check(
        student, fake, real, real_uncond, fake_uncond, guidance, fake_guidance, convention, mask, sample_weight,
        layout, prediction, noisy, sigma, backend,
    )  # fmt: skip
    _checks.check_frame_mask(frame_mask, inputs.student, inputs.layout)
    relation = _Relation(
        frame_mask,
        _checks.check_pool(pool, inputs.layout, inputs.student.shape),
        *_numbers(temperature, relation_weight, batch_weight, frame_weight, batch_grad),
        group_name_of(group),
        batch_grad,
    )
    if not inputs.convention.fusable or relation.grid is None or not relation.relation_weight:
        terms = _composed(inputs, relation, group, backend)
    elif is_traced(student):
        stacked, *_ = torch.ops.codmd.codmd_loss(*_dmd_inputs.traced(inputs), *relation, backend)
        terms = CodmdTerms(*stacked.unbind())
    elif return_terms:
        terms = CodmdTerms(*_Terms.apply(inputs.student, inputs, relation, backend))
    else:
        return _Total.apply(inputs.student, inputs, relation, backend)
    return terms if return_terms else terms.total


@remembered
def _numbers(
    temperature: float, relation_weight: float, batch_weight: float, frame_weight: float, batch_grad: str
) -> tuple[float, float, float, float]:
    _checks.check_one_of("batch_grad", batch_grad, ("global", "local"))
    return (
        _checks.check_positive("temperature", temperature),
        _checks.check_weight("relation_weight", relation_weight),
        _checks.check_weight("batch_weight", batch_weight),
        _checks.check_weight("frame_weight", frame_weight),
    )


def _composed(inputs: Inputs, relation: _Relation, group: dist.ProcessGroup | None, backend: str) -> CodmdTerms:
    dmd = loss_of(inputs, backend)
    if not relation.relation_weight:
        return CodmdTerms(dmd, dmd, dmd.new_zeros(()), dmd.new_zeros(()))
    found = relation_loss(
        inputs.student,
        _stepwise.guided(_stepwise.teacher_prediction, inputs),
        _stepwise.guided(_stepwise.critic_prediction, inputs),
        relation.temperature,
        relation.batch_weight,
        relation.frame_weight,
        inputs.layout,
        pool_of(relation.grid),
        relation.frame_mask,
        group,
        relation.batch_grad,
        backend,
        return_terms=True,
    )
    assert isinstance(found, tuple)
    total, batch, frame = found
    return CodmdTerms(dmd + relation.relation_weight * total, dmd, batch, frame)


def _forward(
    run: ModuleType, inputs: tuple[Any, ...], relation: _Relation, backend: str, separate: bool
) -> tuple[Tensor | CodmdTerms, Tensor, Tensor, Tensor, Tensor]:
    """(terms, [4] where the backend computes them in its own passes; norms, factors, frame and batch gradient).

    Unless ``separate``, a backend may return them as pieces of one allocation that only its own backward pass reads.
    """
    student = inputs[0]
    group = distributed.resolve(relation.group_name) if relation.group_name and relation.batch_weight else None
    ranks = 1 if group is None else group.size()
    features = relation.frame_mask, pool_of(relation.grid), relation.temperature
    weights = relation[3:6]
    if ranks == 1 and hasattr(run, "codmd_terms"):
        found = run.codmd_terms(inputs, *features, *weights, separate)
        if found is not None:
            return found
    first = 0 if group is None else group.rank() * len(student)
    scale = distributed.gradient_scale(relation.batch_grad, ranks)
    if ranks > 1 and hasattr(run, "codmd_rows"):
        pending = run.codmd_rows(inputs, *features, relation.frame_weight, ranks)
        if pending is not None:
            gathered = distributed.gather_rows(pending.rows, relation.group_name)
            return run.codmd_gathered(pending, gathered, first, *weights, scale)
    related = bool(relation.batch_weight) and ranks * len(student) > 1
    values, norms, factors, frame, frame_grad, rows = run.codmd_forward(
        *inputs, False, *features, relation.frame_weight, related
    )
    if not related:
        batch, batch_grad = frame.new_zeros(()), frame.new_empty(0)
        weighted, share = frame[0], relation.frame_weight
    else:
        gathered = rows if ranks == 1 else distributed.gather_rows(rows, relation.group_name)
        terms, batch_grad = backends.select(backend, student).relation_batch(
            gathered, frame, first, len(rows), relation.temperature, *weights[1:], scale
        )
        weighted, batch, _ = terms.unbind()
        share = 1.0
    total = torch.add(values[0], weighted, alpha=relation.relation_weight * share)
    return CodmdTerms(total, values[0], batch, frame[0]), norms, factors, frame_grad, batch_grad


def _eager_forward(ctx: Any, inputs: Inputs, relation: _Relation, backend: str) -> Tensor | CodmdTerms:
    """The terms; what the backward pass needs goes to ``ctx``."""
    fused, student = inputs.fused, inputs.student
    run = _dmd_backend.select(backend, student)
    # What is found beside the terms is neither input nor output of the graph: ctx may hold it and makes no cycle.
    terms, *ctx.found = _forward(run, fused, relation, backend, False)
    ctx.save_for_backward(*inputs[1:5], inputs.sigma, inputs.mask, relation.frame_mask)
    ctx.student = run, student.shape, gradient_strides(student), student.dtype
    ctx.options = *fused[9:], pool_of(relation.grid), *relation[3:6]
    ctx.set_materialize_grads(False)
    return terms


def _eager_backward(ctx: Any, *gradients: Tensor | None) -> Tensor:
    run, shape, strides, dtype = ctx.student
    saved = ctx.saved_tensors
    out = empty_gradient(shape, strides, dtype, saved[0].device)
    run.codmd_backward(out, *gradients, *saved, *ctx.found, *ctx.options)
    return out


class _Total(EagerFunction):
    """The total alone: one output costs the eager call less than four."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, inputs: Inputs, relation: _Relation, backend: str) -> Tensor:
        return _eager_forward(ctx, inputs, relation, backend)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None if total is None else _eager_backward(ctx, total, None, None, None)), None, None, None


class _Terms(EagerFunction):
    @staticmethod
    def forward(ctx: Any, student: Tensor, inputs: Inputs, relation: _Relation, backend: str) -> tuple[Tensor, ...]:
        return tuple(_eager_forward(ctx, inputs, relation, backend))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = any(grad is not None for grad in gradients)
        return (_eager_backward(ctx, *gradients) if wanted else None), None, None, None


_RELATION = (
    "Tensor? frame_mask, int[]? grid, float temperature, float relation_weight, float batch_weight, "
    "float frame_weight, str group_name, str batch_grad"
)


def _traced_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, relation, backend = arguments[:13], _Relation(*arguments[13:21]), arguments[21]
    run = _dmd_backend.select(backend, inputs[0])
    terms, *rest = _forward(run, (*inputs[:10], conventions.decode(inputs[10]), *inputs[11:]), relation, backend, True)
    norms, factors, frame_grad, batch_grad = rest
    stacked = terms if isinstance(terms, Tensor) else torch.stack(list(terms))
    return stacked, norms, factors, frame_grad, batch_grad


_codmd_loss = torch.library.custom_op(
    "codmd::codmd_loss",
    _traced_forward,
    mutates_args=(),
    schema=f"({LATENTS}, {OPTIONS}, {_RELATION}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_codmd_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student, layout, convention, relation = arguments[0], arguments[9], arguments[10], _Relation(*arguments[13:21])
    _, norms, factors = empty_moments(student, layout, convention)
    samples, frames, channels = student.shape[:3] if layout == "bfchw" else student.shape[:3:2] + student.shape[1:2]
    assert relation.grid is not None
    features = channels * relation.grid[0] * relation.grid[1]
    ranks = distributed.resolve(relation.group_name).size() if relation.group_name else 1
    frame_shape = (samples, frames, features) if relation.frame_weight and frames > 1 else (0,)
    batch_shape = (samples, features) if relation.batch_weight and ranks * samples > 1 else (0,)
    return factors.new_empty(4), norms, factors, factors.new_empty(frame_shape), factors.new_empty(batch_shape)


@torch.library.custom_op(
    "codmd::codmd_loss_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_terms, {SAVED.replace('Tensor norms', 'Tensor? frame_mask, Tensor norms')}, Tensor frame_grad, "
        f"Tensor batch_grad, {STUDENT}, {OPTIONS}, int[] grid, float relation_weight, float batch_weight, "
        "float frame_weight, str backend) -> Tensor"
    ),
)
def _codmd_loss_backward(grad_terms: Tensor, *arguments: Any) -> Tensor:
    saved, (size, stride, dtype), options = arguments[:11], arguments[11:14], arguments[14:18]
    out = torch.empty_strided(size, stride, dtype=dtype, device=grad_terms.device)
    rule = options[0], conventions.decode(options[1]), *options[2:]
    grid, weights, backend = arguments[18], arguments[19:22], arguments[22]
    _dmd_backend.select(backend, out).codmd_backward(out, *grad_terms.unbind(), *saved, *rule, pool_of(grid), *weights)
    return out


@_codmd_loss_backward.register_fake
def _(grad_terms: Tensor, *arguments: Any) -> Tensor:
    size, stride, dtype = arguments[11:14]
    return torch.empty_strided(size, stride, dtype=dtype, device=grad_terms.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, relation = inputs[0], _Relation(*inputs[13:21])
    ctx.save_for_backward(*inputs[1:5], *inputs[6:8], relation.frame_mask, *output[1:])
    ctx.student = list(student.shape), list(dense_strides(student.shape, student.stride())), student.dtype
    ctx.options = *inputs[9:13], relation.grid, *relation[3:6], inputs[21]
    ctx.set_materialize_grads(False)


def _traced_backward(ctx: Any, grad_terms: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_terms is None:
        return (None,) * 22
    grad = torch.ops.codmd.codmd_loss_backward(grad_terms, *ctx.saved_tensors, *ctx.student, *ctx.options)
    return grad, *[None] * 21


_codmd_loss.register_autograd(_traced_backward, setup_context=_setup_context)
