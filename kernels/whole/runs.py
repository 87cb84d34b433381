"""Whole latents as long vectors: the (c, h, w) part of a tensor as runs of evenly spaced elements."""

from __future__ import annotations

from ..tiling import Geometry, cdiv


class Runs:
    """The (c, h, w) part of equally shaped tensors as runs along which every tensor steps evenly.

    Attributes:
        lines: runs [channels, lines] of ``length`` elements; (1, 1) when a frame is one run.
        vec: elements of the widest access.
        strides: (b, f, c, h, w) a tensor, the first four in units of ``vec``.
    """

    def __init__(self, geometries: tuple[Geometry, ...], itemsizes: tuple[int, ...], aligned: bool) -> None:
        _, _, channels, height, width = geometries[0].sizes
        rows_join = all(g.strides[3] == width * g.strides[4] or height == 1 for g in geometries)
        planes_join = rows_join and all(
            g.strides[2] == height * width * g.strides[4] or channels == 1 for g in geometries
        )
        if all(g.strides[4] == 1 or width == 1 for g in geometries):
            step = [1] * len(geometries)
        else:
            step = [g.strides[4] for g in geometries]
        if width == 1:
            rows_join = planes_join = False
        self.channels = 1 if planes_join else channels
        self.lines = 1 if rows_join else height
        self.length = width * (height if rows_join else 1) * (channels if planes_join else 1)
        self.count = self.channels * self.lines
        self.vec = 1
        if aligned and all(s == 1 for s in step):
            used = [s for g in geometries for s in (*g.strides[:2], *self._inner(g))]
            self.vec = 16 // max(itemsizes)
            while any(s % self.vec for s in (self.length, *used)):
                self.vec //= 2
        self.strides = tuple(
            (*(s // self.vec for s in (*g.strides[:2], *self._inner(g))), w)
            for g, w in zip(geometries, step, strict=True)
        )

    def _inner(self, geometry: Geometry) -> tuple[int, int]:
        c, h = geometry.strides[2:4]
        return (c if self.channels > 1 else 0), (h if self.lines > 1 else 0)

    def tiles(self, block: int) -> int:
        return self.count * cdiv(self.length, block)
