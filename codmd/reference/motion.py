"""Motion features for the frame relation: frame features without their common part.

Frames of one video are nearly parallel, for most of a feature is what stands still; both transforms take it out. They
are linear, so that they commute with the mean over pixels and with the difference fake - real.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEATURES = ("level", "difference", "centred")


def motion_features(features: Tensor, kind: str, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(transformed features, which rows of them are valid) of ``[B, F, K]``.

    "level": the features themselves. "difference": φ[f+1] - φ[f], F - 1 rows, valid where both frames are.
    "centred": φ[f] - mean of φ over the valid frames. Invalid rows of the result are 0.

    Args:
        valid: boolean ``[B, F]``, ``True`` marks a frame that takes part.
    """
    if kind == "level":
        return features, valid
    if valid is not None:
        features = torch.where(valid[..., None], features, 0)
    if kind == "difference":
        both = None if valid is None else valid[:, 1:] & valid[:, :-1]
        moved = features.diff(dim=1)
    else:
        count = features.shape[1] if valid is None else valid.sum(1)[:, None, None].clamp(min=1)
        moved, both = features - features.sum(1, keepdim=True) / count, valid
    return moved if both is None else torch.where(both[..., None], moved, 0), both


def motion_adjoint(gradient: Tensor, kind: str, valid: Tensor | None = None) -> Tensor:
    """The adjoint of :func:`motion_features`: from ∂L/∂(transformed) to ∂L/∂φ ``[B, F, K]``."""
    if kind == "level":
        return gradient
    if kind == "difference":
        if valid is not None:
            gradient = torch.where((valid[:, 1:] & valid[:, :-1])[..., None], gradient, 0)
        edge = torch.zeros_like(gradient[:, :1])
        return torch.cat((edge, gradient), dim=1) - torch.cat((gradient, edge), dim=1)
    if valid is None:
        return gradient - gradient.mean(1, keepdim=True)
    gradient = torch.where(valid[..., None], gradient, 0)
    mean = gradient.sum(1, keepdim=True) / valid.sum(1)[:, None, None].clamp(min=1)
    return torch.where(valid[..., None], gradient - mean, 0)
