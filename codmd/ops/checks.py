"""Argument checks of the operators: every message names the argument, what came and what is allowed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from codmd import private
from codmd.ops.contract import Grid

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("bfchw", "bcfhw")
LATENTS = ("student", "real", "fake", "real_uncond", "fake_uncond", "noisy", "augment_real", "augment_uncond")
PLAIN = (Tensor, torch.nn.Parameter)

Number = float | Tensor
"""A Python number, or a 0-dim tensor of one: read on the host where it lies there, by the kernels elsewhere."""

Function = TypeVar("Function", bound=Callable[..., Any])


def remembered(function: Function) -> Function:
    """``function`` of hashable values, worked out once for each; never of tensors, nor in compiled code."""

    @functools.lru_cache(maxsize=512, typed=True)
    def kept(*arguments: Any) -> Any:
        if any(isinstance(argument, Tensor) for argument in arguments):
            raise TypeError("a tensor is not a key")
        return function(*arguments)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            try:
                return kept(*arguments)
            except TypeError:  # not a key, or a wrong argument: the function says what is wrong with it
                pass
        return function(*arguments)

    return call  # type: ignore[return-value]


def check_latents(latents: tuple[Any, ...], first: str = LATENTS[0]) -> None:
    """Latents in the order of ``LATENTS``: the student, called ``first``, is 5-D, floating and of plain memory.

    The others match it and require no gradient; those after ``fake`` may be None.
    """
    if not plainly_match(latents):
        _explain_latents(latents, first)


def plainly_match(latents: tuple[Any, ...]) -> bool:
    """Whether nothing can be wrong: the few attributes that tell so, since this precedes every kernel."""
    student, compiling = latents[0], torch.compiler.is_compiling()
    if type(student) not in PLAIN or private.dual_level_active() or private.transforms_active():
        return False
    try:
        shape, dtype, device = student.shape, student.dtype, student.device
        if len(shape) != 5 or 0 in shape or dtype not in DTYPES:
            return False
        for place, latent in enumerate(latents):
            if latent is None and place > 2:
                continue
            if place and (
                type(latent) is not Tensor
                or latent.shape != shape
                or latent.dtype is not dtype
                or latent.requires_grad
                or latent.device != device
            ):
                return False
            # The values are what lies at the tensor's address. Of a view without memory that is its offset in bytes.
            if not compiling and (latent.data_ptr() <= 8 * latent.storage_offset() or latent.is_neg()):
                return False
    except RuntimeError:  # nested tensors have no shape, sparse ones no address
        return False
    return True


def _explain_latents(latents: tuple[Any, ...], first: str) -> None:
    student, *others = latents
    check_memory(first, student)
    if student.dtype not in DTYPES:
        raise TypeError(f"{first} must be float32, bfloat16, float16 or float64, got {student.dtype}")
    if student.ndim != 5:
        raise ValueError(
            f"{first} must have 5 axes (batch, frames, channels, height, width in the order of layout), "
            f"got shape {tuple(student.shape)}"
        )
    if student.numel() == 0:
        raise ValueError(f"{first} must not be empty, got shape {tuple(student.shape)}")
    for name, other in zip(LATENTS[1:], others, strict=False):
        if other is not None or name in LATENTS[:3]:
            _check_match(name, other, student)


def _check_match(name: str, other: Tensor, student: Tensor) -> None:
    check_memory(name, other)
    if other.shape != student.shape:
        raise ValueError(f"{name} must have the shape of student {tuple(student.shape)}, got {tuple(other.shape)}")
    if other.dtype != student.dtype:
        raise TypeError(f"{name} must have the dtype of student {student.dtype}, got {other.dtype}")
    check_beside(name, other, student)


def check_beside(name: str, value: Tensor, student: Tensor) -> None:
    """``value`` lies on the student's device and asks for no gradient."""
    if value.device != student.device:
        raise ValueError(f"{name} must be on the device of student {student.device}, got {value.device}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, but only student receives one: compute {name} under torch.no_grad() "
            f"or pass {name}.detach()"
        )


def check_memory(name: str, value: Any, kind: str = "", transformed: bool = False) -> None:
    """A tensor of plain, dense memory; the message names the call that makes one.

    ``transformed``: one that a torch.func transform holds will do, whose memory cannot be looked at.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a {kind}torch.Tensor, got {type(value).__name__}")
    if not transformed:
        _refuse_transforms()
    if torch.compiler.is_compiling():
        return
    advice = ""
    if value.is_nested:
        advice = f"a nested tensor: pass torch.nested.to_padded_tensor({name}, 0.0) with a mask"
    elif value.is_quantized:
        advice = f"a quantised tensor: pass {name}.dequantize()"
    elif value.layout is not torch.strided:
        advice = f"a tensor of layout {value.layout}: pass {name}.to_dense()"
    elif _is_distributed(value):
        advice = f"a DTensor: pass {name}.full_tensor(), or {name}.to_local() where the batch is what is sharded"
    elif value.is_neg() or value.is_conj():
        advice = f"a lazy view with the {'negation' if value.is_neg() else 'conjugation'} bit: pass {name}.resolve_"
        advice += "neg()" if value.is_neg() else "conj()"
    elif not private.transforms_active() and _has_no_address(value):
        advice = "one without memory (a zero tensor of forward AD, or a functional wrapper): pass the values themselves"
    elif private.dual_level_active() and forward_ad.unpack_dual(value).tangent is not None:
        advice = (
            f"a dual number: there is no forward-mode derivative; pass torch.autograd.forward_ad.unpack_dual({name})"
            ".primal"
        )
    if advice:
        raise TypeError(f"{name} must be a {kind}torch.Tensor of plain memory, got {advice}")


def _refuse_transforms() -> None:
    if private.transforms_active():
        raise TypeError(
            "the losses of codmd do not support torch.func transforms (grad, vmap, jvp, functionalize): call them "
            "outside, and take gradients with backward() or torch.autograd.grad"
        )


def _has_no_address(tensor: Tensor) -> bool:
    if type(tensor) not in PLAIN or tensor.device.type == "meta" or tensor.numel() == 0:
        return False
    return tensor.data_ptr() == tensor.storage_offset() * tensor.itemsize


def _is_distributed(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_layout(layout: str) -> None:
    check_one_of("layout", layout, LAYOUTS)


def check_positive(name: str, value: Any) -> Number:
    """A finite number > 0, or a 0-dim tensor."""
    number = check_number(name, value)
    if not isinstance(number, Tensor) and not number > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}")
    return number


def check_weight(name: str, value: Any) -> Number:
    """A finite number >= 0, or a 0-dim tensor."""
    number = check_number(name, value)
    if not isinstance(number, Tensor) and number < 0:
        raise ValueError(f"{name} must be 0 or greater, got {value}")
    return number


def computed(weight: Number) -> bool:
    """Whether a term of this weight is computed: nobody looks at a tensor's value."""
    return isinstance(weight, Tensor) or weight != 0


def check_number(name: str, value: Any) -> Number:
    """A finite Python number as float, or a 0-dim tensor; one on the host is read unless the call is traced."""
    if isinstance(value, Tensor):
        return _scalar_tensor(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number or a 0-dim tensor, got {type(value).__name__}")
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {_shown(value)}")
    return float(value)


def _shown(value: float) -> str:
    """``value`` as text; Python refuses to print an integer of thousands of digits."""
    return str(value) if isinstance(value, float) else f"an integer of {value.bit_length()} bits"


def _scalar_tensor(name: str, value: Tensor) -> Number:
    check_memory(name, value)
    if value.ndim:
        raise ValueError(f"{name} must be a Python number or a 0-dim tensor, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a Python number or a floating-point tensor, got {value.dtype}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but only student receives one: pass {name}.detach()")
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and type(value) in PLAIN:
        return check_number(name, value.item())
    return value


def check_pool(pool: Any, shape: torch.Size) -> Grid | None:
    """``"mean"``, ``(rows, columns)`` or ``None``, as a grid."""
    if pool is None:
        return None
    if isinstance(pool, str) and pool == "mean":
        return 1, 1
    if not isinstance(pool, (tuple, list)) or len(pool) != 2 or not all(type(n) is int for n in pool):
        raise ValueError(f'pool must be "mean", None or a tuple of two integers (rows, columns), got {pool!r}')
    height, width = shape[3], shape[4]
    if not (1 <= pool[0] <= height and 1 <= pool[1] <= width):
        raise ValueError(
            f"pool={tuple(pool)} must lie between (1, 1) and the latent's height and width ({height}, {width})"
        )
    return pool[0], pool[1]


def check_mask(name: str, mask: Any, student: Tensor, marks: str) -> None:
    """A boolean tensor of plain memory on the student's device."""
    check_memory(name, mask, "boolean ")
    if mask.dtype is not torch.bool:
        raise TypeError(f"{name} must be torch.bool (True {marks}), got {mask.dtype}")
    check_beside(name, mask, student)


def check_frame_mask(frame_mask: Any, student: Tensor, layout: str) -> None:
    """Boolean ``[B, F]`` on the student's device."""
    check_mask("frame_mask", frame_mask, student, "marks a valid frame")
    frames = student.shape[1] if layout == "bfchw" else student.shape[2]
    if frame_mask.shape != (student.shape[0], frames):
        raise ValueError(
            f"frame_mask must have shape (batch, frames) = {(student.shape[0], frames)}, got {tuple(frame_mask.shape)}"
        )


def check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}")
