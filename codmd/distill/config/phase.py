"""The part of a student's steps that a run trains: all of them, or those of one of two experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codmd.models.experts import Expert


@dataclass(frozen=True)
class Phase:
    """Steps, and the noise levels at which their samples are compared.

    Attributes:
        first, stop: the steps, indices into the step list, `stop` not among them.
        end: noise level of the samples that the phase hands on; 0 where they are clean.
        sigma_range: lowest and highest level of the comparison.
        drawn: limits of the uniform draw before the shift.
    """

    first: int
    stop: int
    end: float
    sigma_range: tuple[float, float]
    drawn: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def of_expert(
        cls, expert: Expert, sigmas: Sequence[float], boundary: float, sigma_range: tuple[float, float], shift: float
    ) -> Phase:
        """The steps of one expert and the levels of its side of `boundary`; "high" hands on at the first step of "low".

        Raises:
            ValueError: one of the experts has no step, or no level.
        """
        split = sum(sigma >= boundary for sigma in sigmas)
        if not 0 < split < len(sigmas):
            raise ValueError(f"boundary: got {boundary}; expected steps from it on and steps below it in {sigmas}")
        lowest, highest = sigma_range
        levels = (max(lowest, boundary), highest) if expert == "high" else (lowest, min(highest, boundary))
        if levels[0] >= levels[1]:
            raise ValueError(f"sigma_range: got {sigma_range}; expected levels on both sides of boundary {boundary}")
        before = tuple(level / (shift - (shift - 1) * level) for level in levels)
        drawn = (before[0], before[1])
        if expert == "high":
            return cls(0, split, sigmas[split], levels, drawn)
        return cls(split, len(sigmas), 0.0, levels, drawn)
