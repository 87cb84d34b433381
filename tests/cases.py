"""Inputs shared by the tests: latents with a critic that tracks the teacher, and errors against float64."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from codmd import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("bfchw", "bcfhw")
POOLS = ("mean", (2, 3), None)


def latents(
    shape: tuple[int, ...] = (2, 5, 4, 7, 9),
    dtype: torch.dtype = torch.float32,
    layout: str = "bfchw",
    perturbation: float = 0.1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(student, real, fake) of a ``[B, F, C, H, W]`` shape in ``layout``; fake - real is relative to real."""
    generator = torch.Generator().manual_seed(seed)
    student, real, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    fake = real + perturbation * noise
    out = [v.to(dtype) for v in (student, real, fake)]
    if layout == "bcfhw":
        out = [v.transpose(1, 2).contiguous() for v in out]
    return out[0].requires_grad_(), out[1], out[2]


def frame_mask(samples: int, frames: int, seed: int = 0) -> Tensor:
    """Random mask; the last sample has one valid frame, the one before (if any) none."""
    mask = torch.rand(samples, frames, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[0, :2] = True
    if samples > 1:
        mask[-1] = False
        mask[-1, -1] = True
    if samples > 2:
        mask[-2] = False
    return mask


def loss_and_gradient(function, student: Tensor, *args, upstream=(1.0, 0.0, 0.0), **kwargs) -> tuple[Tensor, Tensor]:
    """The three terms and the gradient of their ``upstream``-weighted sum with respect to ``student``."""
    leaf = student.detach().requires_grad_()
    terms = function(leaf, *args, **kwargs)
    loss = sum(weight * term for weight, term in zip(upstream, terms, strict=True))
    gradient = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)
    return torch.stack([t.detach() for t in terms]), gradient


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value - truth‖ / ‖truth‖ in float64 (0 when both are 0)."""
    truth = truth.double()
    norm = truth.norm()
    error = (value.double() - truth).norm()
    return float(error / norm) if norm > 0 else float(error)


def truth(student: Tensor, real: Tensor, fake: Tensor, upstream=(1.0, 0.0, 0.0), **kwargs) -> tuple[Tensor, Tensor]:
    """The float64 reference on the upcast inputs."""
    wide = [v.detach().double() for v in (student, real, fake)]
    return loss_and_gradient(reference.relation_loss, *wide, upstream=upstream, **kwargs)


def plain_relation(
    student: Tensor, real: Tensor, fake: Tensor, upstream=(1.0, 0.0, 0.0), temperature: float = 0.1,
    batch_weight: float = 1.0, frame_weight: float = 1.0, pool="mean",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The relation as it is usually written, in float64: of the features of fake themselves, not of fake - real."""

    def terms(student: Tensor) -> tuple[Tensor, ...]:
        features = [reference.frame_features(v.double(), pool=pool) for v in (student, real, fake)]
        frame = reference.relation_divergence_plain(*features, temperature).mean()
        batch = reference.relation_divergence_plain(*(v.mean(1) for v in features), temperature)
        return batch_weight * batch + frame_weight * frame, batch, frame

    return loss_and_gradient(terms, student.double(), upstream=upstream)


def same_dtype(
    student: Tensor, real: Tensor, fake: Tensor, upstream=(1.0, 0.0, 0.0), **kwargs
) -> tuple[Tensor, Tensor]:
    """The PyTorch path in the inputs' own dtype, the yardstick of every backend's error."""
    return loss_and_gradient(reference.relation_loss, student, real, fake, upstream=upstream, **kwargs)


def same_dtype_errors(student, real, fake, exact, exact_gradient, upstream, **kwargs):
    """The PyTorch path's largest errors over orders of the pixels that leave the loss unchanged.

    One order may round luckily: a single number is no yardstick for the value of a scalar.
    """
    pool = kwargs.get("pool", "mean")
    orders = [lambda v: v]
    if pool in ("mean", None):
        orders += [lambda v: v.flip(-1), lambda v: v.mT, lambda v: v.flip(-2).mT]
    errors = []
    for order in orders:
        terms, gradient = same_dtype(*(order(v.detach()) for v in (student, real, fake)), upstream, **kwargs)
        errors.append(
            [relative_error(a, b) for a, b in zip(terms, exact, strict=True)]
            + [relative_error(gradient, order(exact_gradient))]
        )
    return [max(column) for column in zip(*errors, strict=True)]


def far_apart(tensor: Tensor) -> Tensor:
    """A copy of ``[B, F, C, H, W]`` whose frames, channels, lines and columns each lie 2³⁰ elements and more apart.

    With three of each, every axis passes 31 bits alone, while its stride fits. The strides are odd, so that nothing is
    counted in vectors; of the gigabytes between the elements no page exists.
    """
    far = (1 << 30) + 1
    strides = 1 << 13, far, far + (1 << 4), far + (1 << 6), far + (1 << 8)
    room = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, room * tensor.element_size(), flags=flags), dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, strides).copy_(tensor.detach())
