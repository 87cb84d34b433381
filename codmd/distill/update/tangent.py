"""Velocity of a network and its derivative along a direction, in one pass without a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from codmd.models.base import Condition, VideoDenoiser


@torch.no_grad()
def jvp(
    model: VideoDenoiser, function: Callable[..., Tensor], values: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`function(*values)`, which calls `model`, and its derivative along `directions`, by forward-mode differentiation.

    The network runs as it is: sharded, with recomputed or compiled blocks, or with adapters.

    Args:
        model: any; one whose attention has no forward mode of its own overrides `tangents`.
        function: of dual numbers; what it holds beside them is constant.
        values, directions: pairs of equal shape and dtype.

    Returns:
        (value, tangent), detached.
    """
    with model.tangents(), forward_ad.dual_level():
        duals = (forward_ad.make_dual(*pair) for pair in zip(values, directions, strict=True))
        value, tangent = forward_ad.unpack_dual(function(*duals))
        return value, torch.zeros_like(value) if tangent is None else tangent


def velocity_jvp(
    model: VideoDenoiser, x_t: Tensor, sigma: Tensor, x_dot: Tensor, sigma_dot: Tensor, cond: Condition = None
) -> tuple[Tensor, Tensor]:
    """v(x_t, sigma) and its derivative along (x_dot, sigma_dot): :func:`jvp` of the network itself.

    Args:
        x_t, x_dot: [B, F, C, H, W].
        sigma, sigma_dot: [B].
        cond: constant along the direction.

    Returns:
        (v, dv), like x_t, detached.
    """
    return jvp(model, lambda x, level: model(x, level, cond), (x_t, sigma), (x_dot, sigma_dot))
