"""``dmd_loss`` and ``codmd_loss``: distribution matching (arXiv 2311.18828), alone or with the relation term.

The forward pass reads the latents once: it sums the DMD moments and, for ``codmd_loss``, pools the features of
student, guided real and fake. The backward pass reads the predictions again and writes the gradient of both terms at
once. Conventions that no single pass can serve run step by step on the reference.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch.distributed as dist
from torch import Tensor

from codmd import reference
from codmd.conventions import Convention
from codmd.ops import checks, emulation, objective_checks
from codmd.ops.checks import Number
from codmd.ops.contract import Objective, Upstream
from codmd.ops.objective_checks import Options
from codmd.ops.operator import Operator, name_of
from codmd.ops.relation import relation_loss
from codmd.reference.relation import Pool


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


class CodmdTerms(NamedTuple):
    """What ``codmd_loss(..., return_terms=True)`` returns: 0-dim tensors, each with its own gradient.

    ``total`` = dmd + relation_weight · (batch_weight · batch + frame_weight · frame).
    """

    total: Tensor
    dmd: Tensor
    batch: Tensor
    frame: Tensor


def _upstream(
    total: Tensor | None,
    dmd: Tensor | None = None,
    batch: Tensor | None = None,
    frame: Tensor | None = None,
    *_magnitude_and_norms: Tensor | None,
) -> Upstream:
    return Upstream(total, dmd, batch, frame)


OBJECTIVE = Operator(
    "objective",
    Objective,
    kept=(
        "real",
        "fake",
        "real_uncond",
        "fake_uncond",
        "sigma",
        "mask",
        "frame_mask",
        "augment_real",
        "augment_uncond",
    ),
    found=("terms", "norms", "factors", "frame_grad", "batch_grad"),
    local=lambda run, call, separate: run.objective(call, separate),
    gradient=lambda run, *arguments: run.gradient(*arguments),
    upstream=_upstream,
)


# fmt: off
@overload
def dmd_loss(
    student: Tensor, *, real: Tensor, fake: Tensor, real_uncond: Tensor | None = ..., fake_uncond: Tensor | None = ...,
    guidance: Number = ..., fake_guidance: Number | None = ..., convention: str | Convention = ...,
    mask: Tensor | None = ..., sample_weight: Tensor | None = ..., layout: str | None = ..., prediction: str = ...,
    noisy: Tensor | None = ..., sigma: Tensor | None = ..., augment_real: Tensor | None = ...,
    augment_uncond: Tensor | None = ..., backend: str = ..., return_terms: Literal[False] = ...,
    return_real: Literal[False] = ...,
) -> Tensor: ...
@overload
def dmd_loss(
    student: Tensor, *, real: Tensor, fake: Tensor, real_uncond: Tensor | None = ..., fake_uncond: Tensor | None = ...,
    guidance: Number = ..., fake_guidance: Number | None = ..., convention: str | Convention = ...,
    mask: Tensor | None = ..., sample_weight: Tensor | None = ..., layout: str | None = ..., prediction: str = ...,
    noisy: Tensor | None = ..., sigma: Tensor | None = ..., augment_real: Tensor | None = ...,
    augment_uncond: Tensor | None = ..., backend: str = ..., return_terms: Literal[True],
    return_real: bool = ...,
) -> DmdTerms: ...
# fmt: on
def dmd_loss(
    student: Tensor,
    *,
    real: Tensor,
    fake: Tensor,
    real_uncond: Tensor | None = None,
    fake_uncond: Tensor | None = None,
    guidance: Number = 3.5,
    fake_guidance: Number | None = None,
    convention: str | Convention = "self_forcing",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    layout: str | None = None,
    prediction: str = "x0",
    noisy: Tensor | None = None,
    sigma: Tensor | None = None,
    augment_real: Tensor | None = None,
    augment_uncond: Tensor | None = None,
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
        real: the teacher's (conditional) prediction, like ``student``, without gradient.
        fake: the critic's prediction, like ``student``, without gradient.
        real_uncond: the teacher's unconditional prediction; ``None`` means that ``real`` is used as it is.
        fake_uncond: the critic's unconditional prediction, likewise.
        guidance: scale of the teacher's guidance *in the convention's form*; see :meth:`Convention.guidance_scale`. A
            Python number or a 0-dim tensor, as the numbers of :func:`codmd.ops.relation_loss`.
        fake_guidance: scale of the critic's guidance; ``None`` means ``guidance``.
        convention: a name, an instance of :mod:`codmd.conventions`, or a ``replace`` of one.
        mask: boolean, broadcastable to ``student``; ``True`` selects. The mean is over the selected elements; nothing
            selected gives 0 and a zero gradient. The norm is over all elements.
        sample_weight: ``[B]``, multiplies each sample's loss (under ``fastgen`` and ``modelopt``: its g).
        layout: ``None`` means the convention's.
        prediction: ``"x0"``, or ``"flow"``: the predictions are velocities v and x0 = noisy - sigma·v.
        noisy: x_t, like ``student``; for ``"flow"``.
        sigma: noise level, ``[B]`` or ``[B, F]``; for ``"flow"``.
        augment_real, augment_uncond: for the decoupled loss, the teacher's conditional and unconditional x0 predictions
            c₂ and u₂ at a second noise level: g = (f - c₁)/mean|x - c₁| - k(c₂ - u₂)/mean|x - c₂|, where ``real`` is
            the unguided c₁ and k the guidance in the cond form (the paper's w is k + 1).
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.
        return_terms: return :class:`DmdTerms`: mean|g| and the norms come from the same pass.
        return_real: the terms also hold the guided ``real``; a pass of its own writes it.

    Returns:
        The 0-dim loss: float32, or float64 where inputs or the convention's reduction are float64. A non-finite
        student gives a non-finite loss; a non-finite prediction does what the convention's NaN policy says.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. ``RuntimeError`` on a second
            differentiation.

    Source: DMD, arXiv 2311.18828, equations 7 and 8; decoupled: arXiv 2511.22677. The conventions' codebases are listed
    in ``docs/conventions.md``.
    """
    options = objective_checks.options(convention, layout, guidance, fake_guidance, prediction, backend)
    latents = student, real, fake, real_uncond, fake_uncond, noisy, augment_real, augment_uncond
    call, _ = objective_checks.call_of(options, latents, mask, sample_weight, sigma, prediction)
    if not return_terms:
        if return_real:
            raise ValueError("return_real=True needs return_terms=True: the guided real is one of the terms")
        return _dmd_loss(call, options, backend)
    if call.convention.fusable:
        _, loss, _, _, magnitude, norm = OBJECTIVE.terms(call, options.gather, backend)
        magnitude, norm = magnitude.detach(), norm if augment_real is None else norm.unbind()[0]
    else:
        loss, magnitude, norm = emulation.loss_and_terms(call, options, backend, True)
    if not return_real:
        return DmdTerms(loss, magnitude, norm, None)
    guided = emulation.guided(emulation.teacher_prediction, call, options)
    return DmdTerms(loss, magnitude, norm, guided.squeeze(1) if student.ndim == 4 else guided)


def _dmd_loss(call: Objective, options: Options, backend: str) -> Tensor:
    """The loss of a call without a relation: in one pass, or step by step where the convention asks for it."""
    if not call.convention.fusable:
        return emulation.loss_and_terms(call, options, backend, False)[0]
    return OBJECTIVE(call, options.gather, backend)


# fmt: off
@overload
def codmd_loss(
    student: Tensor, *, real: Tensor, fake: Tensor, real_uncond: Tensor | None = ..., guidance: Number = ...,
    relation_weight: Number = ..., fake_uncond: Tensor | None = ..., fake_guidance: Number | None = ...,
    convention: str | Convention = ..., mask: Tensor | None = ..., sample_weight: Tensor | None = ...,
    temperature: Number = ..., batch_weight: Number = ..., frame_weight: Number = ..., layout: str | None = ...,
    pool: Pool = ..., frame_mask: Tensor | None = ..., group: dist.ProcessGroup | None = ..., batch_grad: str = ...,
    prediction: str = ..., noisy: Tensor | None = ..., sigma: Tensor | None = ..., augment_real: Tensor | None = ...,
    augment_uncond: Tensor | None = ..., backend: str = ...,
    return_terms: Literal[False] = ..., relation_features: str = ...,
) -> Tensor: ...
@overload
def codmd_loss(
    student: Tensor, *, real: Tensor, fake: Tensor, real_uncond: Tensor | None = ..., guidance: Number = ...,
    relation_weight: Number = ..., fake_uncond: Tensor | None = ..., fake_guidance: Number | None = ...,
    convention: str | Convention = ..., mask: Tensor | None = ..., sample_weight: Tensor | None = ...,
    temperature: Number = ..., batch_weight: Number = ..., frame_weight: Number = ..., layout: str | None = ...,
    pool: Pool = ..., frame_mask: Tensor | None = ..., group: dist.ProcessGroup | None = ..., batch_grad: str = ...,
    prediction: str = ..., noisy: Tensor | None = ..., sigma: Tensor | None = ..., augment_real: Tensor | None = ...,
    augment_uncond: Tensor | None = ..., backend: str = ...,
    return_terms: Literal[True], relation_features: str = ...,
) -> CodmdTerms: ...
# fmt: on
def codmd_loss(
    student: Tensor,
    *,
    real: Tensor,
    fake: Tensor,
    real_uncond: Tensor | None = None,
    guidance: Number = 3.5,
    relation_weight: Number = 0.1,
    fake_uncond: Tensor | None = None,
    fake_guidance: Number | None = None,
    convention: str | Convention = "self_forcing",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    temperature: Number = 0.1,
    batch_weight: Number = 1.0,
    frame_weight: Number = 1.0,
    layout: str | None = None,
    pool: Pool = "mean",
    frame_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    batch_grad: str = "global",
    prediction: str = "x0",
    noisy: Tensor | None = None,
    sigma: Tensor | None = None,
    augment_real: Tensor | None = None,
    augment_uncond: Tensor | None = None,
    backend: str = "auto",
    return_terms: bool = False,
    relation_features: str = "level",
) -> Tensor | CodmdTerms:
    """The objective of CoDMD, ``dmd_loss + relation_weight * relation_loss``, in one pass.

    Equal to the sum of the two operators within rounding. ``pool=None``, motion features and conventions that cannot be
    fused (``arithmetic`` other than ``"float32"``) are composed of the two operators; the guided predictions are then
    materialised in the student's dtype.

    Args:
        student, real, fake, real_uncond, fake_uncond, guidance, fake_guidance, convention, mask, sample_weight,
            layout, prediction, noisy, sigma, augment_real, augment_uncond, backend: as in
            :func:`codmd.ops.dmd_loss`. ``mask`` and ``sample_weight`` concern the DMD term alone.
        relation_weight: λ, >= 0; the relation is that of student, guided real and guided fake. At 0 it is not computed.
        temperature, batch_weight, frame_weight, pool, frame_mask, group, batch_grad, relation_features: as in
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
    options = objective_checks.options(
        convention, layout, guidance, fake_guidance, prediction, backend, temperature, batch_weight, frame_weight,
        relation_weight, batch_grad,
    )  # fmt: skip
    checks.check_one_of("relation_features", relation_features, reference.FEATURES)
    latents = student, real, fake, real_uncond, fake_uncond, noisy, augment_real, augment_uncond
    call, grid = objective_checks.call_of(options, latents, mask, sample_weight, sigma, prediction, frame_mask, pool)
    if not call.related:
        dmd = _dmd_loss(call, options, backend)
        return CodmdTerms(dmd, dmd, dmd.new_zeros(()), dmd.new_zeros(())) if return_terms else dmd
    moving = call.frame and relation_features != "level"
    if grid is None or moving or not call.convention.fusable:
        dmd = _dmd_loss(call._replace(related=False, batch=False, frame=False), options, backend)
        relation = relation_loss(
            call.student,
            emulation.guided(emulation.teacher_prediction, call, options),
            emulation.guided(emulation.critic_prediction, call, options),
            temperature, batch_weight, frame_weight, call.layout, grid, frame_mask, group, batch_grad, backend,
            return_terms=True, relation_features=relation_features,
        )  # fmt: skip
        total = dmd + options.relation_weight * relation.total
        return CodmdTerms(total, dmd, relation.batch, relation.frame) if return_terms else total
    gather = options.gather if group is None else options.gather._replace(group=name_of(group))
    if not return_terms:
        return OBJECTIVE(call, gather, backend)
    total, dmd, batch_term, frame_term, _, _ = OBJECTIVE.terms(call, gather, backend)
    return CodmdTerms(total, dmd, batch_term, frame_term)
