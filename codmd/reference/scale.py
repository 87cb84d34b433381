"""A power of two near the largest magnitude: division by it is exact, and squares and sums then stay in range."""

from __future__ import annotations

import torch
from torch import Tensor


def power_of_two(values: Tensor, dim: int | tuple[int, ...] = ()) -> Tensor:
    """2^k with max|values|/2 < 2^k <= max|values| over ``dim`` (kept), all axes by default; no gradient.

    1 where everything is zero or something is not finite.
    """
    largest = values.detach().abs().amax(dim, keepdim=True)
    mantissa, _ = torch.frexp(largest)
    usable = (largest > 0) & largest.isfinite()
    return torch.where(usable, largest / (2 * mantissa), 1)
