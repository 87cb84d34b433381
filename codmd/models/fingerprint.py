"""A fingerprint of tensors: equal for equal weights, and cheap however large they are."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

PLACES, RUN = 8, 32
"""Of every tensor so many places are looked at, evenly spread, and so many numbers at each."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Eight hexadecimal digits of every tensor's name, dtype, shape and some of its numbers.

    Each is looked up once, so that the mapping may read lazily; of a memory-mapped file little more than the pages
    with those numbers is read.
    """
    total = 0
    for name in sorted(tensors):
        value = tensors[name].detach()
        flat = value.reshape(-1)
        last = max(0, flat.numel() - RUN)
        starts = sorted({last * place // (PLACES - 1) for place in range(PLACES)})
        sampled = torch.cat([flat[start : start + RUN] for start in starts]).cpu()
        head = f"{name} {value.dtype} {tuple(value.shape)}".encode()
        total = zlib.crc32(head + sampled.view(torch.uint8).numpy().tobytes(), total)
    return f"{total:08x}"
