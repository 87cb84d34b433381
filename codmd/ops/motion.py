"""The frame relation of motion: pooled by the backend, related in PyTorch, the gradient written by the backend.

A backend pools every frame as a sample of its own, fake - real before it is rounded; what is left is a few kilobytes,
and is transformed and related in float64. The backward pass is that of the relation between frames as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codmd import reference
from codmd.ops.backends import reference as plain
from codmd.ops.backends.moments import numbers_of
from codmd.ops.contract import Backend, Found, Relation

Features = tuple[Tensor, Tensor, Tensor]


def frame_term(kind: str, run: Backend, call: Relation, separate: bool) -> Found:
    """The frame term of ``kind``, one of ``reference.FEATURES``, and its gradient; ``call.batch`` is false.

    ``frame_grad`` is ∂L/∂φ ``[B, F, K]``, or M/B ``[B, F, F]`` with ∂L/∂φ = M φ for every pixel: with φ' = T φ it is
    Tᵀ M' T. Fewer than two transformed rows give exactly 0.
    """
    with torch.no_grad(), torch.autocast(call.student.device.type, enabled=False):
        features = _pooled(run, call) if call.pool is not None else plain.frame_features(call)
        moved = [reference.motion_features(v, kind, call.frame_mask) for v in features]
        x, r, d = (rows for rows, _ in moved)
        dtype = reference.compute_dtype(call.student.dtype)
        numbers, valid = numbers_of(call), moved[0][1]
        if x.shape[1] < 2:
            frame, grad = x.new_zeros(()), torch.zeros_like(features[0])
            if call.pool is None:
                grad = grad.new_zeros(len(x), features[0].shape[1], features[0].shape[1])
        else:
            frame, grad = plain.term((x, r, d), numbers.temperature, valid, call.pool is None)
            grad = reference.motion_adjoint(grad, kind, call.frame_mask)
            if call.pool is None:
                grad = reference.motion_adjoint(grad.mT, kind, call.frame_mask)
        frame, zero = frame.to(dtype), frame.new_zeros((), dtype=dtype)
        terms = torch.stack([numbers.frame_weight * frame, zero, frame]).to(dtype)
        return Found(terms, None, None, grad.to(dtype).contiguous(), terms.new_empty(0))


def _pooled(run: Backend, call: Relation) -> Features:
    """φ of student, real and fake - real, float64 ``[B, F, K]``."""
    samples, frames = reference.to_bfchw(call.student, call.layout).shape[:2]
    latents = [reference.to_bfchw(v, call.layout) for v in (call.student, call.real, call.fake)]
    if all(v.stride(0) == frames * v.stride(1) for v in latents):  # samples and frames are one axis without a copy
        latents = [v.flatten(0, 1)[None] for v in latents]
    alone = call._replace(frame_mask=None, layout="bfchw", batch=True, frame=False)
    rows = []
    for x, r, f in zip(*latents, strict=True):
        one = alone._replace(student=x.unsqueeze(1), real=r.unsqueeze(1), fake=f.unsqueeze(1))
        rows.append(run.features(one).rows)
    x, r, d = torch.cat(rows)[:, :-1].double().view(samples, frames, -1).chunk(3, dim=2)
    return x, r, d
