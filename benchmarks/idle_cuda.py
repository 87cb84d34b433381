"""Triton's own launcher where there is no GPU: its calls reach a CUDA driver that does nothing.

The kernels are compiled for sm_90 and loaded, and launches go through Triton's Python and C code down to
``cuLaunchKernelEx`` of ``csrc/tests/idle_cuda.c``. So the host time of everything but the driver itself can be
measured, and what a launch passes to the driver can be read back. Nothing is computed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "tests" / "idle_cuda.c"
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8, "fp32": 4}
"""Of a kernel's parameters by Triton's names of their types; those of pointers begin with ``*``."""


class Seen(NamedTuple):
    """What the driver was asked to launch: grid (3), threads and shared memory; the parameters' bits."""

    shape: tuple[int, ...]
    parameters: tuple[int, ...]


class IdleCuda:
    """Build the driver, load it as ``libcuda.so.1`` and let Triton and the operators use it, in this process for good.

    Call it before anything launches. Needs a C compiler.

    Raises:
        RuntimeError: torch has a GPU, whose driver would be hidden; or nothing compiles C here.
    """

    def __init__(self) -> None:
        import torch
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia import driver

        if torch.cuda.is_available():
            raise RuntimeError("an idle CUDA driver would hide this machine's GPU")
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("the idle CUDA driver needs a C compiler: set CC")
        folder = Path(tempfile.mkdtemp(prefix="idle_cuda_"))
        library = folder / "libcuda.so.1"
        headers = Path(driver.__file__).parent / "include"
        build = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*build, f"-I{headers}", str(SOURCE), "-o", str(library)], check=True)
        (folder / "libcuda.so").symlink_to(library.name)  # older releases of Triton link with -lcuda
        # The name under which it is loaded, libcuda.so.1, is the one Triton's C code asks for.
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.idle_latest.restype = ctypes.c_long

        class Driver(driver.CudaDriver):  # type: ignore[misc]
            def __init__(self) -> None:
                self.utils = driver.CudaUtils()
                self.launcher_cls = driver.CudaLauncher
                self.get_device_capability = lambda device=0: (9, 0)
                self.get_current_device = lambda: 0
                self.set_current_device = lambda device: None
                self.get_current_stream = lambda device: 0

            def get_current_target(self) -> Any:
                return GPUTarget("cuda", 90, 32)

        with triton.knobs.nvidia.scope():
            triton.knobs.nvidia.libcuda_path = str(folder)
            triton.runtime.driver.set_active(Driver())

        from codmd import backends

        backends.BACKENDS["triton"] = replace(backends.BACKENDS["triton"], devices=("cuda", "cpu"))

    def expect(self, compiled: Any) -> None:
        """The launches to come are of this ``CompiledKernel``: read its parameters."""
        kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
        sizes = [8 if kind.startswith("*") else BYTES[kind] for kind in kinds]
        self._library.idle_expect((ctypes.c_int * len(sizes))(*sizes), len(sizes))
        self._count = len(sizes)

    def latest(self) -> tuple[int, Seen]:
        """Launches so far, and the latest one, whose kernel was expected."""
        shape, values = (ctypes.c_uint * 5)(), (ctypes.c_uint64 * max(1, self._count))()
        launches = self._library.idle_latest(shape, values)
        return launches, Seen(tuple(shape), tuple(values)[: self._count])
