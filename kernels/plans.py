"""Plans: all that sizes, strides and options decide about a call, computed once and kept in one bounded cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from codmd.ops.contract import Numbers

Plan = TypeVar("Plan")


class Plans:
    """Plans by their keys. The ``most`` used latest are kept, and at most as many others.

    A key holds everything that its plan depends on and that Triton specialises its launches on. A plan that was let go
    is made again; the compiled kernels are Triton's to keep. ``plans.get(key) or plans.of(key, make)`` costs a call
    whose plan is kept one look-up.
    """

    __slots__ = ("_new", "_old", "get", "most")

    def __init__(self, most: int = 512) -> None:
        self.most = most
        self._new: dict[Any, Any] = {}
        self._old: dict[Any, Any] = {}
        self.get = self._new.get

    def of(self, key: Any, make: Callable[[], Plan]) -> Plan:
        """The plan of ``key``, from ``make`` where it is not kept."""
        plan = self._new.get(key)
        if plan is None:
            plan = self._old.pop(key, None) or make()
            if len(self._new) >= self.most:
                self._old = dict(self._new)
                self._new.clear()
            self._new[key] = plan
        return plan

    def __iter__(self) -> Iterator[Any]:
        return iter([*self._old.values(), *self._new.values()])

    def clear(self) -> None:
        self._new.clear()
        self._old.clear()


PLANS = Plans()
"""Of every call in this process."""


class Workspace:
    """Pieces of one float32 buffer by name, each 16-byte aligned: a plan gives its kernels these very offsets."""

    def __init__(self, **pieces: int) -> None:
        self.size = 0
        self._offsets: dict[str, int] = {}
        for name, size in pieces.items():
            self._offsets[name] = self.size
            self.size += padded(size)

    def at(self, *names: str) -> tuple[int, ...]:
        """Offsets of pieces, in floats."""
        return tuple(self._offsets[name] for name in names)


def padded(floats: int) -> int:
    """``floats`` up to a multiple of 16 bytes."""
    return floats + -floats % 4


def alignment(*tensors: Tensor | None) -> Any:
    """What launches specialise on: True if every address is a multiple of 16 bytes, else which ones are."""
    together = 0
    for tensor in tensors:
        if tensor is not None:
            together |= tensor.data_ptr()
    return not together % 16 or tuple(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def pair_of_strides(tensor: Tensor | None) -> tuple[int, int]:
    """Strides of a frame mask or of noise levels, of b and f; 1, a constant to Triton, where it is absent."""
    return (1, 1) if tensor is None else (tensor.stride(0), tensor.stride(1))


def mask_key(frame_mask: Tensor | None) -> tuple[Any, ...] | None:
    """What launches specialise on in a frame mask."""
    return None if frame_mask is None else (frame_mask.stride(), frame_mask.dtype)


def details(*tensors: Tensor | None) -> tuple[Any, ...] | None:
    """Strides, alignment and dtype of each tensor; None where all are absent."""
    for tensor in tensors:
        if tensor is not None:
            return tuple(None if t is None else (t.stride(), t.data_ptr() % 16 == 0, t.dtype) for t in tensors)
    return None


def dtype_of(tensor: Tensor | None) -> Any:
    """Of a gradient that arrives, or None."""
    return None if tensor is None else tensor.dtype


UNSCHEDULED = (0.0,) * 6


def number_arguments(numbers: Any) -> tuple[Any, ...]:
    """The ``numbers`` of a call as the seven parameters of a kernel: a tensor that it loads or None, then floats."""
    return (None, *numbers) if type(numbers) is Numbers else (numbers, *UNSCHEDULED)
