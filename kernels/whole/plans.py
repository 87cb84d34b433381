"""What sizes decide about whole latents: blocks, splits and workspaces of the Gram pass and of its gradient."""

from __future__ import annotations

from ..launch import Launcher
from ..plans import Workspace
from ..tiling import GROUP, cdiv, next_power_of_2
from .apply import apply_kernel
from .gram import gram_kernel
from .runs import Runs

APPLY_TILE = 4096
"""Elements of a tile of the gradient, by eight warps."""

BLOCK_J = 16
"""Depth of a dot: an IEEE float32 dot holds its operands in registers."""

CORES = {16: (8, 128, 256, 8), 32: (8, 128, 256, 8), 64: (1, 64, 128, 8), 128: (1, 32, 64, 16)}
"""Slices and columns of a tile of r and f, columns of one of x, and warps, by rows: bfloat16 and float16 latents."""

APPLY_CORES = {16: (8, 256, 8), 32: (8, 128, 8), 64: (1, 64, 8), 128: (1, 64, 8)}
"""The same of the gradient: slices, columns, warps."""


class GramPlan:
    """Launch of :func:`gram_kernel` over ``samples`` relations of ``vectors``; ``batch``: theirs is the batch term.

    ``means``: the pass stores time averages too. ``half_precision``: of bfloat16 or float16, on tensor cores.
    """

    def __init__(
        self,
        samples: int,
        vectors: int,
        runs: Runs,
        processors: int,
        grams: bool,
        difference: bool,
        batch: bool,
        means: bool = False,
        mask_strides: tuple[int, int] = (0, 0),
        half_precision: bool = False,
    ) -> None:
        slices = 0
        if half_precision and grams:
            block_n = max(16, next_power_of_2(vectors))
            slices, block_l, block_x, warps = CORES[block_n]
            # The unit matrix of time averages takes shared memory.
            block_x = min(block_x, 64) if means and slices == 1 else block_x
        else:
            block_n = max(16, min(64, next_power_of_2(vectors)))
            # The addresses of time averages leave the registers room for tiles of one dot.
            block_l = 2 * BLOCK_J if block_n <= 32 and not means else BLOCK_J
            block_x, warps = block_l, 8 if block_n > 32 else 4
        blocks = cdiv(vectors, block_n)
        pairs = blocks * (blocks + 1) // 2
        tiles = runs.tiles(block_l)
        most = cdiv(tiles, 4)
        programs = cdiv(processors, samples * pairs)
        # Half as many bytes and dots for x as for r and f.
        splits_x = max(1, min(programs // 3, most))
        splits_s = max(1, min(programs - splits_x, most))
        half = vectors * (vectors + 1) // 2
        scores = 2 * half + vectors
        groups_x, groups_s = cdiv(splits_x, GROUP), cdiv(splits_s, GROUP)
        sums = groups_x * half + groups_s * scores
        workspace = Workspace(
            grams=samples * (half + scores), sums=samples * sums, scratch=samples * (vectors + 2) * vectors,
            losses=samples, pieces=samples * (splits_x * half + splits_s * scores),
        )  # fmt: skip
        self.workspace = workspace.size if grams else 0
        self.counters = samples * (groups_x + groups_s + 1) + 1
        self.launch = Launcher(
            gram_kernel,
            samples * (splits_x + splits_s) * pairs,
            (
                splits_x, splits_s, GROUP, blocks, runs.vec, block_n, block_l,
                max(16, next_power_of_2(vectors)), slices, block_x, runs.count == 1, grams, difference, batch,
            ),
            warps=warps,
            registers=255,
            fixed=(
                samples, vectors, runs.count, runs.lines, runs.length, tiles,
                *workspace.at("sums", "scratch", "losses", "pieces"), *sum(runs.strides, ()), *mask_strides,
            ),
        )  # fmt: skip


class ApplyPlan:
    """Launch of :func:`apply_kernel`: ``rows`` rows of M X from ``first`` on, and the batch gradient.

    ``exchanged``: samples of one frame take the place of frames.
    """

    def __init__(
        self,
        samples: int,
        vectors: int,
        first: int,
        rows: int,
        runs: Runs,
        processors: int,
        mask_strides: tuple[int, int],
        exchanged: bool = False,
        half_precision: bool = False,
    ) -> None:
        if half_precision:
            block_n = max(16, next_power_of_2(rows))
            slices, block_l, warps = APPLY_CORES[block_n]
        else:
            block_n = max(16, min(64, next_power_of_2(rows)))
            block_l = min(128, APPLY_TILE // block_n)
            slices, warps = 0, block_n * block_l // 512
        blocks = cdiv(rows, block_n)
        tiles = runs.tiles(block_l)
        splits = max(1, min(tiles, cdiv(8 * processors, samples * blocks)))
        self.launch = Launcher(
            apply_kernel,
            samples * splits * blocks,
            (
                splits, blocks, runs.vec, block_n, block_l, BLOCK_J, next_power_of_2(vectors), exchanged, slices,
                runs.count == 1,
            ),
            warps=warps,
            registers=255,
            fixed=(
                vectors, runs.count, runs.lines, runs.length, tiles, first, rows, *sum(runs.strides, ()), *mask_strides,
            ),
        )  # fmt: skip
