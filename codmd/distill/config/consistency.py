"""The numbers of the consistency term, of the methods rcm and scm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ConsistencyConfig:
    """The consistency term of rCM (arXiv 2510.08431) and sCM (arXiv 2410.11081).

    Attributes:
        log_mean, log_std: of the training times, whose tangent sigma / (1 - sigma) is log-normal.
        warmup: student updates over which the tangent's r rises from 0 to 1; in rcm the score term and the critic begin
            after them.
        tangent: "jvp" (forward-mode differentiation) or "difference" (a central difference in float32).
    """

    log_mean: float = 0.7
    log_std: float = 1.6
    warmup: int = 1000
    tangent: Literal["jvp", "difference"] = "jvp"

    def __post_init__(self) -> None:
        if not math.isfinite(self.log_mean):
            raise ValueError(f"log_mean: got {self.log_mean}; expected a finite number")
        if not (math.isfinite(self.log_std) and self.log_std > 0):
            raise ValueError(f"log_std: got {self.log_std}; expected a finite number above 0")
        if self.warmup < 0:
            raise ValueError(f"warmup: got {self.warmup}; expected at least 0")

    def warmth(self, update: int) -> float:
        """r at a student update, counted from 1."""
        return min(1.0, update / max(1, self.warmup))
