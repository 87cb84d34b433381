"""What every operator shares at its boundary: whether a call is traced, and arguments in the form of a schema."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from codmd.ops._checks import PLAIN
from codmd.reference.relation import Pool

Function = TypeVar("Function", bound=Callable[..., Any])


def remembered(function: Function) -> Function:
    """``function`` of hashable arguments, worked out once for each; compiled code traces the function itself."""
    lookup = functools.lru_cache(maxsize=512, typed=True)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            return lookup(*arguments)
        except TypeError:  # an argument that cannot be a key: the function says what is wrong with it
            return function(*arguments)

    return call  # type: ignore[return-value]


class EagerFunction(torch.autograd.Function):
    """An ``autograd.Function`` of positional arguments, applied at less host time.

    PyTorch's own ``apply`` first binds defaults and looks for wrappers that outlived a ``torch.func`` transform; none
    is needed here. Inside a transform it is called as ever, and says that these operators do not support them.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]


def once_differentiable(function: Function) -> Function:
    """PyTorch's decorator for a ``backward``, at no cost where no graph of the gradient is asked for."""
    guarded = torch.autograd.function.once_differentiable(function)

    @functools.wraps(function)
    def backward(*arguments: Any) -> Any:
        return guarded(*arguments) if torch.is_grad_enabled() else function(*arguments)

    return backward  # type: ignore[return-value]


def group_name_of(group: dist.ProcessGroup | None) -> str:
    """The name that stands for a group in a schema; empty for none."""
    if group is None:
        return ""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return group.group_name


_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def is_traced(tensor: Tensor) -> bool:
    """Whether a call must go through the dispatcher: compiled, exported, or on a tensor subclass."""
    return torch.compiler.is_compiling() or type(tensor) not in PLAIN or _dispatch_modes() > 0 or _function_modes() > 0


def pool_of(grid: list[int] | None) -> Pool:
    """The ``pool`` argument back from its form in a schema."""
    if grid is None:
        return None
    return "mean" if grid == [1, 1] else (grid[0], grid[1])


def gradient_strides(student: Tensor) -> tuple[int, ...]:
    """:func:`dense_strides` of an eager call."""
    strides = student.stride()
    return strides if student.is_contiguous() else _dense_strides(student.shape, strides)


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

_owners = getattr(torch._C, "_storage_Use_Count", None)


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
    if device.type != "cpu" or size < KEPT_BYTES or _owners is None:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    try:
        memory = _kept.pop()
    except IndexError:
        memory = None
    # Free: no tensor holds it, no other name in Python does, and no process shares it.
    if (
        memory is not None
        and memory.nbytes() == size
        and _owners(memory._cdata) == 1
        and sys.getrefcount(memory) == _ALONE
        and not memory.is_shared()
    ):
        gradient = torch.empty(0, dtype=dtype).set_(memory, 0, shape, strides)
    else:
        gradient = torch.empty_strided(shape, strides, dtype=dtype)
        memory = gradient.untyped_storage()
    _kept.append(memory)
    return gradient


def release_gradient_memory() -> None:
    """Give back what :func:`empty_gradient` keeps for the next gradient."""
    _kept.clear()
