"""Argument checks shared by ``dmd_loss`` and ``codmd_loss``, and their canonical form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from codmd import backends, conventions, reference
from codmd.conventions import Convention
from codmd.ops import _checks
from codmd.ops._boundary import remembered

LAYOUTS = ("bfchw", "bcfhw", "bchw")
PREDICTIONS = ("x0", "flow")
LATENTS = ("fake", "real", "real_uncond", "fake_uncond", "noisy")


class Inputs(NamedTuple):
    """Checked arguments. Latents have five axes in ``layout`` and ``sigma`` is ``[B, F]``.

    ``real_scale`` and ``fake_scale`` are in the cond form, ``guidance`` and ``fake_guidance`` in the convention's own.
    """

    student: Tensor
    fake: Tensor
    real: Tensor
    real_uncond: Tensor | None
    fake_uncond: Tensor | None
    noisy: Tensor | None
    sigma: Tensor | None
    mask: Tensor | None
    sample_weight: Tensor | None
    layout: str
    convention: Convention
    real_scale: float
    fake_scale: float
    guidance: float
    fake_guidance: float

    @property
    def fused(self) -> tuple[Any, ...]:
        """The arguments of a fused forward pass."""
        return self[:13]


def traced(inputs: Inputs) -> list[Any]:
    """``inputs.fused`` for a traced call. torch 2.8 traces neither slices nor properties of a NamedTuple."""
    operands: list[Any] = list(inputs)
    operands[10] = operands[10].encoded
    return operands[:13]


def check(
    student: Tensor,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    guidance: float,
    fake_guidance: float | None,
    convention: str | Convention,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    layout: str | None,
    prediction: str,
    noisy: Tensor | None,
    sigma: Tensor | None,
    backend: str,
) -> Inputs:
    """Raise ``TypeError`` or ``ValueError`` naming the argument, or return the canonical form."""
    rule, layout, (real_scale, fake_scale, real_guidance, fake_guidance) = _options(
        convention, layout, guidance, fake_guidance, prediction, backend
    )
    latents: tuple[Any, ...] = student, fake, real, real_uncond, fake_uncond, noisy
    images = layout == "bchw"
    if images or fake is None or real is None or not _checks.plainly_match(student, latents[1:]):
        student, fake, real, real_uncond, fake_uncond, noisy = _latents(latents, layout)
        layout = "bfchw" if images else layout
    if prediction != "x0" or noisy is not None or sigma is not None:
        sigma = _sigma(prediction, noisy, sigma, student, layout, rule)
    if mask is not None:
        mask = _mask(mask, student, images)
    if sample_weight is not None:
        sample_weight = _sample_weight(sample_weight, student, rule)
    return Inputs(
        student, fake, real, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight, layout, rule, real_scale,
        fake_scale, real_guidance, fake_guidance,
    )  # fmt: skip


@remembered
def _options(
    convention: str | Convention,
    layout: str | None,
    guidance: float,
    fake_guidance: float | None,
    prediction: str,
    backend: str,
) -> tuple[Convention, str, tuple[float, float, float, float]]:
    """The convention, the layout, and the scales of :class:`Inputs`; raises where an option is not as described."""
    rule = conventions.resolve(convention)
    layout = rule.layout if layout is None else layout
    _checks.check_one_of("layout", layout, LAYOUTS)
    _checks.check_one_of("prediction", prediction, PREDICTIONS)
    real = _checks.check_number("guidance", guidance)
    fake = real if fake_guidance is None else _checks.check_number("fake_guidance", fake_guidance)
    backends.check_name(backend)
    return rule, layout, (rule.cond_scale(real), rule.cond_scale(fake), real, fake)


def _latents(given: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    """The latents with five axes; raises where one is not as described."""
    student, fake, real, *_ = given
    _check_axes(student, layout)
    if fake is None or real is None:
        raise TypeError(f"{'fake' if fake is None else 'real'} must be a torch.Tensor, got NoneType")
    if layout == "bchw":
        given = tuple(v.unsqueeze(1) if isinstance(v, Tensor) and v.ndim == 4 else v for v in given)
    student, *others = given
    _checks.check_latents(student, **dict(zip(LATENTS, others, strict=True)))
    return given


def _check_axes(student: Any, layout: str) -> None:
    if not isinstance(student, Tensor):
        raise TypeError(f"student must be a torch.Tensor, got {type(student).__name__}")
    axes = 4 if layout == "bchw" else 5
    if student.ndim != axes:
        raise ValueError(
            f"student must have {axes} axes for layout={layout!r}, got shape {tuple(student.shape)}; "
            f"pass layout= one of {', '.join(LAYOUTS)} when the convention's default is another"
        )


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
    if sigma.shape not in ((samples,), (samples, frames)):
        raise ValueError(
            f"sigma must have shape (batch,) = ({samples},) or (batch, frames) = ({samples}, {frames}), "
            f"got {tuple(sigma.shape)}"
        )
    _check_plain("sigma", sigma, student)
    sigma = _fused(sigma, student, convention)
    return (sigma[:, None] if sigma.ndim == 1 else sigma).expand(samples, frames)


def _mask(mask: Any, student: Tensor, images: bool) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a boolean torch.Tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask must be torch.bool (True selects an element), got {mask.dtype}")
    if mask.device != student.device:
        raise ValueError(f"mask must be on the device of student {student.device}, got {mask.device}")
    if images and mask.ndim == 4:
        mask = mask.unsqueeze(1)
    sizes = student.shape[student.ndim - mask.ndim :] if mask.ndim <= student.ndim else ()
    if len(sizes) != mask.ndim or any(m not in (1, s) for m, s in zip(mask.shape, sizes, strict=True)):
        raise ValueError(f"mask must broadcast to the shape of student {tuple(student.shape)}, got {tuple(mask.shape)}")
    return mask.expand(student.shape)


def _sample_weight(weight: Any, student: Tensor, convention: Convention) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"sample_weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.shape != (len(student),):
        raise ValueError(f"sample_weight must have shape (batch,) = ({len(student)},), got {tuple(weight.shape)}")
    _check_plain("sample_weight", weight, student)
    return _fused(weight, student, convention).contiguous()


def _fused(values: Tensor, student: Tensor, convention: Convention) -> Tensor:
    """In the dtype that the fused passes compute in; a convention that runs step by step keeps its own."""
    return values.to(reference.compute_dtype(student.dtype)) if convention.fusable else values


def _check_plain(name: str, value: Tensor, student: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.device != student.device:
        raise ValueError(f"{name} must be on the device of student {student.device}, got {value.device}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but only student receives one: pass {name}.detach()")
