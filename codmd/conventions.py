"""Which DMD loss a number belongs to: a frozen :class:`Convention` for every public codebase.

All of them compute g = (fake - real)/norm and a penalty of it; they differ in the guidance formula, the norm, what
happens to a NaN, the reduction and where they round. ``docs/conventions.md`` is the table of the differences.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

Precision = Literal["input", "float32", "float64"]
GuidanceForm = Literal["cond", "uncond"]
NormScope = Literal["sample", "batch", "block"]
Guard = Literal["none", "clamp", "add"]
NanPolicy = Literal["to_num", "zero_sample", "keep"]
Penalty = Literal["l2", "huber"]
Reduction = Literal["mean", "sum"]
Arithmetic = Literal["float32", "float64", "emulate"]
Layout = Literal["bfchw", "bcfhw", "bchw"]
Divided = Literal["direction", "loss"]

__all__ = ["NAMED", "Convention", "Rounding", "decode", "replace", "resolve"]


@dataclass(frozen=True)
class Rounding:
    """Where a codebase rounds, followed by ``arithmetic="emulate"``; ``"input"`` is the dtype of the latents.

    Attributes:
        guidance_base: the prediction that the guidance difference is added to, in the input dtype.
        norm: dtype of x - r and of its mean absolute value.
        reciprocal: g = (f - r)·w with w = 1/norm rounded to the input dtype, rather than (f - r)/norm.
        direction: dtype of f - r and g.
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
        _check_choice("guidance_base", self.guidance_base, get_args(GuidanceForm))
        for name in ("norm", "direction", "target", "loss"):
            _check_choice(name, getattr(self, name), get_args(Precision))
        for name in ("reciprocal", "split_target"):
            _check_flag(name, getattr(self, name))


@dataclass(frozen=True)
class Convention:
    """One DMD loss: L = coefficient · reduce(penalty(g)), g = nan((f - r)/norm), ∂L/∂x through x - sg(x - g).

    Attributes:
        guidance_form: ``"cond"`` is c + s(c - u), ``"uncond"`` is u + s(c - u).
        norm_scope: mean|x - r| over a ``"sample"``, the whole ``"batch"`` or a ``"block"`` of frames of a sample.
        norm_block: frames of a block; the last block may be shorter.
        independent_first_frame: with blocks, the first frame stands alone and its norm is 1.
        guard: ``"none"``, ``"clamp"`` the norm to at least ``eps``, or ``"add"`` ``eps`` to it.
        eps: of the guard.
        nan: ``"to_num"`` replaces NaN by 0 and ±inf by the largest number of the dtype; ``"zero_sample"`` drops a
            sample whose loss has a NaN; ``"keep"`` does nothing.
        penalty: ``"l2"`` is g², ``"huber"`` is sqrt(g² + c²) - c with c = ``huber_c``.
        coefficient: of the reduced penalty.
        reduction: ``"mean"`` over the selected elements or ``"sum"``.
        arithmetic: ``"float32"`` (the fused kernels), ``"float64"``, or ``"emulate"``: every rounding of the codebase.
        layout: of the latents when the call names none.
        norm_divides: ``"direction"`` g, or ``"loss"``: the penalty is of f - r and is then divided by the norm.
        weight_on: whether ``sample_weight`` multiplies the ``"loss"`` or g (``"direction"``, so its square the loss).
        huber_c: width of the quadratic part of the pseudo-Huber penalty.
        rounding: what ``arithmetic="emulate"`` follows.
        encoded: all of the above as a string, for operator schemas; :func:`decode` reads it.
    """

    guidance_form: GuidanceForm = "cond"
    norm_scope: NormScope = "sample"
    norm_block: int = 1
    independent_first_frame: bool = False
    guard: Guard = "none"
    eps: float = 0.0
    nan: NanPolicy = "to_num"
    penalty: Penalty = "l2"
    coefficient: float = 0.5
    reduction: Reduction = "mean"
    arithmetic: Arithmetic = "float32"
    layout: Layout = "bfchw"
    norm_divides: Divided = "direction"
    weight_on: Divided = "loss"
    huber_c: float = 1e-3
    rounding: Rounding = field(default_factory=Rounding)
    encoded: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices = {
            "guidance_form": GuidanceForm, "norm_scope": NormScope, "guard": Guard, "nan": NanPolicy,
            "penalty": Penalty, "reduction": Reduction, "arithmetic": Arithmetic, "layout": Layout,
            "norm_divides": Divided, "weight_on": Divided,
        }  # fmt: skip
        for name, kind in choices.items():
            _check_choice(name, getattr(self, name), get_args(kind))
        if type(self.norm_block) is not int or self.norm_block < 1:
            raise ValueError(f"norm_block must be an integer of at least 1 (frames), got {self.norm_block!r}")
        for name in ("coefficient", "huber_c", "eps"):
            _check_number(name, getattr(self, name), positive=name != "eps")
        if (self.guard == "none") != (self.eps == 0):
            raise ValueError(f'guard={self.guard!r} does not go with eps={self.eps}: "none" has 0, the others more')
        _check_flag("independent_first_frame", self.independent_first_frame)
        if not isinstance(self.rounding, Rounding):
            raise ValueError(f"rounding must be a codmd.conventions.Rounding, got {self.rounding!r}")
        if self.independent_first_frame and self.norm_scope != "block":
            raise ValueError('independent_first_frame=True needs norm_scope="block"')
        if self.norm_divides == "loss" and self.nan != "keep":
            raise ValueError(f'norm_divides="loss" needs nan="keep" (there is no quotient to repair), got {self.nan!r}')
        if self.weight_on == "direction" and self.penalty != "l2":
            raise ValueError('weight_on="direction" needs penalty="l2"')
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "rounding"}
        object.__setattr__(self, "encoded", json.dumps({**values, "rounding": asdict(self.rounding)}))

    def guidance_scale(self, scale: float, form: str = "uncond") -> float:
        """What ``scale`` of ``form`` is called in this convention: cond-form s is uncond-form s + 1.

        Raises:
            ValueError: ``form`` is neither ``"cond"`` nor ``"uncond"``, or ``scale`` is not a finite number.
        """
        _check_choice("form", form, get_args(GuidanceForm))
        if not _is_number(scale) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}")
        cond = scale if form == "cond" else scale - 1
        return cond if self.guidance_form == "cond" else cond + 1

    def cond_scale(self, scale: float) -> float:
        """This convention's ``scale`` in the cond form, k in c + k(c - u)."""
        return scale if self.guidance_form == "cond" else scale - 1

    @property
    def unfusable(self) -> str:
        """Why the fused kernels cannot serve this convention; empty when they can."""
        if self.arithmetic != "float32":
            return f"arithmetic={self.arithmetic!r} is computed step by step"
        if self.penalty == "huber" and self.norm_divides == "direction":
            return "the pseudo-Huber penalty of g needs the norm before the sum"
        if self.nan == "zero_sample" and self.guard == "none":
            return 'nan="zero_sample" without a guard needs every 0/0'
        return ""

    @property
    def fusable(self) -> bool:
        """Whether one pass over the latents can serve this convention."""
        return not self.unfusable

    def segments(self, frames: int) -> list[int]:
        """First frames of the norm's segments within a sample, then ``frames``: ``[0, frames]`` unless blocks."""
        if self.norm_scope != "block":
            return [0, frames]
        first = [0] if self.independent_first_frame else []
        return [*first, *range(len(first), frames, self.norm_block), frames]


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_number(name: str, value: Any, positive: bool) -> None:
    if not _is_number(value) or not (0 < value < float("inf") if positive else 0 <= value < float("inf")):
        raise ValueError(f"{name} must be a finite number {'above 0' if positive else 'of at least 0'}, got {value!r}")


self_forcing = Convention()
causvid = codmd = self_forcing
longlive = replace(self_forcing, norm_scope="block", norm_block=3)
dmd2 = Convention(
    guidance_form="uncond",
    layout="bchw",
    rounding=Rounding("uncond", norm="float64", direction="float64", target="float64", loss="float32"),
)
rcm = Convention(
    guard="clamp",
    eps=1e-5,
    nan="zero_sample",
    coefficient=1.0,
    reduction="sum",
    layout="bcfhw",
    rounding=Rounding("cond", norm="float64", direction="float64"),
)
fastgen = Convention(
    guidance_form="uncond",
    guard="add",
    eps=1e-6,
    nan="keep",
    layout="bcfhw",
    weight_on="direction",
    rounding=Rounding("cond", norm="float32", reciprocal=True, target="input", loss="input"),
)
modelopt = fastgen
fastvideo = Convention(
    guidance_form="uncond",
    norm_scope="batch",
    rounding=Rounding("uncond", target="float32", loss="float32"),
)
fastvideo_legacy = replace(fastvideo, guidance_form="cond", rounding=Rounding("cond", target="float32", loss="float32"))
lightx2v = Convention(
    guidance_form="uncond",
    layout="bcfhw",
    rounding=Rounding("uncond", norm="float32", direction="float32", target="float32", loss="float32"),
)
videox_fun = Convention(guidance_form="uncond", layout="bcfhw", rounding=Rounding("uncond"))
diffsynth = replace(
    fastgen,
    weight_on="loss",
    rounding=Rounding("uncond", norm="float32", reciprocal=True, target="input", loss="float32"),
)
simpletuner = Convention(
    guidance_form="uncond", guard="clamp", eps=1e-6, layout="bcfhw", rounding=Rounding("uncond", target="input")
)
tdm = Convention(
    guidance_form="uncond",
    nan="keep",
    coefficient=1.0,
    layout="bchw",
    norm_divides="loss",
    rounding=Rounding("cond", norm="float64", target="input", split_target=True, loss="float32"),
)

NAMED: dict[str, Convention] = {
    "causvid": causvid, "self_forcing": self_forcing, "codmd": codmd, "longlive": longlive, "dmd2": dmd2, "rcm": rcm,
    "fastgen": fastgen, "modelopt": modelopt, "fastvideo": fastvideo, "fastvideo_legacy": fastvideo_legacy,
    "lightx2v": lightx2v, "videox_fun": videox_fun, "diffsynth": diffsynth, "simpletuner": simpletuner, "tdm": tdm,
}  # fmt: skip


def resolve(convention: str | Convention) -> Convention:
    """The convention of a name, or the convention itself.

    Raises:
        ValueError: unknown name; the message lists the known ones. TypeError: neither a name nor a convention.
    """
    if isinstance(convention, Convention):
        return convention
    if not isinstance(convention, str):
        raise TypeError(f"convention must be a name or a codmd.conventions.Convention, got {type(convention).__name__}")
    if convention not in NAMED:
        raise ValueError(f"convention={convention!r} is not known; known: {', '.join(NAMED)}")
    return NAMED[convention]


@functools.lru_cache(maxsize=128)
def decode(encoded: str) -> Convention:
    """The convention of :attr:`Convention.encoded`."""
    values = json.loads(encoded)
    return Convention(**{**values, "rounding": Rounding(**values["rounding"])})
