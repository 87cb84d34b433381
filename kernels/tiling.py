"""The tiling of a latent over programs: vector width, tiles and splits, from sizes and strides alone.

The tables take the place of autotuning: the choice is the same in every process, costs nothing at the first call,
and can be compiled ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE_BYTES = 4096
"""Bytes of one tensor that a program of 4 warps has in flight: two 16-byte vectors a thread."""

WAVES = 8
"""Programs wanted per multiprocessor before planes stop being split."""

RESIDENT = 2
"""Programs of 8 warps and 128 registers that a multiprocessor holds at once."""

START = 4
"""Pieces whose time the launch of a program and its ticket take."""

MOST_SPLITS = 16

GROUP = 16
"""Splits of the long axis of whole latents that one block adds up."""


@dataclass(frozen=True)
class Geometry:
    """Sizes, and element strides of b, f, c, h, w, of one latent tensor in canonical order."""

    sizes: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int, int]

    @staticmethod
    def of(shape: tuple[int, ...], stride: tuple[int, ...], layout: str) -> Geometry:
        order = (0, 1, 2, 3, 4) if layout == "bfchw" else (0, 2, 1, 3, 4)
        sizes = tuple(shape[i] for i in order)
        # The stride of an axis of size 1 never matters; 0 keeps it from narrowing the vectors.
        strides = tuple(stride[i] if shape[i] > 1 else 0 for i in order)
        return Geometry(sizes, strides)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Tiling:
    """Constants of the pooling and broadcasting kernels, and strides in units of ``vec`` elements."""

    flat: bool
    vec: int
    tile_h: int
    tile_w: int
    splits: int
    column_tiles: int
    strides: tuple[tuple[int, int, int, int, int], ...]

    @property
    def constants(self) -> tuple[int | bool, ...]:
        """SPLITS, COLUMN_TILES, FLAT, VEC, TILE_H, TILE_W."""
        return self.splits, self.column_tiles, self.flat, self.vec, self.tile_h, self.tile_w


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def vector_width(geometries: tuple[Geometry, ...], flat: bool, grid_h: int, itemsize: int, aligned: bool) -> int:
    """Elements of the widest access, up to 16 bytes, at which every run of every tensor starts and ends."""
    height, width = geometries[0].sizes[3:]
    if not aligned or any(g.strides[4] not in (0, 1) for g in geometries):
        return 1
    run = height * width if flat and grid_h == 1 else width
    steps = [run, *(s for g in geometries for s in g.strides[: 3 if flat else 4])]
    vec = 16 // itemsize
    while any(step % vec for step in steps):
        vec //= 2
    return vec


def is_contiguous(geometry: Geometry) -> bool:
    """Whether a plane is one contiguous run."""
    height, width = geometry.sizes[3:]
    line, column = geometry.strides[3:]
    return column == (1 if width > 1 else 0) and (height == 1 or line == width)


def is_constant(geometry: Geometry) -> bool:
    """Whether a plane is one value."""
    return geometry.strides[3:] == (0, 0)


def tile_planes(
    geometries: tuple[Geometry, ...],
    grid: tuple[int, int],
    itemsize: int,
    aligned: bool,
    processors: int,
    tile_bytes: int | None = None,
    companions: tuple[Geometry, ...] = (),
    tiles: int | None = None,
) -> Tiling:
    """Cut the (h, w) planes of equally shaped tensors.

    Args:
        geometries: one a tensor, sizes equal.
        grid: regions (gh, gw) of a plane.
        itemsize: bytes of an element.
        aligned: every base address is a multiple of 16 bytes.
        processors: multiprocessors to fill.
        tile_bytes: bytes of one tensor in a tile; None means TILE_BYTES.
        companions: tensors read element by element, such as masks: they do not narrow the vectors, and a constant
            plane joins any cut.
        tiles: of a piece, for programs that take several pieces one after another; None splits to fill processors.
    """
    samples, frames, channels, height, width = geometries[0].sizes
    flat = (
        grid[1] == 1
        and all(is_contiguous(g) for g in geometries)
        and all(is_contiguous(g) or is_constant(g) for g in companions)
    )
    vec = vector_width(geometries, flat, grid[0], itemsize, aligned)
    tile = (TILE_BYTES if tile_bytes is None else tile_bytes) // itemsize
    lines = cdiv(height, grid[0])
    if flat:
        column_tiles = 1
        tile_w = min(tile, next_power_of_2(lines * width))
        tile_h = 1
        pieces = cdiv(lines * width, tile_w)
    else:
        tile_w = min(max(next_power_of_2(width), 16), 512)
        tile_h = min(next_power_of_2(lines), max(tile // tile_w, 1))
        column_tiles = cdiv(width, tile_w)
        pieces = cdiv(lines, tile_h)
    programs = samples * frames * channels * grid[0] * column_tiles
    wanted = cdiv(pieces, tiles) if tiles else cdiv(processors * WAVES, programs)
    splits = max(1, min(pieces, wanted, MOST_SPLITS))
    scaled = tuple((*(s // vec for s in g.strides[:4]), g.strides[4]) for g in geometries)
    return Tiling(flat, vec, tile_h, tile_w, splits * column_tiles, column_tiles, scaled)  # type: ignore[arg-type]


def pieces_of_a_program(frames: int, pieces: int, processors: int, most: int) -> int:
    """Pieces that each program takes, at most ``most``, of a grid that fills the multiprocessors a few times evenly.

    Args:
        frames: of all samples together; a program stays inside one.
        pieces: of a frame.
        processors: multiprocessors to fill.
    """

    def cost(each: int) -> int:
        """One program, then the others: either one after another, or as fast as memory brings their pieces."""
        waves = cdiv(frames * cdiv(pieces, each), processors * RESIDENT)
        return each + START + max((waves - 1) * (each + START), frames * pieces // processors)

    even = {min(cdiv(pieces, programs), most) for programs in range(1, min(pieces, processors * WAVES) + 1)}
    return min(even, key=lambda each: (cost(each), -each))
