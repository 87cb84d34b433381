"""The gate before every speed-up, and the memory beside it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from codmd import reference
from codmd.reference.relation import Pool


def gradient_of(loss: Callable[..., Tensor], student: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, *arguments)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def gate(loss: Callable[..., Tensor], student: Tensor, real: Tensor, fake: Tensor, pool: Pool) -> tuple[float, float]:
    """Relative errors of ``loss(student, real, fake, pool)`` and of its gradient against the float64 reference.

    Raises:
        RuntimeError: an error exceeds twice that of the reference in the latents' own dtype plus 1e-6.
    """

    def plain(x: Tensor, r: Tensor, f: Tensor) -> Tensor:
        return reference.relation_loss(x, r, f, pool=pool)[0]

    truth = gradient_of(plain, student.double(), real.double(), fake.double())
    usual = gradient_of(plain, student, real, fake)
    found = gradient_of(loss, student, real, fake, pool)
    errors = tuple(relative_error(a, b) for a, b in zip(found, truth, strict=True))
    allowed = tuple(2 * relative_error(a, b) + 1e-6 for a, b in zip(usual, truth, strict=True))
    if errors[0] > allowed[0] or errors[1] > allowed[1]:
        raise RuntimeError(f"accuracy gate failed: errors {errors} exceed {allowed}, so no time is reported")
    return errors[0], errors[1]


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which the resident peak of ``run`` exceeds the memory before it (Linux; 0 elsewhere).

    The allocator must give freed blocks back, or it hides what is allocated anew: start the process with
    ``MALLOC_MMAP_THRESHOLD_=65536``.
    """
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return 0

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    clear.write_text("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def processor() -> str:
    """The processor's model name."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
