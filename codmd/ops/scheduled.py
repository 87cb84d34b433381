"""The numbers of a call that a schedule may change: floats, or one tensor where a trace or the device holds one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codmd.ops.checks import check_number, check_positive, check_weight
from codmd.ops.contract import Numbers

Given = Numbers | tuple[float | Tensor, ...]
"""Checked numbers in the order of :class:`Numbers`; a plain tuple where :func:`placed` has work to do."""


def given(*numbers: float | Tensor) -> Given:
    """``numbers`` as :class:`Numbers` where all are floats and nothing traces them."""
    if torch.compiler.is_compiling() or any(isinstance(number, Tensor) for number in numbers):
        return numbers
    return Numbers(*numbers)  # type: ignore[arg-type]


def placed(numbers: Given, student: Tensor) -> Numbers | Tensor:
    """``numbers`` in the form that a call of ``student`` holds.

    Raises:
        ValueError: a tensor lies neither on the student's device nor on the host.
    """
    if isinstance(numbers, Numbers):
        return numbers
    place = _device_of(student, numbers)
    if torch.compiler.is_compiling():
        # A graph takes a float for a constant; added to a tensor it is an input, whatever its value.
        place = place or torch.device("cpu")
        dtype = torch.float64 if place.type == "cpu" else torch.float32
        return torch.stack([torch.zeros((), dtype=dtype, device=place) + n for n in numbers])
    devices = [number.device for number in numbers if isinstance(number, Tensor)]
    options: dict[str, Any] = {"dtype": torch.float32, "device": place or devices[0]}
    return torch.stack([_on_device(number, options) for number in numbers])


def _on_device(number: float | Tensor, options: dict[str, Any]) -> Tensor:
    """A 0-dim tensor, without a copy from the host's memory that a capture could not hold."""
    return number.to(**options) if isinstance(number, Tensor) else torch.full((), number, **options)


def _device_of(student: Tensor, numbers: tuple[float | Tensor, ...]) -> torch.device | None:
    for name, number in zip(Numbers._fields, numbers, strict=True):
        if isinstance(number, Tensor):
            if number.device != student.device and number.device.type != "cpu":
                raise ValueError(f"{name} must be a number or on the device of student {student.device}, "
                                 f"got {number.device}")  # fmt: skip
            if number.device.type != "cpu" or torch.compiler.is_compiling():
                return number.device
    return None


def checked(numbers: Numbers) -> Numbers:
    """Numbers that a traced call could not look at."""
    check_positive("temperature", numbers.temperature)
    for name in ("batch_weight", "frame_weight", "relation_weight"):
        check_weight(name, getattr(numbers, name))
    for name in ("real_scale", "fake_scale"):
        check_number(name, getattr(numbers, name))
    return numbers
