"""The running average of a network's trained weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from codmd.private import lerp_all


class WeightAverage:
    """Exponential moving average: average <- decay * average + (1 - decay) * weight, once per update.

    Sharded weights are averaged shard by shard, without communication.

    Args:
        weights: name to trained weight, as they are updated in place; the average starts as their copy.
        decay: in [0, 1).

    Attributes:
        average: name to float32 average, sharded as the weight is.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.weights, self.decay = dict(weights), decay
        self.average = {name: weight.detach().float().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """One step towards the present weights; `decay` replaces the one it was made with, for this step."""
        averages = [local(average) for average in self.average.values()]
        weights = [local(weight).float() for weight in self.weights.values()]
        lerp_all(averages, weights, 1 - (self.decay if decay is None else decay))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network computes with the average inside the block, and with its own weights, bit for bit, after."""
        kept = {name: local(weight).detach().clone() for name, weight in self.weights.items()}
        try:
            self._write({name: local(average) for name, average in self.average.items()})
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            local(weight).copy_(values[name])


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself. Shares memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
