"""Guided x0 predictions from a network's outputs, in the arithmetic of a convention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codmd.conventions import Convention
from codmd.reference.relation import compute_dtype

FRAME_AXIS = {"bfchw": 1, "bcfhw": 2, "bchw": None}


def guided(cond: Tensor, uncond: Tensor, scale: float | Tensor, form: str = "cond") -> Tensor:
    """Classifier-free guidance: ``"cond"`` is c + s(c - u), ``"uncond"`` is u + s(c - u), the same at s + 1."""
    return (cond if form == "cond" else uncond) + scale * (cond - uncond)


def x0_from_flow(noisy: Tensor, velocity: Tensor, sigma: Tensor, layout: str = "bfchw") -> Tensor:
    """x0 = x_t - σ v, in the dtype of x_t; ``sigma`` is ``[B]`` or, per frame, ``[B, F]``."""
    return noisy - per_frame(sigma, noisy, layout) * velocity


def per_frame(values: Tensor, latents: Tensor, layout: str) -> Tensor:
    """``[B]`` or ``[B, F]`` values in the latents' dtype, shaped to broadcast against the latents."""
    shape = [len(latents)] + [1] * (latents.ndim - 1)
    frame_axis = FRAME_AXIS[layout]
    if values.ndim == 2 and frame_axis is not None:
        shape[frame_axis] = latents.shape[frame_axis]
    return values.to(latents.dtype).reshape(shape)


class Prediction(NamedTuple):
    """A network's x0: after guidance, and its two parts (``uncond`` is None without guidance)."""

    guided: Tensor
    cond: Tensor
    uncond: Tensor | None


def x0_prediction(
    cond: Tensor,
    uncond: Tensor | None,
    scale: float | Tensor,
    convention: Convention,
    layout: str,
    noisy: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Prediction:
    """x0 from a network's outputs, and guidance with the convention's ``scale``; velocities when ``noisy`` is given.

    Where the convention does not guide at that scale, the guided x0 is the conditional one.
    """
    emulate = convention.arithmetic == "emulate"
    dtype = cond.dtype if emulate else step_dtype(convention, "direction", cond)

    def x0(output: Tensor) -> Tensor:
        output = output.detach()
        if noisy is None or sigma is None:
            return output.to(dtype)
        wide = torch.float64 if emulate else dtype
        return x0_from_flow(noisy.detach().to(wide), output.to(wide), sigma, layout).to(dtype)

    c, u = x0(cond), None if uncond is None else x0(uncond)
    if u is None:
        return Prediction(c, c, None)
    above = convention.guided_above
    guides = above is None or scale > above
    base = convention.rounding.guidance_base if emulate else "cond"
    if base != convention.guidance_form:
        scale = scale - 1 if base == "cond" else scale + 1
    if isinstance(guides, Tensor):
        return Prediction(torch.where(guides, guided(c, u, scale, base), c), c, u)
    return Prediction(guided(c, u, scale, base), c, u) if guides else Prediction(c, c, None)


def step_dtype(convention: Convention, step: str, student: Tensor) -> torch.dtype:
    """The dtype of one step: ``rounding`` decides under emulation, ``arithmetic`` otherwise."""
    if convention.arithmetic == "float64":
        return torch.float64
    if convention.arithmetic == "float32":
        return compute_dtype(student.dtype)
    dtypes = {"input": student.dtype, "float32": torch.float32, "float64": torch.float64}
    return dtypes[getattr(convention.rounding, step)]
