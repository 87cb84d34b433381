"""The DMD and CoDMD passes of the CUDA extension behind the operator boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codmd.conventions import Convention
from codmd.ops import _cuda
from codmd.ops._cuda import _address, _floats, _frame_grad, _grid, _launch, _place, _sizes, _tensor, load_error
from codmd.reference.relation import Pool

__all__ = ["codmd_backward", "codmd_forward", "dmd_backward", "dmd_forward", "load_error"]

_SCOPES = {"sample": 0, "batch": 1, "block": 2}
_GUARDS = {"none": 0, "clamp": 1, "add": 2}
_NAN_POLICIES = {"to_num": 0, "zero_sample": 1, "keep": 2}


def dmd_forward(
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
    convention: Convention,
    real_scale: float,
    fake_scale: float,
    magnitude: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [2] = loss and mean|g|; norms, one per segment; factors [B], ∂L/∂x = factor · G(d, norm))."""
    scores = _scores(
        student, layout, real_scale, fake_scale, convention, fake, real, real_uncond, fake_uncond, noisy, mask, sigma,
        sample_weight, student=student,
    )  # fmt: skip
    samples, frames, _ = _sizes(student, layout, "mean")
    values, norms, factors = _outputs(student, samples, frames, convention)
    outputs = values.data_ptr(), norms.data_ptr(), factors.data_ptr()
    _launch(student, (samples, frames), _cuda._C.dmd_forward, *scores, magnitude, *outputs)
    return values, norms, factors


def dmd_backward(
    out: Tensor,
    grad: Tensor,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    sigma: Tensor | None,
    mask: Tensor | None,
    norms: Tensor,
    factors: Tensor,
    layout: str,
    convention: Convention,
    real_scale: float,
    fake_scale: float,
) -> None:
    """Write upstream · factor · G(d, norm) into ``out``; 0 where nothing is selected."""
    scores = _scores(
        out, layout, real_scale, fake_scale, convention, fake, real, real_uncond, fake_uncond, None, mask, sigma, None
    )
    _cuda._C.dmd_backward(
        (*_place(out), 0, 0), *scores, norms.data_ptr(), factors.data_ptr(), (grad.data_ptr(), 0, 0, 0), None, (1, 1),
        0, 0, 0.0, 0.0, _tensor(out),
    )  # fmt: skip


def codmd_forward(
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
    convention: Convention,
    real_scale: float,
    fake_scale: float,
    magnitude: bool,
    frame_mask: Tensor | None,
    pool: Pool,
    temperature: float,
    frame_weight: float,
    batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`dmd_forward`, then (frame term [1], its gradient, rows to gather [B, 3K + 1] when ``batch``)."""
    scores = _scores(
        student, layout, real_scale, fake_scale, convention, fake, real, real_uncond, fake_uncond, noisy, mask, sigma,
        sample_weight, student=student,
    )  # fmt: skip
    samples, frames, features = _sizes(student, layout, pool)
    values, norms, factors = _outputs(student, samples, frames, convention)
    frame = _floats(student, 1)
    frame_grad = _frame_grad(student, samples, frames, features, pool, frame_weight)
    pooled = _floats(student, samples, 3 * features + 1) if batch else _floats(student, 0)
    _launch(
        student, (samples, frames), _cuda._C.codmd_forward, *scores, magnitude, _tensor(frame_mask), _grid(pool),
        temperature, values.data_ptr(), norms.data_ptr(), factors.data_ptr(), frame.data_ptr(),
        frame_grad.data_ptr(), pooled.data_ptr(),
    )  # fmt: skip
    return values, norms, factors, frame, frame_grad, pooled


def codmd_backward(
    out: Tensor,
    grad_total: Tensor | None,
    grad_dmd: Tensor | None,
    grad_batch: Tensor | None,
    grad_frame: Tensor | None,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    sigma: Tensor | None,
    mask: Tensor | None,
    frame_mask: Tensor | None,
    norms: Tensor,
    factors: Tensor,
    frame_grad: Tensor,
    batch_grad: Tensor,
    layout: str,
    convention: Convention,
    real_scale: float,
    fake_scale: float,
    pool: Pool,
    relation_weight: float,
    batch_weight: float,
    frame_weight: float,
) -> None:
    """Write the gradient of both terms into ``out``, rounded once."""
    scores = _scores(
        out, layout, real_scale, fake_scale, convention, fake, real, real_uncond, fake_uncond, None, mask, sigma, None
    )
    upstream = _address(grad_total), _address(grad_dmd), _address(grad_batch), _address(grad_frame)
    _cuda._C.dmd_backward(
        (*_place(out), 0, 0), *scores, norms.data_ptr(), factors.data_ptr(), upstream, _tensor(frame_mask),
        _grid(pool), frame_grad.data_ptr(), batch_grad.data_ptr(), relation_weight * batch_weight,
        relation_weight * frame_weight, _tensor(out),
    )  # fmt: skip


def _scores(
    example: Tensor,
    layout: str,
    real_scale: float,
    fake_scale: float,
    convention: Convention,
    fake: Tensor,
    real: Tensor,
    real_uncond: Tensor | None,
    fake_uncond: Tensor | None,
    noisy: Tensor | None,
    mask: Tensor | None,
    sigma: Tensor | None,
    sample_weight: Tensor | None,
    student: Tensor | None = None,
) -> tuple[Any, ...]:
    """The leading arguments of every function of the extension here."""
    latents = (student, fake, real, real_uncond, fake_uncond, noisy, mask, sigma)
    tensors = (*(_tensor(latent) for latent in latents), _address(sample_weight))
    return (
        example.shape, layout == "bcfhw", _cuda._DTYPE_CODES[example.dtype], tensors, real_scale, fake_scale,
        _rule(convention),
    )  # fmt: skip


def _rule(convention: Convention) -> tuple[Any, ...]:
    return (
        _SCOPES[convention.norm_scope], convention.norm_block, convention.independent_first_frame,
        _GUARDS[convention.guard], convention.eps, _NAN_POLICIES[convention.nan],
        convention.huber_c if convention.penalty == "huber" else 0.0, convention.coefficient,
        convention.reduction == "sum", convention.norm_divides == "loss", convention.weight_on == "direction",
    )  # fmt: skip


def _outputs(student: Tensor, samples: int, frames: int, convention: Convention) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and mean|g|, norms, factors."""
    shapes = {"sample": (samples,), "batch": (1,), "block": (samples, len(convention.segments(frames)) - 1)}
    norms = torch.empty(shapes[convention.norm_scope], dtype=torch.float32, device=student.device)
    return _floats(student, 2), norms, _floats(student, samples)
