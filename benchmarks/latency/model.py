"""From walks to time: waves of programs beside the bandwidth, then the block that takes the last ticket."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.latency.launches import Launched
from benchmarks.latency.walk import CLOCK_HZ, Kernel, Program, Walk
from codmd.kernels.launch import ASSUMED_MULTIPROCESSORS
from codmd.kernels.tiling import cdiv

BOUNDARY_US = 1.2
"""Of a launch in a graph, before its first instruction."""

RESERVED_SHARED, SHARED = 1024, 228 * 1024
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
"""Of a multiprocessor: shared memory in bytes (of which the system takes some a block), registers, warps, blocks."""


@dataclass(frozen=True)
class Modelled:
    """One launch.

    ``program`` is one that ends without the last ticket, ``tail`` what the last block does beyond that, both in cycles;
    counts of instructions, barriers and loads are those of the last block, one warp.
    """

    kernel: str
    grid: int
    warps: int
    registers: int
    resident: int
    waves: int
    program: float
    tail: float
    instructions: int
    barriers: int
    loads: int
    dependent_loads: int
    waited: dict[str, float]
    estimated_us: float

    @property
    def cycles(self) -> float:
        """Of the critical path: one program and the tail."""
        return self.program + self.tail


def resident(launched: Launched) -> int:
    """Blocks that a multiprocessor holds at once."""
    per_warp = cdiv(launched.registers * 32, 256) * 256
    by_shared = SHARED // (launched.shared + RESERVED_SHARED)
    return max(1, min(BLOCKS, WARPS // launched.warps, REGISTERS // (per_warp * launched.warps), by_shared))


def _walk(kernel: Kernel, launched: Launched, block: int, last: bool) -> Walk:
    special = {
        "SR_TID.X": 0, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_LANEID": 0, "SR_CgaCtaId": 0, "SR_CTAID.X": block,
        "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SR_EQMASK": 1, "SR_LTMASK": 0, "SR_NTID": 32 * launched.warps,
    }  # fmt: skip
    return kernel.walk(Program({0: launched.constants}, special, launched.warps, launched.uncached, last))


def model(launched: Launched, bandwidth: float) -> Modelled:
    """Walk a launch's first and last block, with and without the last ticket; the longest tail counts."""
    kernel = Kernel(launched.code, launched.warps)
    blocks = sorted({0, launched.grid - 1})
    plain = [_walk(kernel, launched, block, False) for block in blocks]
    program = max(walk.cycles for walk in plain)
    ends = [_walk(kernel, launched, block, True) for block in blocks] if kernel.takes_tickets else plain
    final = max(ends, key=lambda walk: walk.cycles)
    tail = max(0.0, final.cycles - program)
    held = resident(launched)
    waves = cdiv(launched.grid, ASSUMED_MULTIPROCESSORS * held)
    streaming = program + max((waves - 1) * program, launched.moved / bandwidth * CLOCK_HZ)
    return Modelled(
        launched.kernel, launched.grid, launched.warps, launched.registers, held, waves, program, tail,
        final.instructions, final.barriers, final.loads, final.dependent_loads, dict(final.waited),
        BOUNDARY_US + (streaming + tail) / CLOCK_HZ * 1e6,
    )  # fmt: skip


def summary(op: str, shape: str, backend: str, arch: str, launches: list[Modelled], floor_us: float) -> dict[str, Any]:
    """A row of the table: the critical path of all launches one after another."""
    cycles = sum(m.cycles for m in launches)
    return {
        "op": op, "shape": shape, "backend": backend, "arch": arch,
        "modelled_cycles": round(cycles), "modelled_us": cycles / CLOCK_HZ * 1e6,
        "modelled_instructions": sum(m.instructions for m in launches),
        "modelled_barriers": sum(m.barriers for m in launches),
        "modelled_dependent_loads": sum(m.dependent_loads for m in launches),
        "estimated_us": sum(m.estimated_us for m in launches), "floor_us": floor_us,
        "launches": [asdict(m) for m in launches],
    }  # fmt: skip
