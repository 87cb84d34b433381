"""The DMD loss of each public codebase, written out on its own: what the conventions are tested against.

Every function takes student, fake, real (conditional), real (unconditional) and that codebase's own scale, and
computes in the dtypes the codebase uses; ``single`` and ``double`` stand for its float32 and float64. Where one writes
(x - r) - (x - f), as DMD2, DMDR and PDMD do, f - r stands here: the same but for a cancellation.
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


def one_forcing(x, f, c, u, s, single=SINGLE, double=DOUBLE, of_the_difference=False):
    r = c + (c - u) * s
    g = f - r
    norm = _per_sample(g.abs() if of_the_difference else (x - r).abs())
    g = torch.nan_to_num(g / norm.clamp_min(1e-6)).detach()
    x = x.to(single)
    return 0.5 * ((x - (x - g.to(single)).detach()) ** 2).mean()


def dmdr(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = u + s * (c - u) if s > 1.0 else c
    g = torch.nan_to_num((f - r) / (_per_sample((x.detach() - r).abs()) + 1e-8))
    return 0.5 * F.mse_loss(x.to(single), (x - g).detach().to(single))


def rcm(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    return _clipped(x, f, u + s * (c - u) if s > 1.0 else c, double).sum()


def rcm_2025(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    return _clipped(x, f, c + s * (c - u) if s > 0.0 else c, double).sum()


def cosmos(x, f, c, u, s, single=SINGLE, double=DOUBLE, mask=None):
    r = c + s * (c - u) if s > 0.0 else c
    return _clipped(x, f, r, double, mask).flatten(1).mean(1).mean()


def _clipped(x, f, r, double, mask=None):
    """Squares of g with the norm of the selected elements clipped; a sample with a NaN is zero."""
    x, r = x.to(double), r.to(double)
    distance, difference = (x.detach() - r).abs(), f.to(double) - r
    if mask is None:
        norm = _per_sample(distance)
    else:
        dims = tuple(range(1, x.ndim))
        count = mask.to(double).expand_as(x).sum(dims, keepdim=True).clip(min=1)
        norm, difference = (distance * mask).sum(dims, keepdim=True) / count, difference * mask
    squares = (x - (x - difference / norm.clip(min=1e-5)).detach()) ** 2
    dropped = squares.isnan().flatten(1).any(1).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(dropped, 0, squares)


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


def fastvideo_streaming(x, f, c, u, s, single=SINGLE, double=DOUBLE, mask=None):
    r = u + (c - u) * s
    norm = _per_sample((x.to(single) - r.to(single)).abs()).clamp_min(1e-6).detach()
    g = torch.nan_to_num((f - r) / norm)
    x = x.to(single)
    losses = 0.5 * (x - (x - g.to(single)).detach()) ** 2
    if mask is None:
        return losses.mean()
    weight = mask.to(losses.dtype)
    return (losses * weight).sum() / weight.expand_as(losses).sum().clamp_min(1.0)


def lightx2v(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = (u + s * (c - u)).to(single)
    x = x.to(single)
    g = torch.nan_to_num((f.to(single) - r) / _per_sample((x - r).abs()).detach())
    return 0.5 * F.mse_loss(x, (x - g).detach())


def lightx2v_legacy(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = u + s * (c - u)
    g = torch.nan_to_num((f - r) / _per_sample((x.detach() - r).abs()))
    return 0.5 * F.mse_loss(x.to(single), (x.to(single) - g.to(single)).detach())


def lightx2v_pdmd(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = (u + s * (c - u)).to(single)
    x, f, dims = x.to(single), f.to(single), tuple(range(1, x.ndim))
    residual = (x - f).detach()
    along = ((f - r) * residual).sum(dims, keepdim=True) / (residual.square().sum(dims, keepdim=True) + 1e-8)
    g = (f - r - along * residual) / _per_sample((x - r).abs()).clamp_min(1e-5).detach()
    g = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)
    return F.mse_loss(x, (x - g).detach()).clamp(0.0, 5.0)


def videox_fun_z_image(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    return videox_fun(x, f, c, u if s else c, s, single, double, least=1e-5)


def videox_fun(x, f, c, u, s, single=SINGLE, double=DOUBLE, least=None):
    r = u + (c - u) * s
    norm = _per_sample((x - r).abs()).detach()
    g = torch.nan_to_num((f - r) / (norm if least is None else norm.clip(min=least)))
    x = x.to(double)
    return 0.5 * F.mse_loss(x, (x - g.to(double)).detach())


def diffsynth(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = u + s * (c - u)
    weight = 1 / (_per_sample((x.detach().to(single) - r.to(single)).abs()) + 1e-6)
    target = x.detach() - (f - r) * weight.to(x.dtype)
    return 0.5 * F.mse_loss(x.to(single), target.to(single))


def simpletuner(x, f, c, u, s, single=SINGLE, double=DOUBLE):
    r = u + s * (c - u)
    g = (f - r) / _per_sample((x - r).abs()).clamp(min=1e-6).detach()
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
    "causvid": self_forcing, "self_forcing": self_forcing, "codmd": self_forcing, "helios": self_forcing,
    "reward_forcing": self_forcing, "longlive": longlive, "one_forcing": one_forcing, "dmd2": dmd2, "dmdr": dmdr,
    "rcm": rcm, "turbodiffusion": rcm, "rcm_2025": rcm_2025, "cosmos": cosmos, "fastgen": fastgen,
    "modelopt": fastgen, "fastvideo": fastvideo, "fastvideo_legacy": fastvideo_legacy,
    "fastvideo_streaming": fastvideo_streaming, "lightx2v": lightx2v, "lightx2v_legacy": lightx2v_legacy,
    "lightx2v_pdmd": lightx2v_pdmd, "videox_fun": videox_fun, "videox_fun_z_image": videox_fun_z_image,
    "diffsynth": diffsynth, "simpletuner": simpletuner, "tdm": tdm,
}  # fmt: skip


def value_and_gradient(function, student: Tensor, *args, upstream: float = 1.0, **kwargs) -> tuple[Tensor, Tensor]:
    """The detached value and the gradient of ``function(student, ...)`` with respect to a copy of ``student``."""
    leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(leaf, *args, **kwargs)
    (gradient,) = torch.autograd.grad(value, leaf, torch.as_tensor(upstream, dtype=value.dtype))
    return value.detach(), gradient
