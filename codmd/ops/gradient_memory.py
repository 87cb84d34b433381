"""Strides and memory of the gradient that a backward pass writes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from codmd import private
from codmd.ops.checks import remembered


def gradient_memory(student: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]:
    """What :func:`empty_gradient` makes of an eager call's student: shape, strides, dtype and device."""
    shape, strides = student.shape, student.stride()
    if not student.is_contiguous():
        strides = _dense_strides(shape, strides)
    return shape, strides, student.dtype, student.device


def dense_strides(shape: Any, strides: Any) -> tuple[int, ...]:
    """The gradient's strides: the student's own when they cover memory densely, else contiguous ones."""
    expected, dense = 1, True
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        dense, expected = dense and stride == expected, expected * size
    if dense:
        return tuple(strides)
    contiguous = [1]
    for size in reversed(shape[1:]):
        contiguous.append(contiguous[-1] * size)
    return tuple(reversed(contiguous))


_dense_strides = remembered(dense_strides)


KEPT_BYTES = 1 << 20
"""CPU gradients from this size on leave their memory to the next one."""

_kept: list[torch.UntypedStorage] = []
"""Memory of the latest CPU gradient of each thread that runs at once; taken out to be looked at, so by one thread."""


def _references() -> int:
    """What ``sys.getrefcount`` says of an object that one local name refers to; releases of Python differ."""
    alone = object()
    return sys.getrefcount(alone)


_ALONE = _references()


def empty_gradient(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a gradient; on the CPU that of the latest one, once nothing refers to it any more.

    The C library may give a block of this size back to the system whenever it is freed. The next step then takes a
    page fault every 4 KiB, which costs two to three times what the kernels do.
    """
    size = shape.numel() * dtype.itemsize
    owners = private.storage_owners
    if size < KEPT_BYTES or owners is None or device.type != "cpu":
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    try:
        memory = _kept.pop()
    except IndexError:
        memory = None
    # Free: no tensor holds it, no other name in Python does, and no process shares it.
    if (
        memory is not None
        and memory.nbytes() == size
        and owners(memory._cdata) == 1
        and sys.getrefcount(memory) == _ALONE
        and not memory.is_shared()
    ):
        gradient = torch.empty(0, dtype=dtype, device=device).set_(memory, 0, shape, strides)
    else:
        gradient = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        memory = gradient.untyped_storage()
    _kept.append(memory)
    return gradient


def release_gradient_memory() -> None:
    """Give back what :func:`empty_gradient` keeps for the next gradient."""
    _kept.clear()
