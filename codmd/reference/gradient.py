"""The gradient of the relation loss through S = u uᵀ and the normalisation, written out (docs/mathematics.md, 5)."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor

from codmd.reference.relation import NORM_FLOOR, feature_norm, relation, unit_vectors


def feature_gradient(features: Tensor, gradient: Tensor) -> Tensor:
    """∂L/∂φ_i = (Σ_j H_ij u_j - u_i Σ_j H_ij S_ij)/n_i from G = ∂L/∂S, H = G + Gᵀ, n = max(‖φ‖, 1e-12).

    The second term vanishes where the norm is clamped, because the norm is then a constant.
    """
    units, symmetric, norm = unit_vectors(features), gradient + gradient.mT, feature_norm(features)
    radial = torch.where(norm < NORM_FLOOR, 0, (symmetric * relation(features)).sum(-1, keepdim=True))
    return (einsum(symmetric, units, "... i j, ... j k -> ... i k") - radial * units) / norm.clamp(min=NORM_FLOOR)


def feature_gradient_matrix(features: Tensor, gradient: Tensor) -> Tensor:
    """Symmetric M with ∂L/∂φ = M φ: :func:`feature_gradient` for features that are not kept.

    M_ij = H_ij/(n_i n_j) - [i = j]·Σ_k H_ik S_ik / n_i². NaN where n_i n_j overflows.
    """
    norm = feature_norm(features)
    floor = norm.clamp(min=NORM_FLOOR)
    symmetric = gradient + gradient.mT
    radial = torch.where(norm < NORM_FLOOR, 0, (symmetric * relation(features)).sum(-1, keepdim=True))
    product = floor * floor.mT
    return torch.where(product.isfinite(), (symmetric - torch.diag_embed(radial[..., 0])) / product, torch.nan)
