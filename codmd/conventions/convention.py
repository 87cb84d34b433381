"""One DMD loss as data: a frozen :class:`Convention`, its checks and its string form."""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, overload

from codmd.conventions.rounding import GuidanceForm, Rounding, check_choice, check_flag, check_number, is_number

if TYPE_CHECKING:
    from torch import Tensor

NormScope = Literal["sample", "batch", "block"]
Guard = Literal["none", "clamp", "add"]
NanPolicy = Literal["to_num", "zero", "zero_sample", "keep"]
Penalty = Literal["l2", "huber"]
Reduction = Literal["mean", "mean_all", "sum"]
Arithmetic = Literal["float32", "float64", "emulate"]
Layout = Literal["bfchw", "bcfhw", "bchw"]
Divided = Literal["direction", "loss"]
Compared = Literal["student", "fake"]
Counted = Literal["all", "selected"]


class Rule(NamedTuple):
    """A fusable convention's loss in plain numbers, as the C++ and CUDA extensions read it (``csrc/dmd.h``).

    Choices are places in ``SCOPES``, ``GUARDS`` and ``POLICIES``; ``huber_c`` is 0 for ``"l2"``.
    """

    scope: int
    norm_block: int
    first_alone: bool
    guard: int
    eps: float
    nan: int
    huber_c: float
    coefficient: float
    sum: bool
    norm_divides_loss: bool
    weight_on_direction: bool


SCOPES = ("sample", "batch", "block")
GUARDS = ("none", "clamp", "add")
POLICIES = ("to_num", "zero_sample", "keep", "zero")


@dataclass(frozen=True)
class Convention:
    """One DMD loss: L = coefficient · reduce(penalty(g)), g = nan((f - r)/norm), ∂L/∂x through x - sg(x - g).

    Attributes:
        guidance_form: ``"cond"`` is c + s(c - u), ``"uncond"`` is u + s(c - u).
        guided_above: guidance only for s above it, r = c otherwise; ``None`` always guides.
        norm_of: the norm is the mean of |v - r| with v the ``"student"`` or the ``"fake"`` prediction.
        norm_scope: that mean is over a ``"sample"``, the whole ``"batch"`` or a ``"block"`` of frames of a sample.
        norm_over: ``"all"`` elements of the scope, or those that the mask has ``"selected"``.
        norm_block: frames of a block; the last block may be shorter.
        independent_first_frame: with blocks, the first frame stands alone and its norm is 1.
        guard: ``"none"``, ``"clamp"`` the norm to at least ``eps``, or ``"add"`` ``eps`` to it.
        eps: of the guard.
        projected: the part of f - r along x - f is taken out of each sample, after the norm is formed.
        nan: ``"to_num"`` replaces NaN by 0 and ±inf by the largest number of the dtype, ``"zero"`` all three by 0;
            ``"zero_sample"`` drops a sample whose loss has a NaN; ``"keep"`` does nothing.
        penalty: ``"l2"`` is g², ``"huber"`` is sqrt(g² + c²) - c with c = ``huber_c``.
        coefficient: of the reduced penalty.
        reduction: ``"mean"`` over the selected elements, ``"sum"``, or ``"mean_all"``: the sum over the number of all.
        loss_cap: largest loss; beyond it the value is the cap and the gradient 0. ``None`` caps nothing.
        arithmetic: ``"float32"`` (the fused kernels), ``"float64"``, or ``"emulate"``: every rounding of the codebase.
        layout: of the latents when the call names none.
        norm_divides: ``"direction"`` g, or ``"loss"``: the penalty is of f - r and is then divided by the norm.
        weight_on: whether ``sample_weight`` multiplies the ``"loss"`` or g (``"direction"``, so its square the loss).
        huber_c: width of the quadratic part of the pseudo-Huber penalty.
        rounding: what ``arithmetic="emulate"`` follows.
        unfusable: why one pass over the latents cannot serve the convention; empty where it can.
        encoded: all of the above but that as a string, for operator schemas; :func:`decode` reads it.
        rule: the loss as the extensions read it.
    """

    guidance_form: GuidanceForm = "cond"
    guided_above: float | None = None
    norm_of: Compared = "student"
    norm_scope: NormScope = "sample"
    norm_over: Counted = "all"
    norm_block: int = 1
    independent_first_frame: bool = False
    guard: Guard = "none"
    eps: float = 0.0
    projected: bool = False
    nan: NanPolicy = "to_num"
    penalty: Penalty = "l2"
    coefficient: float = 0.5
    reduction: Reduction = "mean"
    loss_cap: float | None = None
    arithmetic: Arithmetic = "float32"
    layout: Layout = "bfchw"
    norm_divides: Divided = "direction"
    weight_on: Divided = "loss"
    huber_c: float = 1e-3
    rounding: Rounding = field(default_factory=Rounding)
    unfusable: str = field(init=False, repr=False, compare=False)
    encoded: str = field(init=False, repr=False, compare=False)
    rule: Rule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices = {
            "guidance_form": GuidanceForm, "norm_of": Compared, "norm_scope": NormScope, "norm_over": Counted,
            "guard": Guard, "nan": NanPolicy, "penalty": Penalty, "reduction": Reduction, "arithmetic": Arithmetic,
            "layout": Layout, "norm_divides": Divided, "weight_on": Divided,
        }  # fmt: skip
        for name, kind in choices.items():
            check_choice(name, getattr(self, name), get_args(kind))
        for name in ("guided_above", "norm_block", "eps", "coefficient", "loss_cap", "huber_c"):
            object.__setattr__(self, name, _constant(getattr(self, name)))
        if type(self.norm_block) is not int or self.norm_block < 1:
            raise ValueError(f"norm_block must be an integer of at least 1 (frames), got {self.norm_block!r}")
        for name in ("coefficient", "huber_c", "eps"):
            check_number(name, getattr(self, name), positive=name != "eps")
        if (self.guard == "none") != (self.eps == 0):
            raise ValueError(f'guard={self.guard!r} does not go with eps={self.eps}: "none" has 0, the others more')
        if self.guided_above is not None:
            check_number("guided_above", self.guided_above, positive=False)
        if self.loss_cap is not None:
            check_number("loss_cap", self.loss_cap, positive=True)
        for name in ("independent_first_frame", "projected"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.rounding, Rounding):
            raise ValueError(f"rounding must be a codmd.conventions.Rounding, got {self.rounding!r}")
        if self.independent_first_frame and self.norm_scope != "block":
            raise ValueError('independent_first_frame=True needs norm_scope="block"')
        if self.norm_divides == "loss" and self.nan != "keep":
            raise ValueError(f'norm_divides="loss" needs nan="keep" (there is no quotient to repair), got {self.nan!r}')
        if self.weight_on == "direction" and (self.penalty != "l2" or self.norm_divides != "direction"):
            raise ValueError('weight_on="direction" needs penalty="l2" and norm_divides="direction"')
        if self.projected and self.rounding.split_target:
            raise ValueError("projected=True needs rounding.split_target=False: the split target knows no projection")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "rounding"}
        object.__setattr__(self, "unfusable", _unfusable(self))
        rounding = {f.name: getattr(self.rounding, f.name) for f in fields(self.rounding)}
        object.__setattr__(self, "encoded", _encode({**values, "rounding": rounding}))
        object.__setattr__(self, "rule", _rule(self))

    def guidance_scale(self, scale: float, form: str = "uncond") -> float:
        """``scale`` of ``form`` in this convention's own form: cond-form s is uncond-form s + 1.

        Raises:
            ValueError: ``form`` is neither ``"cond"`` nor ``"uncond"``, ``scale`` is not a finite number, or it is one
                at which this convention does not guide.
        """
        check_choice("form", form, get_args(GuidanceForm))
        if not is_number(scale) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}")
        cond = scale if form == "cond" else scale - 1
        own = cond if self.guidance_form == "cond" else cond + 1
        if cond and self.guided_above is not None and own <= self.guided_above:
            raise ValueError(
                f"scale={scale!r} ({form} form) is {own!r} in this convention, which guides only above "
                f"{self.guided_above:g}"
            )
        return own

    @overload
    def cond_scale(self, scale: float) -> float: ...

    @overload
    def cond_scale(self, scale: Tensor) -> Tensor: ...

    def cond_scale(self, scale: float | Tensor) -> float | Tensor:
        """This convention's ``scale`` in the cond form, k in c + k(c - u); 0 where it does not guide."""
        cond = scale if self.guidance_form == "cond" else scale - 1
        if self.guided_above is None:
            return cond
        import torch  # not above: the command line names conventions without it

        if isinstance(scale, torch.Tensor):
            return torch.where(scale > self.guided_above, cond, 0)
        return cond if scale > self.guided_above else 0.0

    @property
    def undecouplable(self) -> str:
        """Why the decoupled loss has no meaning under this convention; empty when it has one."""
        if self.arithmetic == "emulate":
            return "arithmetic='emulate' repeats roundings, and those of a decoupled loss are nobody's"
        if self.norm_divides == "loss":
            return "norm_divides='loss' leaves no quotient for either half"
        if self.projected or self.norm_of == "fake":
            return "projected=True and norm_of='fake' speak of the critic, which the second noise level does not have"
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


def _rule(convention: Convention) -> Rule:
    return Rule(
        scope=SCOPES.index(convention.norm_scope),
        norm_block=convention.norm_block,
        first_alone=convention.independent_first_frame,
        guard=GUARDS.index(convention.guard),
        eps=convention.eps,
        nan=POLICIES.index(convention.nan),
        huber_c=convention.huber_c if convention.penalty == "huber" else 0.0,
        coefficient=convention.coefficient,
        sum=convention.reduction == "sum",
        norm_divides_loss=convention.norm_divides == "loss",
        weight_on_direction=convention.weight_on == "direction",
    )


def _unfusable(rule: Convention) -> str:
    """Why the fused kernels cannot serve this convention; empty when they can."""
    if rule.arithmetic != "float32":
        return f"arithmetic={rule.arithmetic!r} is computed step by step"
    if rule.penalty == "huber" and rule.norm_divides == "direction":
        return "the pseudo-Huber penalty of g needs the norm before the sum"
    if rule.nan == "zero_sample" and rule.guard == "none":
        return 'nan="zero_sample" without a guard needs every 0/0'
    beyond = [
        rule.norm_of == "fake" and "norm_of",
        rule.norm_over == "selected" and "norm_over",
        rule.projected and "projected",
        rule.nan == "zero" and "nan",
        rule.reduction == "mean_all" and "reduction",
        rule.loss_cap is not None and "loss_cap",
    ]
    if not any(beyond):
        return ""
    found = ", ".join(f"{name}={getattr(rule, name)!r}" for name in beyond if name)
    return f"{found}: the one pass does not know it"


def _constant(value: Any) -> Any:
    """``value``; in compiled code, where a number that varied is a symbol, the number and a guard of it."""
    torch = sys.modules.get("torch")
    if is_number(value) and torch is not None and torch.compiler.is_compiling():
        return torch.fx.experimental.symbolic_shapes.guard_scalar(value)
    return value


def _encode(value: Any) -> str:
    """``value`` as JSON; ``torch.compile`` traces no ``json.dumps``, and a convention may be made in compiled code."""
    if isinstance(value, dict):
        return "{" + ", ".join([f'"{name}": {_encode(entry)}' for name, entry in value.items()]) + "}"
    if isinstance(value, str):
        return f'"{value}"'
    return "null" if value is None else str(value).lower()


@functools.lru_cache(maxsize=128)
def decode(encoded: str) -> Convention:
    """The convention of :attr:`Convention.encoded`."""
    values = json.loads(encoded)
    return Convention(**{**values, "rounding": Rounding(**values["rounding"])})
