"""Tiles of :func:`attention_jvp_kernel` by architecture, and the launch of one call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import INTERPRETING, Launcher
from ..tiling import cdiv, next_power_of_2
from .jvp import attention_jvp_kernel

LARGEST_HEAD = 128
"""Columns of a head whose two accumulators fit in registers."""


class Tiles(NamedTuple):
    """Rows of queries and of keys in a tile, columns of a product of queries with keys (0: all), warps, stages."""

    queries: int
    keys: int
    columns: int
    warps: int
    stages: int


WARPGROUPS = Tiles(128, 32, 0, 8, 2)
"""wgmma and tcgen05, which read Q and Q̇ from shared memory."""

WARPS = Tiles(128, 16, 0, 8, 2)
"""mma.sync, which holds Q and Q̇ in registers beside the accumulators: fewer keys."""

WARPS_NARROW = Tiles(128, 32, 0, 8, 2)
"""The same for heads of up to 64."""

MATRIX_CORES = Tiles(64, 32, 0, 8, 1)
"""MFMA: wavefronts of 64 threads, 64 KiB of LDS."""

SINGLE = Tiles(32, 16, 16, 8, 1)
"""IEEE float32, which has no matrix instruction: a product's operands lie in registers."""


def tiles(architecture: str, dtype: torch.dtype, columns: int) -> Tiles:
    """What compiles without spills, by ``python -m benchmarks.static``."""
    if dtype == torch.float32:
        return SINGLE
    if not architecture.startswith("sm_"):
        return MATRIX_CORES
    if architecture.startswith(("sm_9", "sm_10")):
        return WARPGROUPS
    return WARPS if columns > 64 else WARPS_NARROW


class AttentionPlan:
    """Launch of :func:`attention_jvp_kernel`; ``strides`` are of (b, h, n) of every tensor, ``aligned`` to 16 bytes."""

    def __init__(
        self,
        shape: tuple[int, ...],
        keys: int,
        dtype: torch.dtype,
        strides: tuple[int, ...],
        aligned: bool,
        architecture: str,
    ) -> None:
        samples, heads, queries, head = shape
        columns = max(16, next_power_of_2(head))
        tile = tiles(architecture, dtype, columns)
        blocks = cdiv(queries, tile.queries)
        vec = 16 // dtype.itemsize if aligned else 1
        while head % vec or any(stride % vec for stride in strides):
            vec //= 2
        upcast = INTERPRETING and dtype == torch.bfloat16
        self.launch = Launcher(
            attention_jvp_kernel,
            samples * heads * blocks,
            (head, columns, tile.columns or columns, tile.queries, tile.keys, vec, upcast),
            warps=tile.warps,
            fixed=(head**-0.5, heads, queries, keys, blocks, *(stride // vec for stride in strides)),
            stages=tile.stages,
        )
