"""Conditions of the updates: prompts or their embeddings, in one global order that every process reads alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from codmd.distill.update.noise import seeded
from codmd.models.base import Condition, move_cond


class Source(Protocol):
    """A numbered set of conditions and the prompts they stand for."""

    @property
    def prompts(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def condition(self, numbers: Sequence[int]) -> Condition:
        """The joint condition of those items, on the CPU or on the model's device."""
        ...


class Positions:
    """The order of items: a permutation per epoch, dealt out to the processes row by row.

    The order depends on the seed alone. A position counts samples of all processes, so a run goes on where it
    stopped on any number of them.

    Args:
        length: items of an epoch.
        seed: of the orders.
        rows: items a process takes at a time.
        rank, processes: which rows are this process's.

    Attributes:
        position: samples that all processes have taken together.
    """

    def __init__(self, length: int, seed: int, rows: int, rank: int = 0, processes: int = 1) -> None:
        self.length, self.seed, self.rows, self.rank, self.processes = length, seed, rows, rank, processes
        self.position = 0
        self._epoch, self._order = -1, torch.empty(0)

    def take(self) -> tuple[list[int], list[int]]:
        """(items, global positions) of this process's next rows."""
        start = self.position + self.rank * self.rows
        self.position += self.rows * self.processes
        positions = list(range(start, start + self.rows))
        return [self._item(position) for position in positions], positions

    def _item(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=seeded(self.seed, epoch))
        return int(self._order[place])


class Conditions(Iterator[Condition]):
    """One condition per micro-batch of this process, without end.

    Attributes:
        positions: where the data stands; part of a checkpoint.
    """

    def __init__(self, source: Source, positions: Positions, device: torch.device) -> None:
        self.source, self.positions, self.device = source, positions, device

    def __next__(self) -> Condition:
        items, _ = self.positions.take()
        return move_cond(self.source.condition(items), self.device)
