"""Safetensors files written one tensor at a time: memory of one tensor, whatever the size of the network.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every
tensor), then the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
ALIGNMENT = 8


def write_shards(
    folder: Path,
    filename: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[str]]:
    """Writes `tensors` in the order of `expected`, in as few files of at most `shard_bytes` as that order allows.

    Returns:
        File name to the names inside; one file is called `filename`, several `stem-00001-of-00002.suffix`.

    Raises:
        ValueError: a tensor is missing, of another shape, of a dtype that is no float, or not finite.
    """
    dtypes = {name: dtype or _checked(name, tensors, shape).dtype for name, shape in expected.items()}
    sizes = {name: shape.numel() * dtypes[name].itemsize for name, shape in expected.items()}
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    stem, _, suffix = filename.rpartition(".")
    written = {}
    for number, names in enumerate(groups, start=1):
        file = filename if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}"
        _write_file(folder / file, names, tensors, expected, dtypes, progress)
        written[file] = names
    return written


def _write_file(
    path: Path,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    dtypes: Mapping[str, torch.dtype],
    progress: Callable[[int], None] | None,
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + shapes[name].numel() * dtypes[name].itemsize
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name in names:
            value = _checked(name, tensors, shapes[name])
            if not torch.isfinite(value).all():
                raise ValueError(f"{name}: holds NaN or infinity; such weights are of no use")
            value = value.to("cpu", dtypes[name]).contiguous()
            file.write(value.view(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress(value.nbytes)


def _checked(name: str, tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name}: missing")
    value = tensors[name]
    if isinstance(value, DTensor):
        raise ValueError("save: the model is sharded; write a distributed checkpoint and use codmd convert")
    if value.shape != shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)}; expected {tuple(shape)}")
    if value.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {value.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    return value
