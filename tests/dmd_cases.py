"""Inputs and yardsticks shared by the tests of ``dmd_loss`` and ``codmd_loss``."""

from __future__ import annotations

import pytest
import torch
from cases import relative_error
from torch import Tensor

from codmd import backends, ops, reference

LAYOUTS = ("bfchw", "bcfhw", "bchw")


def has_fused(name: str) -> bool:
    """Whether a backend can serve CPU tensors with its own fused DMD pass."""
    try:
        backends.select(name, torch.empty(1))
    except ValueError:
        return False
    return True


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not has_fused(name), reason=f"{name} has no fused DMD pass here"))
    for name in backends.BACKENDS
    if name not in ("triton", "cuda")
]


def scores(
    shape: tuple[int, ...] = (2, 7, 3, 5, 9),
    dtype: torch.dtype = torch.float32,
    layout: str = "bfchw",
    perturbation: float = 0.1,
    flow: bool = False,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The student and the named arguments fake, real, real_uncond, fake_uncond (noisy, sigma for ``flow``)."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    student, real = draw(), draw()
    arguments = {
        "fake": real + perturbation * draw(),
        "real": real,
        "real_uncond": real + 0.3 * draw(),
        "fake_uncond": real + 0.3 * draw(),
    }
    if flow:
        arguments["noisy"] = draw()
    arguments = {name: value.to(dtype) for name, value in arguments.items()}
    student = student.to(dtype)
    if layout == "bcfhw":
        student = student.transpose(1, 2).contiguous()
        arguments = {name: value.transpose(1, 2).contiguous() for name, value in arguments.items()}
    if layout == "bchw":
        student, arguments = student[:, 0], {name: value[:, 0] for name, value in arguments.items()}
    if flow:
        size = (shape[0],) if layout == "bchw" else shape[:2]
        arguments["sigma"] = 0.1 + 0.9 * torch.rand(size, generator=generator)
    return student, arguments


def run(function, student: Tensor, arguments: dict, upstream: float = 1.0, **options) -> tuple[Tensor, Tensor]:
    """(detached loss, gradient of upstream * loss) at a copy of ``student`` with its strides."""
    leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(leaf, **arguments, **options)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype))
    return loss.detach(), leaf.grad


def truth(student: Tensor, arguments: dict, upstream: float = 1.0, **options) -> tuple[Tensor, Tensor]:
    """The float64 reference on the upcast inputs."""
    wide = {name: value.double() for name, value in arguments.items()}
    return run(reference.dmd_loss, student.double(), wide, upstream, **options)


def same_dtype(student: Tensor, arguments: dict, upstream: float = 1.0, **options) -> tuple[Tensor, Tensor]:
    """The PyTorch path on the inputs' own dtype, the yardstick of a backend's error."""
    return run(reference.dmd_loss, student, arguments, upstream, **options)


def mask_of(kind: str, student: Tensor) -> Tensor | None:
    """No mask, random elements, the last frame, one element, all of them or none."""
    if kind == "none":
        return None
    if kind == "elements":
        return torch.rand(student.shape, generator=torch.Generator().manual_seed(3)) > 0.4
    if kind == "frames":
        mask = torch.zeros(student.shape[1], *[1] * (student.ndim - 2), dtype=torch.bool)
        mask[-1] = True
        return mask
    mask = torch.full(student.shape, kind == "all")
    if kind == "one":
        mask.view(-1)[mask.numel() // 2] = True
    return mask


def assert_as_good_as_torch(student: Tensor, arguments: dict, backend: str, upstream: float = 1.0, **options) -> None:
    """Value and gradient within twice the same-dtype PyTorch error, plus one rounding of the output."""
    value, gradient = run(ops.dmd_loss, student, arguments, upstream, backend=backend, **options)
    yard_value, yard_gradient = same_dtype(student, arguments, upstream, **options)
    true_value, true_gradient = truth(student, arguments, upstream, **options)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    assert relative_error(value, true_value) <= 2 * relative_error(yard_value, true_value) + 5e-7
    assert relative_error(gradient, true_gradient) <= 2 * relative_error(yard_gradient, true_gradient) + 5e-7
