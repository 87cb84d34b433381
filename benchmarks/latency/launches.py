"""The launches of an operator as the walk needs them: code, grid and the bytes of every parameter.

Those of the Triton kernels are recorded on meta tensors and compiled as :mod:`benchmarks.static` does. Addresses are
made up: one range for each tensor.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from benchmarks.idle_cuda import BYTES
from benchmarks.latency.sass import Code, parse
from benchmarks.roofline import OPERATORS
from benchmarks.static import compiled_for, specialise
from benchmarks.traffic import traffic
from codmd.kernels.launch import Launch


@dataclass(frozen=True)
class Layout:
    """Where bank 0 holds the size of a block, that of the grid, and the parameters."""

    block: int
    grid: int
    parameters: int


LAYOUTS = {"sm_90": Layout(0x0, 0xC, 0x210), "sm_100": Layout(0x360, 0x370, 0x380)}


@dataclass(frozen=True)
class Launched:
    """One launch: ``constants`` is bank 0, ``uncached`` where latents lie, ``moved`` the bytes from and to memory."""

    kernel: str
    code: Code
    grid: int
    warps: int
    registers: int
    shared: int
    constants: bytes
    uncached: tuple[tuple[int, int], ...]
    moved: int


def disassemble(binary: Path, tool: str) -> dict[str, Code]:
    """Kernels of a cubin by name."""
    done = subprocess.run([tool, "-c", "-hex", str(binary)], capture_output=True, text=True, check=True)
    return parse(done.stdout.splitlines())


def registers_of(binary: Path, tool: str) -> dict[str, int]:
    """Registers a thread of each kernel of a cubin."""
    done = subprocess.run([tool, "-res-usage", str(binary)], capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\S+):\s*\n?.*?REG:(\d+)", done.stdout + done.stderr, re.DOTALL)
    return {name: int(count) for name, count in found}


def bank(layout: Layout, threads: int, grid: int, parameters: bytes) -> bytes:
    """Bank 0 of a launch, and zeros beyond it, so that its last bytes can be read as parts of words."""
    found = bytearray(layout.parameters)
    struct.pack_into("<3I", found, layout.block, threads, 1, 1)
    struct.pack_into("<3I", found, layout.grid, grid, 1, 1)
    return bytes(found) + parameters + bytes(3)


def _parameters(launch: Launch) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """A recorded launch's parameters, and the addresses of its latents: its tensors of five dimensions."""
    signature, _, _ = specialise(launch)
    packed = bytearray()
    latents = []
    for number, (name, kind) in enumerate(signature.items(), 1):
        if kind == "constexpr":
            continue
        value: Any = launch.values[name]
        size = 8 if kind.startswith("*") else BYTES[kind]
        packed += bytes(-len(packed) % size)
        if isinstance(value, Tensor):
            packed += struct.pack("<Q", number << 40)
            if value.ndim == 5:
                latents.append((number << 40, (number << 40) + value.numel() * value.element_size()))
        else:
            packed += struct.pack("<f", value) if kind == "fp32" else int(value).to_bytes(size, "little", signed=True)
    # Pointers of Triton's own follow: scratch memory, which these kernels have none of.
    return bytes(packed) + bytes(-len(packed) % 8) + bytes(16), tuple(latents)


def triton_launches(op: str, shape: tuple[int, ...], arch: str) -> list[Launched]:
    """The launches of an operator's Triton kernels, forward and backward."""
    found = []
    for launch in OPERATORS[op](shape):
        compiled = compiled_for(launch, arch)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            binary = Path(file.name)
            binary.write_bytes(compiled.asm["cubin"])
            code = disassemble(binary, triton.knobs.nvidia.nvdisasm.path)[launch.name]
            registers = registers_of(binary, triton.knobs.nvidia.cuobjdump.path)[launch.name]
        grid, warps = launch.launcher.grid[0], launch.launcher.warps
        parameters, latents = _parameters(launch)
        constants = bank(LAYOUTS[arch], 32 * warps, grid, parameters)
        shared = compiled.metadata.shared
        found.append(
            Launched(launch.name, code, grid, warps, registers, shared, constants, latents, traffic([launch]).moved)
        )
    return found
