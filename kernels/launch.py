"""Launching kernels with little host time: compiled once, then called with its constants bound.

A :class:`Launcher` belongs to one plan, whose key fixes everything Triton specialises on: dtypes, sizes, strides,
pointer alignment, the device. So Triton's own argument binder, several times the cost of a launch, is paid once;
afterwards :func:`codmd.private.launch_of` calls the compiled kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from codmd import private

INTERPRETING = bool(triton.knobs.runtime.interpret)
"""Triton's CPU interpreter runs the kernels (``TRITON_INTERPRET=1`` before the first import of triton)."""

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
"""Release of Triton."""

ASSUMED_MULTIPROCESSORS = 132
"""Used to choose tiles where no device can be asked: under the interpreter and for ahead-of-time compilation."""

ASSUMED_ARCHITECTURE = "sm_90"
"""Likewise; :func:`assuming` replaces it."""

_hooked = private.hooked_of(triton.knobs.runtime)


class _Interpreted:
    """What :class:`Launcher` uses of a ``CompiledKernel``, run by Triton's interpreter."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments, stream: self._kernel(*arguments)


class Launcher:
    """A kernel with its grid, last parameters and compilation options bound.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs.
        constants: values of its constexpr parameters, the last ones, in order.
        warps: warps a program.
        registers: most registers a thread may take, on NVIDIA GPUs; None leaves the choice to the assembler.
        wavefronts: warps a program on AMD GPUs, whose warps have 64 lanes; None means ``warps``.
        fixed: values of the parameters before the constants that every call shares.
        stages: tiles of a loop that are on their way at once.
    """

    __slots__ = (
        "_compiled", "_last", "_launch", "constants", "fixed", "grid", "kernel", "registers", "stages", "warps",
        "wavefronts",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        grid: int,
        constants: tuple[Any, ...],
        warps: int,
        registers: int | None = None,
        wavefronts: int | None = None,
        fixed: tuple[Any, ...] = (),
        stages: int = 1,
    ) -> None:
        self.kernel = kernel
        self.grid = (grid, 1, 1)
        self.constants = constants
        self.warps = warps
        self.registers = registers
        self.wavefronts = warps if wavefronts is None else wavefronts
        self.fixed = fixed
        self.stages = stages
        self._last = *fixed, *constants
        self._compiled: Any = None
        self._launch: Callable[..., None] | None = None

    def options(self, backend: str) -> dict[str, Any]:
        """Options of ``triton.compile`` for ``"cuda"`` or ``"hip"``."""
        warps = self.wavefronts if backend == "hip" else self.warps
        options = {"num_warps": warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if self.registers is not None and backend == "cuda":
            options["maxnreg"] = self.registers
        return options

    def start(self, arguments: tuple[Any, ...]) -> Any:
        """Compile for ``arguments``, all of them, and launch; returns Triton's ``CompiledKernel``."""
        if INTERPRETING:
            run = self.kernel[self.grid]
            run(*arguments)
            return _Interpreted(run)
        options = self.options("hip" if torch.version.hip else "cuda")
        return self.kernel[self.grid](*arguments, **options)

    def __call__(self, stream: int, *arguments: Any) -> None:
        if self._launch is None:
            with relaxed_capture():
                self._compiled = self.start((*arguments, *self._last))
            self._launch = private.launch_of(self._compiled, self.grid, TRITON)
        elif _hooked():
            self._compiled[self.grid](*arguments, *self._last, stream=stream)
        else:
            self._launch(stream, (*arguments, *self._last))


@dataclass(frozen=True)
class Launch:
    """One recorded launch: which kernel, how configured, on what."""

    launcher: Launcher
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return str(self.launcher.kernel.fn.__name__)

    @property
    def values(self) -> dict[str, Any]:
        """Parameter names and the values passed for them."""
        names = self.launcher.kernel.arg_names
        last = self.launcher.fixed + self.launcher.constants
        return dict(zip(names, self.arguments + last, strict=True))


@contextlib.contextmanager
def recording(run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches made inside; unless ``run``, none is executed, so that meta tensors will do."""
    launches: list[Launch] = []
    original = Launcher.__call__

    def record(self: Launcher, stream: int, *arguments: Any) -> None:
        launches.append(Launch(self, arguments))
        if run:
            original(self, stream, *arguments)

    Launcher.__call__ = record  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        Launcher.__call__ = original  # type: ignore[method-assign]


RELAXED = 2
"""Of ``CUstreamCaptureMode`` and of ``hipStreamCaptureMode``."""


def _exchange_capture_mode() -> Callable[[Any], int] | None:
    """The driver's function that exchanges this thread's capture mode; None without a GPU or an old driver."""
    if INTERPRETING or not torch.cuda.is_available():
        return None
    library, name = ("libamdhip64.so", "hip") if torch.version.hip else ("libcuda.so.1", "cu")
    try:
        return getattr(ctypes.CDLL(library), f"{name}ThreadExchangeStreamCaptureMode")
    except (OSError, AttributeError):
        return None


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """Let this thread load a module while a stream is captured, as PyTorch lets its allocator call cudaMalloc.

    A capture forbids its thread, and in the usual mode every other, what may wait for the device; loading a kernel
    may. In relaxed mode the thread may do so, and the capture goes on.
    """
    exchange = _exchange_capture_mode()
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(RELAXED)
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of ``device``."""
    if device.type != "cuda":
        return ASSUMED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``: what tiles are chosen for."""
    return _architecture(device) if device.type == "cuda" else ASSUMED_ARCHITECTURE


@functools.cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@contextlib.contextmanager
def assuming(name: str) -> Iterator[None]:
    """Choose tiles for an architecture that is not there."""
    global ASSUMED_ARCHITECTURE
    before, ASSUMED_ARCHITECTURE = ASSUMED_ARCHITECTURE, name
    try:
        yield
    finally:
        ASSUMED_ARCHITECTURE = before


def current_stream(tensor: Tensor) -> int:
    """Raw handle of torch's current stream on the device of ``tensor``; 0 where that is no GPU."""
    return private.current_stream(tensor.get_device()) if tensor.is_cuda else 0


def elsewhere(tensor: Tensor) -> bool:
    """Whether ``tensor`` lies on a GPU that is not the current one."""
    return tensor.is_cuda and tensor.get_device() != private.current_device()
