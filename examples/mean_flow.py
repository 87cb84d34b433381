"""MeanFlow (arXiv 2505.13447) with a plain `nn.Module`: its target needs the tangent of a network with attention.

    python examples/mean_flow.py

Sets of eight points on a circle; the network learns the average velocity u(z, r, t); one step z - u(z, 0, 1) samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import codmd

POINTS = 8


class Block(nn.Module):
    """A transformer block; `codmd.ops.attention` is PyTorch's own attention unless its arguments are dual numbers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(codmd.ops.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class MeanVelocity(nn.Module):
    """u(z, r, t): the average velocity of the flow between times r and t."""

    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(4, width), nn.Linear(width, 2)
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        times = torch.stack((r, t), -1)[:, None].expand(-1, z.shape[1], -1)
        return self.output(self.blocks(self.input(torch.cat((z, times), -1))))


def data(batch: int) -> Tensor:
    """Eight points in equal steps around the circle from a random angle, [batch, 8, 2]."""
    angle = 2 * math.pi * (torch.rand(batch, 1) + torch.arange(POINTS) / POINTS)
    return torch.stack((angle.cos(), angle.sin()), -1)


def loss(network: nn.Module, x0: Tensor) -> Tensor:
    """|u - (v - (t - r) du/dt)|²; du/dt, the derivative of u along (v, 0, 1), is a constant of the optimisation."""
    noise, (r, t) = torch.randn_like(x0), torch.rand(2, len(x0)).sort(0).values
    r = torch.where(torch.rand(len(x0)) < 0.5, t, r)
    z, v = x0 + t[:, None, None] * (noise - x0), noise - x0
    with torch.no_grad(), forward_ad.dual_level():
        u = network(forward_ad.make_dual(z, v), r, forward_ad.make_dual(t, torch.ones_like(t)))
        rate = forward_ad.unpack_dual(u).tangent
    target = v - (t - r)[:, None, None] * rate
    return (network(z, r, t) - target).square().mean()


@torch.no_grad()
def distance(network: nn.Module, batch: int = 256) -> float:
    """Mean distance from the circle of points that one step samples."""
    noise = torch.randn(batch, POINTS, 2)
    sample = noise - network(noise, torch.zeros(batch), torch.ones(batch))
    return float((sample.norm(dim=-1) - 1).abs().mean())


def train(updates: int = 600) -> tuple[float, float]:
    """(distance before, distance after)."""
    torch.manual_seed(0)
    network = MeanVelocity()
    before = distance(network)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        loss(network, data(128)).backward()
        optimizer.step()
    return before, distance(network)


if __name__ == "__main__":
    print("mean distance from the circle, one step: {:.3f} before, {:.3f} after".format(*train()))
