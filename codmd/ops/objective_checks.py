"""Argument checks shared by ``dmd_loss`` and ``codmd_loss``, and their canonical form."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from codmd import backends, conventions, reference
from codmd.conventions import Convention
from codmd.ops import checks
from codmd.ops.checks import Number
from codmd.reference.dmd import check_augmentation

LAYOUTS = ("bfchw", "bcfhw", "bchw")
PREDICTIONS = ("x0", "flow")
LATENTS = ("student", "real", "fake", "real_uncond", "fake_uncond", "noisy", "augment_real", "augment_uncond")


class Inputs(NamedTuple):
    """Checked arguments. Latents have five axes in ``layout`` and ``sigma`` is ``[B, F]``.

    The tensors are those of :class:`codmd.ops.contract.Objective`. ``real_scale`` and ``fake_scale`` are in the cond
    form, ``guidance`` and ``fake_guidance`` in the convention's own.
    """

    student: Tensor
    real: Tensor
    fake: Tensor
    real_uncond: Tensor | None
    fake_uncond: Tensor | None
    noisy: Tensor | None
    sigma: Tensor | None
    mask: Tensor | None
    sample_weight: Tensor | None
    augment_real: Tensor | None
    augment_uncond: Tensor | None
    layout: str
    convention: Convention
    real_scale: Number
    fake_scale: Number
    guidance: Number
    fake_guidance: Number


def check(
    latents: tuple[Any, ...],
    guidance: Number,
    fake_guidance: Number | None,
    convention: str | Convention,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    layout: str | None,
    prediction: str,
    sigma: Tensor | None,
    backend: str,
) -> Inputs:
    """Raise ``TypeError`` or ``ValueError`` naming the argument, or return the canonical form.

    Args:
        latents: in the order of ``LATENTS``.
    """
    rule, layout, (real_scale, fake_scale, real_guidance, fake_guidance) = _options(
        convention, layout, guidance, fake_guidance, prediction, backend
    )
    student, real, fake, real_uncond, fake_uncond, noisy, augment_real, augment_uncond = latents
    if augment_real is not None or augment_uncond is not None:
        check_augmentation(augment_real, augment_uncond, real_uncond, prediction)
        if rule.undecouplable:
            raise ValueError(f"augment_real does not go with this convention: {rule.undecouplable}")
    images = layout == "bchw"
    others = (real, fake, real_uncond, fake_uncond, noisy, augment_real, augment_uncond)
    if images or fake is None or real is None or not checks.plainly_match(student, others):
        given = _latents(latents, layout)
        student, real, fake, real_uncond, fake_uncond, noisy, augment_real, augment_uncond = given
        layout = "bfchw" if images else layout
    if rule.guided_above is not None:
        real_uncond = _read_where_guided(real_uncond, real_scale)
        fake_uncond = _read_where_guided(fake_uncond, fake_scale)
    if prediction != "x0" or noisy is not None or sigma is not None:
        sigma = _sigma(prediction, noisy, sigma, student, layout, rule)
    if mask is not None:
        mask = _mask(mask, student, images)
    if sample_weight is not None:
        sample_weight = _sample_weight(sample_weight, student, rule)
    return Inputs(
        student, real, fake, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight, augment_real, augment_uncond,
        layout, rule, real_scale, fake_scale, real_guidance, fake_guidance,
    )  # fmt: skip


def _read_where_guided(uncond: Tensor | None, scale: Number) -> Tensor | None:
    """``uncond``, or None at a scale that does not guide: its NaN would reach the loss as 0·NaN."""
    return uncond if isinstance(scale, Tensor) or scale != 0 else None


@checks.remembered
def _options(
    convention: str | Convention,
    layout: str | None,
    guidance: Number,
    fake_guidance: Number | None,
    prediction: str,
    backend: str,
) -> tuple[Convention, str, tuple[Number, Number, Number, Number]]:
    """The convention, the layout, and the scales of :class:`Inputs`; raises where an option is not as described."""
    rule = conventions.resolve(convention)
    layout = rule.layout if layout is None else layout
    checks.check_one_of("layout", layout, LAYOUTS)
    checks.check_one_of("prediction", prediction, PREDICTIONS)
    real = checks.check_number("guidance", guidance)
    fake = real if fake_guidance is None else checks.check_number("fake_guidance", fake_guidance)
    backends.check_name(backend)
    return rule, layout, (rule.cond_scale(real), rule.cond_scale(fake), real, fake)


def _latents(given: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    """The latents with five axes; raises where one is not as described."""
    student, real, fake, *_ = given
    checks.check_memory("student", student)
    axes = 4 if layout == "bchw" else 5
    if student.ndim != axes:
        raise ValueError(
            f"student must have {axes} axes for layout={layout!r}, got shape {tuple(student.shape)}; "
            f"pass layout= one of {', '.join(LAYOUTS)} when the convention's default is another"
        )
    for name, value in (("real", real), ("fake", fake)):
        if value is None:
            raise TypeError(f"{name} must be a torch.Tensor, got NoneType")
    for name, value in zip(LATENTS, given, strict=True):
        if value is not None:
            checks.check_memory(name, value)
    if layout == "bchw":
        given = tuple(v.unsqueeze(1) if v is not None and v.ndim == 4 else v for v in given)
    checks.check_latents(**dict(zip(LATENTS, given, strict=True)))
    return given


def _sigma(
    prediction: str,
    noisy: Tensor | None,
    sigma: Tensor | None,
    student: Tensor,
    layout: str,
    convention: Convention,
) -> Tensor | None:
    if prediction == "x0":
        for name, value in (("noisy", noisy), ("sigma", sigma)):
            if value is not None:
                raise ValueError(f'{name} is used with prediction="flow" alone, got it with prediction="x0"')
        return None
    for name, value in (("noisy", noisy), ("sigma", sigma)):
        if not isinstance(value, Tensor):
            raise TypeError(f'{name} must be a torch.Tensor with prediction="flow", got {type(value).__name__}')
    assert sigma is not None
    samples, frames = len(student), student.shape[1 if layout == "bfchw" else 2]
    _check_values("sigma", sigma, student)
    if sigma.shape not in ((samples,), (samples, frames)):
        raise ValueError(
            f"sigma must have shape (batch,) = ({samples},) or (batch, frames) = ({samples}, {frames}), "
            f"got {tuple(sigma.shape)}"
        )
    sigma = _fused(sigma, student, convention)
    return (sigma[:, None] if sigma.ndim == 1 else sigma).expand(samples, frames)


def _mask(mask: Any, student: Tensor, images: bool) -> Tensor:
    checks.check_mask("mask", mask, student, "selects an element")
    if images and mask.ndim == 4:
        mask = mask.unsqueeze(1)
    sizes = student.shape[student.ndim - mask.ndim :] if mask.ndim <= student.ndim else ()
    if len(sizes) != mask.ndim or any(m not in (1, s) for m, s in zip(mask.shape, sizes, strict=True)):
        raise ValueError(f"mask must broadcast to the shape of student {tuple(student.shape)}, got {tuple(mask.shape)}")
    return mask.expand(student.shape)


def _sample_weight(weight: Any, student: Tensor, convention: Convention) -> Tensor:
    _check_values("sample_weight", weight, student)
    if weight.shape != (len(student),):
        raise ValueError(f"sample_weight must have shape (batch,) = ({len(student)},), got {tuple(weight.shape)}")
    return _fused(weight, student, convention).contiguous()


def _fused(values: Tensor, student: Tensor, convention: Convention) -> Tensor:
    """In the dtype that the fused passes compute in; a convention that runs step by step keeps its own."""
    return values.to(reference.compute_dtype(student.dtype)) if convention.fusable else values


def _check_values(name: str, value: Any, student: Tensor) -> None:
    checks.check_memory(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    checks.check_beside(name, value, student)
