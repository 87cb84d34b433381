"""Argument checks shared by ``dmd_loss`` and ``codmd_loss``, and their canonical form."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from codmd import backends, conventions, reference
from codmd.conventions import Convention
from codmd.ops import checks
from codmd.ops.checks import Number
from codmd.ops.contract import Gather, Grid, Objective
from codmd.ops.scheduled import Given, given, placed
from codmd.reference.dmd import check_augmentation
from codmd.reference.relation import Pool

LAYOUTS = ("bfchw", "bcfhw", "bchw")
PREDICTIONS = ("x0", "flow")


class Options(NamedTuple):
    """Checked options, which no latent changes; ``guidance`` and ``fake_guidance`` in the convention's form."""

    convention: Convention
    layout: str
    guidance: Number
    fake_guidance: Number
    real_scale: Number
    fake_scale: Number
    relation_weight: Number
    related: bool
    batch: bool
    frame: bool
    numbers: Given
    gather: Gather
    """Of one process."""


@checks.remembered
def options(
    convention: str | Convention,
    layout: str | None,
    guidance: Number,
    fake_guidance: Number | None,
    prediction: str,
    backend: str,
    temperature: Number = 1.0,
    batch_weight: Number = 0.0,
    frame_weight: Number = 0.0,
    relation_weight: Number = 0.0,
    batch_grad: str = "global",
) -> Options:
    """The options of ``codmd_loss``, or of ``dmd_loss``, which has no relation.

    Raises:
        TypeError, ValueError: one is not as described; the message names it.
    """
    rule = conventions.resolve(convention)
    layout = rule.layout if layout is None else layout
    checks.check_one_of("layout", layout, LAYOUTS)
    checks.check_one_of("prediction", prediction, PREDICTIONS)
    checks.check_one_of("batch_grad", batch_grad, ("global", "local"))
    backends.check_name(backend)
    real = checks.check_number("guidance", guidance)
    fake = real if fake_guidance is None else checks.check_number("fake_guidance", fake_guidance)
    scales = rule.cond_scale(real), rule.cond_scale(fake)
    temperature = checks.check_positive("temperature", temperature)
    batch, frame = checks.check_weight("batch_weight", batch_weight), checks.check_weight("frame_weight", frame_weight)
    weight = checks.check_weight("relation_weight", relation_weight)
    related = checks.computed(weight)
    terms = related and checks.computed(batch), related and checks.computed(frame)
    numbers = given(temperature, batch, frame, weight, *scales)
    return Options(rule, layout, real, fake, *scales, weight, related, *terms, numbers, Gather("", batch_grad))


def call_of(
    options: Options,
    latents: tuple[Any, ...],
    mask: Tensor | None,
    sample_weight: Tensor | None,
    sigma: Tensor | None,
    prediction: str,
    frame_mask: Tensor | None = None,
    pool: Pool = "mean",
) -> tuple[Objective, Grid | None]:
    """The call, whose latents have five axes, and the grid that was asked for; None is every pixel.

    A convention that runs step by step gets ``sigma`` and ``sample_weight`` in their own dtypes.

    Args:
        latents: in the order of ``checks.LATENTS``.

    Raises:
        TypeError, ValueError: a tensor is not as described; the message names it.
    """
    rule, layout, _, _, real_scale, fake_scale, _, related, batch, frame, numbers, _ = options
    student, real, fake, real_uncond, fake_uncond, noisy, augment_real, augment_uncond = latents
    if augment_real is not None or augment_uncond is not None:
        check_augmentation(augment_real, augment_uncond, real_uncond, prediction)
        if rule.undecouplable:
            raise ValueError(f"augment_real does not go with this convention: {rule.undecouplable}")
    images = layout == "bchw"
    if images or not checks.plainly_match(latents):
        canonical = _latents(latents, layout)
        student, real, fake, real_uncond, fake_uncond, noisy, augment_real, augment_uncond = canonical
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
    if frame_mask is not None:
        checks.check_frame_mask(frame_mask, student, layout)
    grid = checks.check_pool(pool, student.shape)
    return Objective(
        student, real, fake, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight, frame_mask, augment_real,
        augment_uncond, layout, rule, related, grid or (1, 1), batch, frame, placed(numbers, student),
    ), grid  # fmt: skip


def _read_where_guided(uncond: Tensor | None, scale: Number) -> Tensor | None:
    """``uncond``, or None at a scale that does not guide: its NaN would reach the loss as 0·NaN."""
    return uncond if isinstance(scale, Tensor) or scale != 0 else None


def _latents(latents: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    """The latents with five axes; raises where one is not as described."""
    student, real, fake, *_ = latents
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
    for name, value in zip(checks.LATENTS, latents, strict=True):
        if value is not None:
            checks.check_memory(name, value)
    if layout == "bchw":
        latents = tuple(v.unsqueeze(1) if v is not None and v.ndim == 4 else v for v in latents)
    checks.check_latents(latents)
    return latents


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
