"""Bytes that an operator must move, and bytes that its launches move, derived from their configuration.

Required: every latent element that enters is read once, every gradient element written once. Moved: the elements
that each program of the launched grid covers, and every byte of scratch written once and read once. Features,
matrices and masks are a few kilobytes; re-reads of them are served by caches and counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from codmd.kernels.launch import Launch
from codmd.kernels.tiling import cdiv


@dataclass(frozen=True)
class Traffic:
    """Bytes of latents and gradients, and of everything else, that a set of launches moves."""

    latents: int
    scratch: int

    @property
    def moved(self) -> int:
        return self.latents + self.scratch


def plane_elements(v: dict[str, Any]) -> int:
    """Elements of one (sample, frame, channel) plane that the programs of a tiled launch cover, regions together."""
    height, width, splits = v["height"], v["width"], v["SPLITS"]
    covered = 0
    for gy in range(v["GRID_H"]):
        lines = (gy + 1) * height // v["GRID_H"] - gy * height // v["GRID_H"]
        if v["FLAT"]:
            size = lines * width
            run = cdiv(cdiv(size, splits), v["VEC"]) * v["VEC"]
            covered += sum(max(0, min(size, (s + 1) * run) - s * run) for s in range(splits))
        else:
            share = cdiv(lines, splits // v["COLUMN_TILES"])
            for split in range(splits):
                start = split // v["COLUMN_TILES"] * share
                left = split % v["COLUMN_TILES"] * v["TILE_W"]
                covered += max(0, min(lines, start + share) - start) * min(v["TILE_W"], width - left)
    return covered


def run_elements(v: dict[str, Any], splits: int) -> int:
    """Elements of one vector that ``splits`` of a launch over runs cover."""
    per_run = cdiv(v["length"], v["BLOCK_L"])
    share = cdiv(v["tiles"], splits)
    covered = 0
    for split in range(splits):
        first, last = split * share, min(v["tiles"], (split + 1) * share)
        full, tail = v["BLOCK_L"], v["length"] - (per_run - 1) * v["BLOCK_L"]
        ends = last // per_run - first // per_run if last > first else 0
        covered += (max(last - first, 0) - ends) * full + ends * tail
    return covered


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _pool(v: dict[str, Any], grid: int) -> Traffic:
    planes = v["samples"] * v["frames"] * v["channels"]
    read = 3 * planes * plane_elements(v) * v["student"].element_size()
    written = _size(v["frame_grad"]) + _size(v["batch_grad"]) + _size(v["pooled"])
    return Traffic(read, 2 * _size(v["workspace"]) + written)


def _rows(v: dict[str, Any], grid: int) -> Traffic:
    # Its share of the workspace is counted by the launch that made it, or here when it is its own.
    own = 0 if v["source"] is v["workspace"] else 2 * _size(v["workspace"])
    return Traffic(0, own + _size(v["gathered"]))


def _rows_gradient(v: dict[str, Any], grid: int) -> Traffic:
    return Traffic(0, _size(v["frame_grad"]) + _size(v["batch_grad"]))


def _gram(v: dict[str, Any], grid: int) -> Traffic:
    rows, block = v["frames"], v["BLOCK_N"]
    loads = 0
    if v["GRAMS"]:
        sizes = [min(block, rows - start) for start in range(0, rows, block)]
        pairs = [(a, b) for a in range(len(sizes)) for b in range(a, len(sizes))]
        loads = rows if len(sizes) == 1 else sum(sizes[a] + sizes[b] for a, b in pairs)
    if v["pooled"] is not None and not (v["GRAMS"] and v["BLOCKS"] == 1):
        loads += rows
    elements = run_elements(v, v["SPLITS_X"]) + 2 * run_elements(v, v["SPLITS_S"])
    read = v["samples"] * loads * elements * v["student"].element_size()
    return Traffic(read, 2 * _size(v["workspace"]) + _size(v["matrices"]) + _size(v["pooled"]))


def _apply(v: dict[str, Any], grid: int) -> Traffic:
    samples = grid // (v["SPLITS"] * v["BLOCKS"])
    per_row = run_elements(v, v["SPLITS"]) * v["out"].element_size()
    reads = 0
    if v["matrices"] is not None:
        reads = v["BLOCKS"] * v["frames"] * run_elements(v, v["SPLITS"]) * v["student"].element_size()
    return Traffic(samples * (v["rows"] * per_row + reads), _size(v["matrices"]) + _size(v["batch_grad"]))


def _gram_batch(v: dict[str, Any], grid: int) -> Traffic:
    elements = run_elements(v, v["SPLITS_X"]) + 2 * run_elements(v, v["SPLITS_S"])
    read = v["samples"] * v["frames"] * elements * v["student"].element_size()
    return Traffic(read, 2 * _size(v["workspace"]))


def _relations(v: dict[str, Any], grid: int) -> Traffic:
    # The workspace is counted by the launch that made it.
    return Traffic(0, _size(v["matrices"]) + _size(v["batch_matrix"]))


def _apply_batch(v: dict[str, Any], grid: int) -> Traffic:
    elements = v["samples"] * v["frames"] * run_elements(v, v["SPLITS"])
    widths = v["out"].element_size() + v["student"].element_size()
    return Traffic(elements * widths, _size(v["matrices"]) + _size(v["batch_matrix"]))


def _moments(v: dict[str, Any], grid: int) -> Traffic:
    planes = v["samples"] * v["frames"] * v["channels"]
    critic = ("fake", "fake_uncond") if v["second"] is None or v["RELATION"] else ()
    names = "student", "real", "real_uncond", "noisy", "second", "mask", *critic
    widths = sum(v[name].element_size() for name in names if v[name] is not None)
    scratch = 2 * _size(v["workspace"]) + _size(v["frame_grad"]) + _size(v["batch_grad"]) + _size(v["pooled"])
    return Traffic(planes * plane_elements(v) * widths, scratch)


def _decoupled(v: dict[str, Any], grid: int) -> Traffic:
    names = "real", "fake", "fake_uncond", "augment_real", "augment_uncond", "mask"
    widths = sum(v[name].element_size() for name in names if v[name] is not None)
    return Traffic(grid // v["SPLITS"] * plane_elements(v | {"GRID_H": 1}) * widths, 2 * _size(v["workspace"]))


def _gradient(v: dict[str, Any], grid: int) -> Traffic:
    planes = grid // (v["GRID_H"] * v["SPLITS"])
    predictions = "fake", "real", "real_uncond", "fake_uncond", "augment_real", "augment_uncond", "mask"
    names = ("out", *predictions) if v["DMD"] else ("out",)
    widths = sum(v[name].element_size() for name in names if v[name] is not None)
    return Traffic(planes * plane_elements(v) * widths, _size(v["frame_grad"]) + _size(v["batch_grad"]))


_KERNELS: dict[str, Callable[[dict[str, Any], int], Traffic]] = {
    "pool_kernel": _pool,
    "relation_rows_kernel": _rows,
    "rows_gradient_kernel": _rows_gradient,
    "gram_kernel": _gram,
    "moments_kernel": _moments,
    "decoupled_kernel": _decoupled,
    "gradient_kernel": _gradient,
    "apply_kernel": _apply,
    "gram_batch_kernel": _gram_batch,
    "relations_kernel": _relations,
    "apply_batch_kernel": _apply_batch,
}


def traffic(launches: Iterable[Launch]) -> Traffic:
    """Bytes that ``launches`` move together."""
    parts = [_KERNELS[launch.name](launch.values, launch.launcher.grid[0]) for launch in launches]
    return Traffic(sum(p.latents for p in parts), sum(p.scratch for p in parts))


def relation_bytes(numel: int, itemsize: int, whole: bool = False) -> int:
    """Bytes the relation loss must move, forward and backward: three latents read, one gradient written.

    With ``whole`` (pool=None) the gradient M X needs the student's values once more.
    """
    return (5 if whole else 4) * numel * itemsize


def codmd_bytes(numel: int, itemsize: int, predictions: int, flow: bool = False) -> int:
    """Bytes the DMD or CoDMD loss must move, forward and backward, from ``predictions`` of teacher and critic.

    Forward reads the student, the predictions and, for ``flow``, the noisy latents; backward reads the predictions
    again and writes the gradient.
    """
    return (1 + predictions + flow + predictions + 1) * numel * itemsize
