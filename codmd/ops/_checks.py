"""Argument checks of the operators: every message names the argument, what came and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("bfchw", "bcfhw")
PLAIN = (Tensor, torch.nn.Parameter)


def check_latents(student: Tensor, **others: Tensor | None) -> None:
    """``student`` is a 5-D floating tensor; the others match it and require no gradient."""
    if not plainly_match(student, tuple(others.values())):
        _explain_latents(student, others)


def plainly_match(student: Any, others: tuple[Any, ...]) -> bool:
    """Whether nothing can be wrong: the few attributes that tell so, since this precedes every kernel."""
    if type(student) not in PLAIN:
        return False
    shape, dtype, device = student.shape, student.dtype, student.device
    if len(shape) != 5 or 0 in shape or dtype not in DTYPES:
        return False
    for other in others:
        if other is not None and (
            type(other) is not Tensor
            or other.shape != shape
            or other.dtype is not dtype
            or other.requires_grad
            or other.device != device
        ):
            return False
    return True


def _explain_latents(student: Any, others: dict[str, Any]) -> None:
    if not isinstance(student, Tensor):
        raise TypeError(f"student must be a torch.Tensor, got {type(student).__name__}")
    if student.dtype not in DTYPES:
        raise TypeError(f"student must be float32, bfloat16, float16 or float64, got {student.dtype}")
    if student.ndim != 5:
        raise ValueError(
            f"student must have 5 axes (batch, frames, channels, height, width in the order of layout), "
            f"got shape {tuple(student.shape)}"
        )
    if student.numel() == 0:
        raise ValueError(f"student must not be empty, got shape {tuple(student.shape)}")
    for name, other in others.items():
        if other is not None:
            _check_match(name, other, student)


def _check_match(name: str, other: Tensor, student: Tensor) -> None:
    if not isinstance(other, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(other).__name__}")
    if other.shape != student.shape:
        raise ValueError(f"{name} must have the shape of student {tuple(student.shape)}, got {tuple(other.shape)}")
    if other.dtype != student.dtype:
        raise TypeError(f"{name} must have the dtype of student {student.dtype}, got {other.dtype}")
    if other.device != student.device:
        raise ValueError(f"{name} must be on the device of student {student.device}, got {other.device}")
    if other.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, but only student receives one: compute {name} under torch.no_grad() "
            f"or pass {name}.detach()"
        )


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known; allowed: {', '.join(LAYOUTS)}")


def check_positive(name: str, value: Any) -> float:
    """A finite number > 0, as float."""
    number = check_number(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}")
    return number


def check_weight(name: str, value: Any) -> float:
    """A finite number >= 0, as float."""
    number = check_number(name, value)
    if number < 0:
        raise ValueError(f"{name} must be 0 or greater, got {value}")
    return number


def check_number(name: str, value: Any) -> float:
    """A finite Python number, as float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_pool(pool: Any, layout: str, shape: torch.Size) -> list[int] | None:
    """``"mean"``, ``(rows, columns)`` or ``None``, as a list of two integers or ``None``."""
    if pool is None:
        return None
    if pool == "mean":
        return [1, 1]
    if not isinstance(pool, (tuple, list)) or len(pool) != 2 or not all(type(n) is int for n in pool):
        raise ValueError(f'pool must be "mean", None or a tuple of two integers (rows, columns), got {pool!r}')
    height, width = shape[3], shape[4]
    if not (1 <= pool[0] <= height and 1 <= pool[1] <= width):
        raise ValueError(
            f"pool={tuple(pool)} must lie between (1, 1) and the latent's height and width ({height}, {width})"
        )
    return list(pool)


def check_frame_mask(frame_mask: Any, student: Tensor, layout: str) -> None:
    """Boolean ``[B, F]`` on the student's device."""
    if frame_mask is None:
        return
    if not isinstance(frame_mask, Tensor):
        raise TypeError(f"frame_mask must be a boolean torch.Tensor, got {type(frame_mask).__name__}")
    if frame_mask.dtype is not torch.bool:
        raise TypeError(f"frame_mask must be torch.bool (True marks a valid frame), got {frame_mask.dtype}")
    frames = student.shape[1] if layout == "bfchw" else student.shape[2]
    if frame_mask.shape != (student.shape[0], frames):
        raise ValueError(
            f"frame_mask must have shape (batch, frames) = {(student.shape[0], frames)}, got {tuple(frame_mask.shape)}"
        )
    if frame_mask.device != student.device:
        raise ValueError(f"frame_mask must be on the device of student {student.device}, got {frame_mask.device}")


def check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}")
