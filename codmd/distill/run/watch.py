"""Early warnings: the student's samples of fixed prompts and noise beside the teacher's; measures that left a band."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from codmd import ops
from codmd.distill.config.sections import WatchSettings
from codmd.distill.update.cycle_log import collapse_ratios


class LeftBand(RuntimeError):
    """A measure left its band, and the configuration asks to end there."""


class Reading(NamedTuple):
    """A student's samples over the teacher's of the same noise; 1 is alike, NaN where there is nothing to compare.

    std_ratio: standard deviation. Rising: over-saturation.
    frame_difference_ratio: mean absolute difference of neighbouring frames. Falling: motion freezes.
    relation_ratio: mean of 1 - cosine over pairs of frames (the frame relation). Falling: frames become one.
    """

    std_ratio: float
    frame_difference_ratio: float
    relation_ratio: float

    @property
    def distance(self) -> float | None:
        """Root mean square of the ratios' logarithms, those that are NaN left out; None where one is 0 or infinite."""
        ratios = [ratio for ratio in self if not math.isnan(ratio)]
        if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
            return None
        return math.sqrt(sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios))


def read(student: Tensor, teacher: Tensor) -> Reading:
    """Compares samples [B, F, C, H, W] of the same prompts and noise."""
    spread, motion = map(float, collapse_ratios(student, teacher))
    if student.shape[1] == 1:
        return Reading(spread, motion, math.nan)
    unlike = [(1 - ops.relation_matrix(latents.float())).mean() for latents in (student, teacher)]
    return Reading(spread, motion, float(unlike[0] / unlike[1]))


class Watch:
    """Which measures have entered their band, and at which update each one first left it again.

    A student starts outside: few steps of the teacher's weights are blurred. Only what was inside can leave.

    Args:
        draw: the student's samples of the fixed prompts and noise.
        teacher: the teacher's samples of them.
    """

    def __init__(self, settings: WatchSettings, draw: Callable[[], Tensor], teacher: Tensor) -> None:
        self.settings, self.draw, self.teacher = settings, draw, teacher
        self.entered: set[str] = set()
        self.left: dict[str, int] = {}
        self._looked: tuple[int, Reading] | None = None

    def look(self, update: int) -> tuple[Reading, list[str]]:
        """Measures; returns the reading, and which measures left their band now for the first time."""
        reading, (low, high) = read(self.draw(), self.teacher), self.settings.band
        self._looked, leaving = (update, reading), []
        for name, ratio in reading._asdict().items():
            if math.isnan(ratio):
                continue
            if low <= ratio <= high:
                self.entered.add(name)
            elif name in self.entered and name not in self.left:
                self.left[name] = update
                leaving.append(name)
        return reading, leaving

    def record(self, update: int) -> dict[str, Any]:
        """What a checkpoint of this update keeps; JSON."""
        looked = self._looked is not None and self._looked[0] == update
        distance = self._looked[1].distance if looked and self._looked is not None else None
        return {"distance": distance, "entered": sorted(self.entered), "left": self.left}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Goes on from what `record` kept."""
        self.entered, self.left = set(record.get("entered", ())), dict(record.get("left", {}))
