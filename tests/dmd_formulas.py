"""The DMD loss of each public codebase, written out on its own: what the conventions are tested against.

Every function takes student, fake, real (conditional), real (unconditional) and that codebase's own scale, and
computes in the dtypes the codebase uses; ``single`` and ``double`` stand for its float32 and float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SINGLE, DOUBLE = torch.float32, torch.float64


def _per_sample(distance: Tensor) -> Tensor:
    return distance.mean(dim=tuple(range(1, distance.ndim)), keepdim=True)


def self_forcing(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = c + (c - u) * s
    g = torch.nan_to_num((f - r) / _per_sample((x - r).abs()).detach())
    x = x.to(double)
    return 0.5 * F.mse_loss(x, (x - g.to(double)).detach())


def longlive(x, f, c, u, s, single=SINGLE, double=DOUBLE, block=3):
    r = c + (c - u) * s
    frames = x.shape[1]
    norm = torch.empty_like(x[:, :, :1, :1, :1])
    for start in range(0, frames, block):
        piece = (x - r).abs()[:, start : start + block]
        norm[:, start : start + block] = piece.mean(dim=(1, 2, 3, 4), keepdim=True).detach()
    g = torch.nan_to_num((f - r) / norm)
    x = x.to(double)
    return 0.5 * F.mse_loss(x, (x - g.to(double)).detach())


def dmd2(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = (u + s * (c - u)).to(double)
    wide = x.detach().to(double)
    g = torch.nan_to_num((f.to(double) - r) / _per_sample((wide - r).abs()))
    return 0.5 * F.mse_loss(x.to(single), (wide - g).to(single))


def rcm(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = (c + s * (c - u)).to(double)
    x = x.to(double)
    g = (f.to(double) - r) / _per_sample((x.detach() - r).abs()).clip(min=1e-5)
    squares = (x - (x - g).detach()) ** 2
    alive = ~squares.isnan().flatten(1).any(1)
    return squares[alive].sum()


def fastgen(x, f, c, u, s, single=SINGLE, double=DOUBLE, scale=None):
    r = c + (s - 1) * (c - u)
    weight = 1 / (_per_sample((x.detach().to(single) - r.to(single)).abs()) + 1e-6)
    if scale is not None:
        weight = weight * scale.to(single).reshape(-1, *[1] * (x.ndim - 1))
    target = x.detach() - (f - r) * weight.to(x.dtype)
    return 0.5 * F.mse_loss(x, target)


def fastvideo(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = u + (c - u) * s
    return _batch_norm(x, f, r, single)


def fastvideo_legacy(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = c + (c - u) * s
    return _batch_norm(x, f, r, single)


def _batch_norm(x, f, r, single):
    g = torch.nan_to_num((f - r) / (x - r).abs().mean().detach())
    x = x.to(single)
    return 0.5 * F.mse_loss(x, (x - g.to(single)).detach())


def lightx2v(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = (u + s * (c - u)).to(single)
    x = x.to(single)
    g = torch.nan_to_num((f.to(single) - r) / _per_sample((x - r).abs()).detach())
    return 0.5 * F.mse_loss(x, (x - g).detach())


def videox_fun(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = u + (c - u) * s
    g = torch.nan_to_num((f - r) / _per_sample((x - r).abs()).detach())
    x = x.to(double)
    return 0.5 * F.mse_loss(x, (x - g.to(double)).detach())


def diffsynth(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = u + s * (c - u)
    weight = 1 / (_per_sample((x.detach().to(single) - r.to(single)).abs()) + 1e-6)
    target = x.detach() - (f - r) * weight.to(x.dtype)
    return 0.5 * F.mse_loss(x.to(single), target.to(single))


def simpletuner(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = u + s * (c - u)
    g = torch.nan_to_num((f - r) / _per_sample((x - r).abs()).clamp(min=1e-6).detach())
    return 0.5 * F.mse_loss(x.to(double), (x - g).detach().to(double))


def tdm(x, f, c, u, s, single=SINGLE, double=DOUBLE, huber=None):
    target = x.detach() + (c - f) + (s - 1) * (c - u)
    r = c + (s - 1) * (c - u)
    weight = _per_sample((x.detach().to(double) - r.to(double)).abs())
    squares = F.mse_loss(x.to(single), target.to(single), reduction="none")
    if huber is not None:
        squares = torch.sqrt((x.to(single) - target.to(single)) ** 2 + huber**2) - huber
    return (squares / weight).mean()


FORMULAS = {
    "causvid": self_forcing,
    "self_forcing": self_forcing,
    "codmd": self_forcing,
    "longlive": longlive,
    "dmd2": dmd2,
    "rcm": rcm,
    "fastgen": fastgen,
    "modelopt": fastgen,
    "fastvideo": fastvideo,
    "fastvideo_legacy": fastvideo_legacy,
    "lightx2v": lightx2v,
    "videox_fun": videox_fun,
    "diffsynth": diffsynth,
    "simpletuner": simpletuner,
    "tdm": tdm,
}


def value_and_gradient(function, student: Tensor, *args, upstream: float = 1.0, **kwargs) -> tuple[Tensor, Tensor]:
    """The detached value and the gradient of ``function(student, ...)`` with respect to a copy of ``student``."""
    leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(leaf, *args, **kwargs)
    (gradient,) = torch.autograd.grad(value, leaf, torch.as_tensor(upstream, dtype=value.dtype))
    return value.detach(), gradient
