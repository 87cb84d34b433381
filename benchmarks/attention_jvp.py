"""`attention_jvp` without a GPU: floor, estimated time and counted memory of its kernel; part of docs/performance.md.

The floor is the products' arithmetic at the H100's dense bfloat16 rate. The estimate adds the softmax between them,
which nothing overlaps: a multiprocessor holds one program. Neither is a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from codmd.kernels.attention.plans import WARPGROUPS
from codmd.kernels.launch import ASSUMED_MULTIPROCESSORS
from codmd.kernels.tiling import cdiv

PEAK, CLOCK_HZ = 989e12, 1.755e9
"""Of an H100 SXM's data sheet: dense bfloat16 operations a second, cycles a second."""

EXPONENTIALS, LANES = 16, 128
"""Results that a multiprocessor has in a cycle: exp2, and float32 arithmetic."""

PER_SCORE, PER_RESULT = 12, 1
"""Counted in the source, float32 operations: on a score of a tile, and on an element of each accumulator."""


@dataclass(frozen=True)
class Case:
    """One attention layer of one sample; `tangents` of q, k and v."""

    name: str
    heads: int
    queries: int
    keys: int
    tangents: str = "qkv"
    head: int = 128

    @property
    def products(self) -> int:
        """Of a tile of queries with a tile of keys: two of attention, one for each term of its tangent."""
        moving = ("q" in self.tangents) + ("k" in self.tangents)
        return 2 + moving + (moving > 0) + ("v" in self.tangents)

    @property
    def flops(self) -> int:
        return self.products * 2 * self.heads * self.queries * self.keys * self.head

    @property
    def floor_ms(self) -> float:
        return self.flops / PEAK * 1e3

    @property
    def estimated_ms(self) -> float:
        """Programs one after another on every multiprocessor, tiles one after another in a program."""
        rows, columns = WARPGROUPS.queries, WARPGROUPS.keys
        products = self.products * 2 * rows * columns * self.head / (PEAK / ASSUMED_MULTIPROCESSORS / CLOCK_HZ)
        softmax = rows * columns * (1 / EXPONENTIALS + PER_SCORE / LANES)
        softmax += 2 * rows * self.head * PER_RESULT / LANES
        waves = cdiv(self.heads * cdiv(self.queries, rows), ASSUMED_MULTIPROCESSORS)
        return waves * cdiv(self.keys, columns) * (products + softmax) / CLOCK_HZ * 1e3

    @property
    def results_mb(self) -> float:
        """The output and its tangent, bfloat16: all that the kernel allocates."""
        return 2 * 2 * self.heads * self.queries * self.head / 1e6

    @property
    def scores_gb(self) -> float:
        """One table of scores, which dense attention keeps several of, bfloat16."""
        return 2 * self.heads * self.queries * self.keys / 1e9


CASES = (
    Case("Wan 1.3B, 480p, 81 frames", 12, 32760, 32760),
    Case("Wan 1.3B, 480p, text", 12, 32760, 512, "q"),
    Case("Wan 14B, 480p, 81 frames", 40, 32760, 32760),
    Case("Wan 14B, 720p, 81 frames", 40, 75600, 75600),
)


def table() -> str:
    """One layer of one sample each, in Markdown."""
    lines = [
        "| layer | products a tile | TFLOP | floor ms | estimated ms | MB allocated | GB, one table of scores |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        lines.append(
            f"| {case.name} | {case.products} | {case.flops / 1e12:.1f} | {case.floor_ms:.1f} "
            f"| {case.estimated_ms:.1f} | {case.results_mb:.0f} | {case.scores_gb:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
