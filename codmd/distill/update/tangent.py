"""Velocity of a network and its derivative along a direction, in one pass without a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from codmd.models.base import Condition, VideoDenoiser


@torch.no_grad()
def velocity_jvp(
    model: VideoDenoiser, x_t: Tensor, sigma: Tensor, x_dot: Tensor, sigma_dot: Tensor, cond: Condition = None
) -> tuple[Tensor, Tensor]:
    """v(x_t, sigma) and its Jacobian-vector product with (x_dot, sigma_dot), by forward-mode differentiation.

    The network is called once and as it is: sharded, with recomputed or compiled blocks, or with adapters.

    Args:
        model: any; one whose attention has no forward mode of its own overrides `tangents`.
        x_t: [B, F, C, H, W].
        sigma: [B].
        x_dot: direction of x_t.
        sigma_dot: direction of sigma.
        cond: constant along the direction.

    Returns:
        (v, dv), like x_t, detached.
    """
    with model.tangents(), forward_ad.dual_level():
        dual = model(forward_ad.make_dual(x_t, x_dot), forward_ad.make_dual(sigma, sigma_dot), cond)
        velocity, tangent = forward_ad.unpack_dual(dual)
        return velocity, torch.zeros_like(velocity) if tangent is None else tangent
