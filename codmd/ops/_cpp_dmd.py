"""The fused DMD and CoDMD losses of the C++ backend behind the operator boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codmd.conventions import Convention
from codmd.ops import _cpp
from codmd.ops._cpp import _C, _DTYPE_CODES, _address, _grid, _mask
from codmd.reference.relation import Pool

load_error: str | None = _cpp.load_error
if load_error is None and not hasattr(_C, "codmd_forward"):
    load_error = "the C++ extension codmd._C is older than the fused DMD losses: run `pip install` again"

_SCOPES = {"sample": 0, "batch": 1, "block": 2}
_GUARDS = {"none": 0, "clamp": 1, "add": 2}
_POLICIES = {"to_num": 0, "zero_sample": 1, "keep": 2}
_NO_RELATION = (0, 0, 0, 1, 1, 1.0)


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
    """(values [2] = loss and mean|g|; norms, one per segment; factors [B])."""
    tensors = student, fake, real, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight
    values, norms, factors = _outputs(student, layout, convention)
    _C.dmd_forward(
        *_scores(student, tensors, layout, real_scale, fake_scale), _rule(student, layout, convention),
        torch.get_num_threads(), values.data_ptr(), norms.data_ptr(), factors.data_ptr(),
    )  # fmt: skip
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
    """Write upstream · factor · G(d, norm) into ``out``."""
    tensors = None, fake, real, real_uncond, fake_uncond, None, sigma, mask, None
    _C.dmd_backward(
        *_scores(out, tensors, layout, real_scale, fake_scale), _rule(out, layout, convention), _NO_RELATION,
        torch.get_num_threads(), norms.data_ptr(), factors.data_ptr(), 0, 0, [0, grad.data_ptr(), 0, 0], 0.0, 0.0,
        _tensor(out),
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
    tensors = student, fake, real, real_uncond, fake_uncond, noisy, sigma, mask, sample_weight
    values, norms, factors = _outputs(student, layout, convention)
    samples, frames, channels = _axes(student, layout)
    rows, columns = _grid(pool)
    features = channels * rows * columns
    frame = torch.empty(1)
    frame_grad = torch.empty(samples, frames, features) if frame_weight and frames > 1 else torch.empty(0)
    pooled = torch.empty(samples, 3 * features + 1) if batch else torch.empty(0)
    _C.codmd_forward(
        *_scores(student, tensors, layout, real_scale, fake_scale), _rule(student, layout, convention),
        (*_mask(frame_mask), rows, columns, temperature), torch.get_num_threads(), values.data_ptr(), norms.data_ptr(),
        factors.data_ptr(), frame.data_ptr(), frame_grad.data_ptr(), pooled.data_ptr(),
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
    tensors = None, fake, real, real_uncond, fake_uncond, None, sigma, mask, None
    grads = [_address(grad) for grad in (grad_total, grad_dmd, grad_batch, grad_frame)]
    _C.dmd_backward(
        *_scores(out, tensors, layout, real_scale, fake_scale), _rule(out, layout, convention),
        (*_mask(frame_mask), *_grid(pool), 1.0), torch.get_num_threads(), norms.data_ptr(), factors.data_ptr(),
        frame_grad.data_ptr(), batch_grad.data_ptr(), grads, relation_weight * batch_weight,
        relation_weight * frame_weight, _tensor(out),
    )  # fmt: skip


def _axes(latents: Tensor, layout: str) -> tuple[int, int, int]:
    """(batch, frames, channels)."""
    samples, frames, channels = latents.shape[:3]
    return (samples, channels, frames) if layout == "bcfhw" else (samples, frames, channels)


def _outputs(student: Tensor, layout: str, convention: Convention) -> tuple[Tensor, Tensor, Tensor]:
    samples, frames, _ = _axes(student, layout)
    shapes = {"sample": (samples,), "batch": (1,), "block": (samples, len(convention.segments(frames)) - 1)}
    return torch.empty(2), torch.empty(shapes[convention.norm_scope]), torch.empty(samples)


def _tensor(tensor: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.stride())


def _scores(
    like: Tensor, tensors: tuple[Tensor | None, ...], layout: str, real_scale: float, fake_scale: float
) -> tuple[Any, ...]:
    described = (*(_tensor(tensor) for tensor in tensors[:8]), _address(tensors[8]))
    return tuple(like.shape), layout == "bcfhw", _DTYPE_CODES[like.dtype], described, real_scale, fake_scale


def _rule(latents: Tensor, layout: str, convention: Convention) -> tuple[Any, ...]:
    _, frames, _ = _axes(latents, layout)
    return (
        _SCOPES[convention.norm_scope],
        convention.segments(frames),
        convention.independent_first_frame,
        _GUARDS[convention.guard],
        convention.eps,
        _POLICIES[convention.nan],
        convention.huber_c if convention.penalty == "huber" else 0.0,
        convention.coefficient,
        convention.reduction == "sum",
        convention.norm_divides == "loss",
        convention.weight_on == "direction",
    )
