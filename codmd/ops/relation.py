"""``relation_loss`` and ``relation_matrix``: the relation term of CoDMD (arXiv 2606.21982).

The forward pass computes the loss *and* its gradient at the level of features; the backward pass broadcasts that
gradient over the pixels, or applies it to them where every pixel is a feature.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from codmd import backends, reference
from codmd.ops import checks, motion
from codmd.ops.checks import Number
from codmd.ops.contract import Backend, Gather, Relation, Upstream
from codmd.ops.operator import Operator, name_of
from codmd.ops.scheduled import Given, given, placed
from codmd.reference.relation import Pool


class RelationTerms(NamedTuple):
    """What ``relation_loss(..., return_terms=True)`` returns: 0-dim tensors, each with its own gradient."""

    total: Tensor
    batch: Tensor
    frame: Tensor


def _gradient(run: Backend, *arguments: Any) -> None:
    run.gradient(*arguments)


def _whole_gradient(run: Backend, *arguments: Any) -> None:
    run.whole_gradient(*arguments)


def _upstream(total: Tensor | None, batch: Tensor | None = None, frame: Tensor | None = None) -> Upstream:
    return Upstream(total, None, batch, frame)


POOLED = Operator(
    "relation_loss",
    Relation,
    kept=("frame_mask",),
    found=("terms", "frame_grad", "batch_grad"),
    local=lambda run, call, separate: run.relation(call),
    gradient=_gradient,
    upstream=_upstream,
)
"""Features are means over regions: the backward pass reads no latent."""

WHOLE = Operator(
    "whole_relation_loss",
    Relation,
    kept=("student", "frame_mask"),
    found=("terms", "frame_grad", "batch_grad"),
    local=lambda run, call, separate: run.relation(call),
    gradient=_whole_gradient,
    upstream=_upstream,
)
"""Every pixel is a feature: ``pool=None``."""

MOTION = {
    (kind, whole): Operator(
        f"{kind}_{'whole_' if whole else ''}relation_loss",
        Relation,
        kept=("student", "frame_mask") if whole else ("frame_mask",),
        found=("terms", "frame_grad", "batch_grad"),
        local=partial(motion.frame_term, kind),
        gradient=_whole_gradient if whole else _gradient,
        upstream=_upstream,
    )
    for kind in reference.FEATURES[1:]
    for whole in (False, True)
}
"""The frame term of motion features, alone."""


# fmt: off
@overload
def relation_loss(
    student: Tensor, real: Tensor, fake: Tensor, temperature: Number = ..., batch_weight: Number = ...,
    frame_weight: Number = ..., layout: str = ..., pool: Pool = ..., frame_mask: Tensor | None = ...,
    group: dist.ProcessGroup | None = ..., batch_grad: str = ..., backend: str = ...,
    return_terms: Literal[False] = ..., relation_features: str = ...,
) -> Tensor: ...
@overload
def relation_loss(
    student: Tensor, real: Tensor, fake: Tensor, temperature: Number = ..., batch_weight: Number = ...,
    frame_weight: Number = ..., layout: str = ..., pool: Pool = ..., frame_mask: Tensor | None = ...,
    group: dist.ProcessGroup | None = ..., batch_grad: str = ..., backend: str = ..., *, return_terms: Literal[True],
    relation_features: str = ...,
) -> RelationTerms: ...
# fmt: on
def relation_loss(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    temperature: Number = 0.1,
    batch_weight: Number = 1.0,
    frame_weight: Number = 1.0,
    layout: str = "bfchw",
    pool: Pool = "mean",
    frame_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    batch_grad: str = "global",
    backend: str = "auto",
    return_terms: bool = False,
    relation_features: str = "level",
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
        temperature: τ of both softmaxes, > 0. This and the weights are Python numbers or 0-dim tensors. A tensor on
            the latents' device is loaded by the kernels (a captured CUDA graph can change it); it is not validated,
            and its term is computed whatever its value. One on the host is read as a number.
        batch_weight: weight of the batch term, >= 0; at 0 it is neither computed nor gathered.
        frame_weight: weight of the frame term, >= 0; at 0 it is not computed.
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
        relation_features: of the frame term: ``"level"``, the features themselves; ``"difference"``, φ[f+1] - φ[f],
            F - 1 rows, valid where both frames are; ``"centred"``, φ[f] less the mean over the valid frames. The batch
            term's are always the level's. Either transform runs apart from the batch term, in float64 on the pooled
            features; errors and gradient grow as ‖φ‖ over the norm of what is left of it.

    Returns:
        The 0-dim loss in float32 (float64 for float64 inputs), or its terms. Fewer than two frames (samples)
        make the frame (batch) term exactly 0. Non-finite inputs give a non-finite loss.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. ``RuntimeError`` on a
            second differentiation.

    Source: CoDMD, arXiv 2606.21982; gradients and the sound form in ``docs/mathematics.md``.
    """
    batch, frame, numbers, gather = _options(temperature, batch_weight, frame_weight, layout, batch_grad, backend)
    checks.check_one_of("relation_features", relation_features, reference.FEATURES)
    checks.check_latents((student, real, fake))
    grid = checks.check_pool(pool, student.shape)
    if frame_mask is not None:
        checks.check_frame_mask(frame_mask, student, layout)
    gather = gather if group is None else gather._replace(group=name_of(group))
    call = Relation(student, real, fake, frame_mask, layout, grid, batch, frame, placed(numbers, student))
    operator = WHOLE if grid is None else POOLED
    if frame and relation_features != "level":
        moving = MOTION[relation_features, grid is None].terms(call._replace(batch=False), gather, backend)
        if not batch:
            return RelationTerms(*moving) if return_terms else moving[0]
        still = operator.terms(call._replace(frame=False), gather, backend)
        total = still[0] + moving[0]
        return RelationTerms(total, still[1], moving[2]) if return_terms else total
    if return_terms:
        return RelationTerms(*operator.terms(call, gather, backend))
    return operator(call, gather, backend)


@checks.remembered
def _options(
    temperature: Number, batch_weight: Number, frame_weight: Number, layout: str, batch_grad: str, backend: str
) -> tuple[bool, bool, Given, Gather]:
    """Which terms are computed, the numbers, and the gather of one process; raises as :func:`relation_loss`."""
    checks.check_layout(layout)
    checks.check_one_of("batch_grad", batch_grad, ("global", "local"))
    backends.check_name(backend)
    batch, frame = checks.check_weight("batch_weight", batch_weight), checks.check_weight("frame_weight", frame_weight)
    numbers = given(checks.check_positive("temperature", temperature), batch, frame, 1.0, 0.0, 0.0)
    return checks.computed(batch), checks.computed(frame), numbers, Gather("", batch_grad)


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
    checks.check_layout(layout)
    checks.check_latents((latents,), "latents")
    checks.check_one_of("axis", axis, ("frame", "batch"))
    grid = checks.check_pool(pool, latents.shape)
    with torch.autocast(latents.device.type, enabled=False):
        features = reference.frame_features(latents, layout, grid)
        return reference.relation(features if axis == "frame" else reference.batch_features(features))
