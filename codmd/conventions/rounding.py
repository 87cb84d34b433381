"""The roundings of a codebase, which ``arithmetic="emulate"`` repeats, and the checks of a convention's fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Precision = Literal["input", "float32", "float64"]
GuidanceForm = Literal["cond", "uncond"]


@dataclass(frozen=True)
class Rounding:
    """The roundings of a codebase, repeated by ``arithmetic="emulate"``; ``"input"`` is the dtype of the latents.

    Attributes:
        guidance_base: the prediction that the guidance difference is added to, in the input dtype.
        norm: dtype of x - r and of its mean absolute value.
        reciprocal: g = (f - r)·w with w = 1/norm rounded to the input dtype, rather than (f - r)/norm.
        direction: dtype of f - r; g has the wider of this and the norm's.
        target: dtype in which x - g is stored.
        split_target: x - g is summed as (x + (c - f)) + k(c - u), from the predictions.
        loss: dtype of the penalty and its reduction.
    """

    guidance_base: GuidanceForm = "cond"
    norm: Precision = "input"
    reciprocal: bool = False
    direction: Precision = "input"
    target: Precision = "float64"
    split_target: bool = False
    loss: Precision = "float64"

    def __post_init__(self) -> None:
        check_choice("guidance_base", self.guidance_base, get_args(GuidanceForm))
        for name in ("norm", "direction", "target", "loss"):
            check_choice(name, getattr(self, name), get_args(Precision))
        for name in ("reciprocal", "split_target"):
            check_flag(name, getattr(self, name))


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(name: str, value: Any, positive: bool) -> None:
    if not is_number(value) or not (0 < value < float("inf") if positive else 0 <= value < float("inf")):
        raise ValueError(f"{name} must be a finite number {'above 0' if positive else 'of at least 0'}, got {value!r}")
