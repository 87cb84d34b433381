"""Random rows of a batch that is spread over processes: one stream for all, each process keeps its own rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseStream:
    """A generator in the same state on every process, and which part of each draw belongs to this one.

    All processes draw the rows of all, one process after the other, and drop what is not theirs. On the CPU the
    rows of a global batch are then the same on any number of processes (where a row's size is a multiple of 16),
    and a run continued on another number of processes continues the same stream.

    Attributes:
        generator: seeded alike on every process.
        rank, world: of this process among the data-parallel ones.
    """

    generator: torch.Generator
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank: got {self.rank}; expected 0 to {self.world - 1}, below world = {self.world}")

    def rows(self, sampler: Callable[..., Tensor], shape: Sequence[int], **options: Any) -> Tensor:
        """This process's `shape` of `sampler` (`torch.randn`, `torch.rand`); shape[0] counts rows of one process."""
        for rank in range(self.world):
            draw = sampler(tuple(shape), generator=self.generator, **options)
            if rank == self.rank:
                own = draw
        return own


Randomness: TypeAlias = torch.Generator | NoiseStream
"""What draws: a generator of this process alone, or a stream shared by all."""


def normal(
    shape: Sequence[int], randomness: Randomness, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Standard normal noise of that shape."""
    return _stream(randomness).rows(torch.randn, shape, device=device, dtype=dtype)


def uniform(batch: int, randomness: Randomness, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), float32 [batch]."""
    return _stream(randomness).rows(torch.rand, (batch,), device=device)


def noise_like(x: Tensor, randomness: Randomness) -> Tensor:
    """Standard normal noise of the shape, dtype and device of x."""
    return normal(x.shape, randomness, x.device, x.dtype)


def seeded(*parts: int | str) -> torch.Generator:
    """A generator on the CPU for these numbers and names; its seed has 32 bits, all that the CPU's engine reads."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, parts)).encode()))


def _stream(randomness: Randomness) -> NoiseStream:
    return randomness if isinstance(randomness, NoiseStream) else NoiseStream(randomness)
