"""Private interfaces of PyTorch and Triton, each with its fallback where a release lacks it.

They save host time before a kernel, or see what no public function shows. ``tests/test_private.py`` holds each to its
fallback.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import forward_ad

transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
"""Whether a torch.func transform surrounds the call. Fallback: PyTorch's own refusal, further down."""

_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_function_mode: Callable[[int], Any] = getattr(torch._C, "_get_function_stack_at", lambda place: None)
try:
    from torch.utils._device import DeviceContext
except ImportError:
    DeviceContext: Any = ()  # type: ignore[no-redef]


def modes_active() -> bool:
    """Whether a dispatch or function mode may want to see the call. Fallback: always, through the dispatcher.

    That of a default device, which lies under all others, wants to see calls without a device alone.
    """
    functions = _function_modes()
    if functions == 1 and isinstance(_function_mode(0), DeviceContext):
        functions = 0
    return functions > 0 or _dispatch_modes() > 0


def dual_level_active() -> bool:
    """Whether tensors may be dual numbers. Fallback: always, each is then looked at."""
    return getattr(forward_ad, "_current_level", 0) >= 0


is_zero: Callable[[torch.Tensor], bool] = getattr(torch.Tensor, "_is_zerotensor", lambda tensor: False)
"""Whether a tensor is the zero that forward AD writes for a tangent, without memory. Fallback: its values are read."""


storage_owners: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
"""How many tensors hold the storage of a ``_cdata``. Fallback: None; no memory is used a second time."""


def base_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``apply`` of an ``autograd.Function`` before it binds defaults. Fallback: ``apply`` itself."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


_resolve_group: Callable[[str], dist.ProcessGroup] | None = getattr(
    dist.distributed_c10d, "_resolve_process_group", None
)
_groups: weakref.WeakValueDictionary[str, dist.ProcessGroup] = weakref.WeakValueDictionary()


def name_of_group(group: dist.ProcessGroup) -> str:
    """The name that stands for a group in an operator's schema, which cannot hold a group."""
    if _resolve_group is None:
        _groups[group.group_name] = group
    return group.group_name


def group_of_name(name: str) -> dist.ProcessGroup:
    """The group of :func:`name_of_group`. Fallback: those that this process named."""
    return _groups[name] if _resolve_group is None else _resolve_group(name)


_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(index: int) -> int:
    """Raw handle of the current stream of a CUDA device. Fallback: through a ``torch.cuda.Stream``."""
    return torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index)


current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""Index of the current CUDA device. Fallback: the public function, which may initialise CUDA."""


def fake_tensors() -> contextlib.AbstractContextManager[Any]:
    """Tensors made inside have a shape, a dtype and a device, and no memory. Fallback: they have memory."""
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        return contextlib.nullcontext()
    return FakeTensorMode()


def one_of(processes: int) -> contextlib.AbstractContextManager[bool]:
    """The first of so many processes, whose collectives move shapes and no numbers; false where that is not to be had.

    Fallback: this process stays alone.
    """
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError:
        return contextlib.nullcontext(False)
    return _joined(processes, FakeStore())


@contextlib.contextmanager
def _joined(processes: int, store: Any) -> Iterator[bool]:
    dist.init_process_group("fake", rank=0, world_size=processes, store=store)
    try:
        yield True
    finally:
        dist.destroy_process_group()


_lerp_all: Callable[[list[torch.Tensor], list[torch.Tensor], float], None] | None = getattr(
    torch, "_foreach_lerp_", None
)


def lerp_all(values: list[torch.Tensor], ends: list[torch.Tensor], weight: float) -> None:
    """``value.lerp_(end, weight)`` of every pair, in one launch. Fallback: one by one."""
    if _lerp_all is not None:
        return _lerp_all(values, ends, weight)
    for value, end in zip(values, ends, strict=True):
        value.lerp_(end, weight)


def hooked_of(knobs: Any) -> Callable[[], bool]:
    """Whether a profiler hangs onto Triton's launches, by ``triton.knobs.runtime``.

    Triton calls even empty chains of hooks. Fallback: always, and Triton calls what there is.
    """
    if not hasattr(knobs, "launch_enter_hook") or not hasattr(knobs, "launch_exit_hook"):
        return lambda: True
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    entered, left = getattr(enter, "calls", enter), getattr(leave, "calls", leave)
    return lambda: bool(knobs.launch_enter_hook is not enter or knobs.launch_exit_hook is not leave or entered or left)


def launch_of(compiled: Any, grid: tuple[int, int, int], version: tuple[int, ...]) -> Callable[..., None]:
    """``launch(stream, arguments)`` of a ``CompiledKernel``, without hooks, by the release of Triton.

    Triton 3.9 for CUDA: its C function, past the Python around it, unless the kernel wants scratch memory. Otherwise
    the launcher that ``compiled[grid]`` calls. Fallback: ``compiled[grid]``.
    """
    if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
        return lambda stream, arguments: compiled[grid](*arguments, stream=stream)
    run: Any = compiled.run
    x, y, z = grid
    function, metadata, no_hooks = compiled.function, compiled.packed_metadata, (None, None, None)
    scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if version != (3, 9) or scratch or getattr(run, "gsan_enabled", True):
        return lambda stream, arguments: run(x, y, z, stream, function, metadata, *no_hooks, *arguments)
    launch, no_scratch = run.launch, (None, None)
    cooperative, dependent = run.launch_cooperative_grid, run.launch_pdl
    kinds = run.arg_annotations, run.kernel_signature
    return lambda stream, arguments: launch(
        x, y, z, stream, function, cooperative, dependent, metadata, *no_hooks, *no_scratch, *kinds, arguments
    )
