"""The cycles of a distillation as a generator: the loop's body is the caller's."""

from __future__ import annotations

from collections.abc import Iterator

from .update.cycle_log import CycleLog
from .update.trainer import Distiller


def cycles(distiller: Distiller, updates: int, measure_every: int = 1) -> Iterator[CycleLog]:
    """Trains, one cycle an iteration, until the student has made `updates` updates in all.

    Between two iterations everything is the caller's: log `cycle.scalars()`, sample, change a learning rate, save
    `distiller.tensors()`, or leave the loop. A distiller that has made updates before goes on from them.

    Args:
        distiller: with its networks, recipe and conditions.
        updates: student updates of the whole run.
        measure_every: updates between measurements of the relation's gradient and of collapse, which cost two
            backward passes through the losses; the last update is always measured.

    Yields:
        What each cycle measured.

    Raises:
        ValueError: a number that is not positive.
        NonFiniteRun: too many updates in a row were not finite.
    """
    for name, value in (("updates", updates), ("measure_every", measure_every)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; expected at least 1")
    while distiller.update < updates:
        following = distiller.update + 1
        yield distiller.cycle(measure_gradients=following % measure_every == 0 or following == updates)
