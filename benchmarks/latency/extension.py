"""The launches of the CUDA extension: its host code on a runtime that records them, its kernels from nvcc's objects.

The extension is built for the one architecture into ``build/``, once for the same sources.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from filelock import FileLock
from torch import Tensor

from benchmarks.latency.launches import LAYOUTS, Launched, bank, disassemble
from benchmarks.latency.sass import Code
from benchmarks.nvcc import load_nvcc
from benchmarks.static_cases import MEAN, NUMBERS, latents, objective
from codmd.kernels.launch import ASSUMED_MULTIPROCESSORS
from codmd.ops.backends import cuda
from codmd.ops.contract import Call, Relation, Upstream

ROOT = Path(__file__).parents[2]
RECORDER = ROOT / "csrc/tests/cudart_recorder.cpp"


@dataclass(frozen=True)
class Kernel:
    """A kernel of the extension: its code, registers a thread, and bytes of its parameter."""

    code: Code
    registers: int
    parameter: int


@dataclass(frozen=True)
class Extension:
    """The recording extension, its runtime, and its kernels by their symbols."""

    module: ModuleType
    runtime: Any
    kernels: dict[str, Kernel]
    arch: str


def _kernels(binary: Path, arch: str) -> dict[str, Kernel]:
    """The kernels of an object of nvcc."""
    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tools.cuobjdump.path, "-xelf", arch, str(binary)], cwd=folder, check=True, capture_output=True)
        (cubin,) = Path(folder).glob("*.cubin")
        code = disassemble(cubin, tools.nvdisasm.path)
        usage = [tools.cuobjdump.path, "-res-usage", str(cubin)]
        said = subprocess.run(usage, capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\S+):\s*\n?.*?REG:(\d+).*?CONSTANT\[0\]:(\d+)", said.stdout + said.stderr)
    return {
        name: Kernel(code[name], int(registers), int(size) - LAYOUTS[arch].parameters)
        for name, registers, size in found
    }


def described(module: ModuleType, runtime: Any, objects: Sequence[Path], arch: str) -> Extension:
    """A recording extension that was linked of ``objects``, its runtime told how long parameters are."""
    kernels: dict[str, Kernel] = {}
    for binary in objects:
        kernels |= _kernels(binary, arch)
    runtime.recorded.restype = ctypes.c_char_p
    for name, kernel in kernels.items():
        runtime.tell_parameter_size(name.encode(), ctypes.c_size_t(kernel.parameter))
    return Extension(module, runtime, kernels, arch)


@functools.cache
def extension(arch: str) -> Extension:
    """The extension for ``sm_90`` or another architecture that nvcc and the walk know.

    Raises:
        codmd_nvcc.Unavailable: there is no nvcc, or it cannot compile the sources.
    """
    import pybind11

    nvcc = load_nvcc()
    toolkit = nvcc.find_toolkit()
    sources = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".cpp", ".cu", ".h", ".inl")]
    key = hashlib.sha256(b"\0".join([toolkit.nvcc.encode(), *(path.read_bytes() for path in sources)])).hexdigest()[:16]
    folder = ROOT / "build" / f"recorded-{arch}-{key}"
    target = folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not target.exists():
            nvcc.compile_sources(toolkit, [int(arch.removeprefix("sm_"))], str(folder))
            includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
            flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f'-DCODMD_CUDA_TARGETS="{arch}"']
            compiler = os.environ.get("CXX", "g++")
            binding, built = str(folder / "binding.o"), str(folder / "built.so")
            subprocess.run([compiler, *flags, *includes, "-c", str(ROOT / nvcc.BINDING), "-o", binding], check=True)
            objects = [binding, *map(str, folder.glob("*.cu.o")), str(RECORDER)]
            # Symbolic, for a torch built for CUDA has brought its own runtime into the process.
            subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-Bsymbolic", *objects, "-o", built], check=True)
            os.replace(built, target)
    spec = importlib.util.spec_from_file_location("_C_cuda", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return described(module, ctypes.CDLL(str(target)), sorted(folder.glob("*.cu.o")), arch)


def _placed(call: Call) -> Call:
    """The same call on memory of its own, which nobody writes or reads: addresses are what a launch is made of."""
    return call._make(torch.empty(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for v in call)


CALLS: dict[str, Callable[[tuple[int, ...]], Call]] = {
    "relation_loss": lambda shape: Relation(*latents(shape), None, "bfchw", MEAN, True, True, NUMBERS),
    "relation_loss, pool=None": lambda shape: Relation(*latents(shape), None, "bfchw", None, True, True, NUMBERS),
    "dmd_loss": lambda shape: objective(shape, relation=False),
    "codmd_loss": objective,
}
"""The calls that ``benchmarks.roofline.OPERATORS`` records of the Triton kernels."""


def recorded_launches(made: Extension, op: str, shape: tuple[int, ...]) -> list[Launched]:
    """The launches of an operator by an extension, forward and backward."""
    call = _placed(CALLS[op](shape))
    out = torch.empty_like(call.student)
    with mock.patch.multiple(cuda, _C=made.module, _SIMULATED_PROCESSORS=ASSUMED_MULTIPROCESSORS, _tickets={}):
        made.runtime.forget(0)
        found = cuda.relation(call) if isinstance(call, Relation) else cuda.objective(call, True)
        write = cuda.whole_gradient if call.pool is None else cuda.gradient
        write(out, Upstream(torch.empty(()), None, None, None), call, found)
    latent = out.numel() * out.element_size()
    places = [t.data_ptr() for t in (*call, out) if isinstance(t, Tensor) and t.ndim == 5]
    lines = made.runtime.recorded().decode().splitlines()
    return [_launched(made, line.split(), [(place, place + latent) for place in places]) for line in lines]


def _launched(made: Extension, line: list[str], latents: list[tuple[int, int]]) -> Launched:
    """A line of the record; every latent that its parameter names is moved once."""
    symbol, _device, _stream, blocks, threads, shared, parameter = line
    kernel = made.kernels[symbol]
    (name,) = re.findall(r"\d([A-Z][A-Za-z]*Pass)", symbol)
    given = bytes.fromhex(parameter)
    words = set(struct.unpack_from(f"<{len(given) // 8}Q", given))
    named = tuple(place for place in latents if place[0] in words)
    return Launched(
        name, kernel.code, int(blocks), int(threads) // 32, kernel.registers, int(shared),
        bank(LAYOUTS[made.arch], int(threads), int(blocks), given), named, sum(last - first for first, last in named),
    )  # fmt: skip


def cuda_launches(op: str, shape: tuple[int, ...], arch: str) -> list[Launched]:
    """The launches of an operator's CUDA kernels, forward and backward."""
    return recorded_launches(extension(arch), op, shape)
