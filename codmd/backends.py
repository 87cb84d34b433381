"""The choice of the backend that runs an operator, and its reasons.

``auto`` takes the first backend in the order triton, cuda, cpp, reference that can serve the tensor at hand; before
them the one that was measured to be the fastest for half-precision latents of that size on that GPU (``fastest.json``).
``CODMD_BACKEND`` replaces ``auto``; an explicit ``backend=`` argument wins over both.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from codmd.ops.contract import Backend

logger = logging.getLogger("codmd")

HALF = (torch.bfloat16, torch.float16)
HALF_AND_SINGLE = (torch.float32, *HALF)


def _triton() -> Backend:
    from codmd.kernels import backend

    return backend


def _cuda() -> Backend:
    from codmd.ops.backends import cuda

    return cuda


def _cpp() -> Backend:
    from codmd.ops.backends import cpp

    return cpp


def _reference() -> Backend:
    from codmd.ops.backends import reference

    return reference


@dataclass(frozen=True)
class Implementation:
    """One implementation: how to import it and which tensors it takes."""

    name: str
    imported: Callable[[], Backend]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    summary: str


BACKENDS = {
    backend.name: backend
    for backend in (
        Implementation("triton", _triton, ("cuda",), HALF_AND_SINGLE, "Triton kernels, NVIDIA and AMD GPUs"),
        Implementation("cuda", _cuda, ("cuda",), HALF_AND_SINGLE, "CUDA extension, NVIDIA GPUs"),
        Implementation("cpp", _cpp, ("cpu",), HALF_AND_SINGLE, "C++ extension, CPUs"),
        Implementation(
            "reference", _reference, ("cpu", "cuda", "any other"), (*HALF_AND_SINGLE, torch.float64),
            "PyTorch, any device",
        ),
    )
}  # fmt: skip
NAMES = ("auto", *BACKENDS)


@functools.cache
def load(name: str) -> tuple[Backend | None, str]:
    """Import a backend once. Returns ``(module, "")`` or ``(None, why it cannot be used)``; never raises."""
    try:
        module = BACKENDS[name].imported()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return (None, module.load_error) if module.load_error else (module, "")


def interpreting() -> bool:
    """Whether Triton runs its CPU interpreter (``TRITON_INTERPRET=1``), so that its kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.lru_cache(maxsize=256)
def _refusal(name: str, device: str, dtype: torch.dtype) -> str:
    backend = BACKENDS[name]
    takes_cpu = name == "triton" and interpreting()
    if name != "reference" and device not in backend.devices and not (takes_cpu and device == "cpu"):
        return f"takes {' and '.join(backend.devices)} tensors, not {device}"
    if dtype not in backend.dtypes:
        return f"takes {', '.join(map(str, backend.dtypes))}, not {dtype}"
    return load(name)[1]


FASTEST: dict[str, dict[str, list[tuple[float | None, str]]]] = json.loads(
    Path(__file__).with_name("fastest.json").read_text()
)
"""By compute capability (``sm_90``) and operator: (most elements of the student, backend), ascending; the last has no
limit. Written by ``python -m benchmarks.roofline`` from measurements; an operator that is absent keeps the order."""


@functools.lru_cache(maxsize=256)
def _measured(operator: str, place: torch.device) -> tuple[tuple[float, str], ...]:
    """The entries of ``FASTEST`` for a device."""
    if place.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return ()
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability(place))
    entries = FASTEST.get(capability, {}).get(operator, ())
    return tuple((math.inf if most is None else most, name) for most, name in entries)


def _fastest(operator: str, tensor: torch.Tensor) -> str:
    """The backend that was measured to be the fastest; empty if nothing was."""
    if tensor.dtype in HALF:
        for most, name in _measured(operator, tensor.device):
            if tensor.numel() <= most:
                return name
    return ""


@functools.lru_cache(maxsize=256)
def _resolve(requested: str, place: torch.device, dtype: torch.dtype, first: str = "") -> Backend:
    device = place.type
    if requested == "auto":
        for name in sorted(BACKENDS, key=lambda name: name != first):
            reason = _refusal(name, device, dtype)
            if not reason:
                logger.debug("codmd: %s %s tensors run on %s", device, dtype, name)
                break
            if device in BACKENDS[name].devices and dtype in BACKENDS[name].dtypes:
                logger.info("codmd: backend %s is not used for %s tensors: %s", name, device, reason)
    else:
        name, reason = requested, _refusal(requested, device, dtype)
        if reason:
            raise ValueError(f"backend={requested!r} cannot be used here: {reason}. `codmd doctor` lists what can be")
    module, _ = load(name)
    assert module is not None
    return module


def select(requested: str, tensor: torch.Tensor, operator: str = "") -> Backend:
    """The module that serves ``tensor``.

    Args:
        requested: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.
        tensor: the student or of its size; decides device, dtype and what is the fastest.
        operator: name in ``torch.ops.codmd``.

    Raises:
        ValueError: unknown name, or the backend asked for cannot serve the tensor (the reason is in the message).
    """
    if requested == "auto":
        requested = os.environ.get("CODMD_BACKEND", "auto") or "auto"
        if requested not in NAMES:
            raise ValueError(f"CODMD_BACKEND={requested!r} is not a backend; allowed: {', '.join(NAMES)}")
    first = _fastest(operator, tensor) if FASTEST and requested == "auto" else ""
    return _resolve(requested, tensor.device, tensor.dtype, first)


def _all_measured(device: str) -> list[tuple[str, str]]:
    """The measurements that ``auto`` follows on the current GPU, in words."""
    operators = sorted({operator for entries in FASTEST.values() for operator in entries})
    found = ((operator, _measured(operator, torch.device(device))) for operator in operators)
    return [
        (
            operator,
            ", ".join(name if most == math.inf else f"{name} up to {most:,.0f} elements" for most, name in entries),
        )
        for operator, entries in found
        if entries
    ]


def check_name(backend: str) -> None:
    """Raise ``ValueError`` unless ``backend`` names one, or is ``"auto"``."""
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is not known; allowed: {', '.join(NAMES)}")


def describe() -> str:
    """The output of ``codmd doctor``: for each device, the backend that runs and the reasons against the others."""
    requested = os.environ.get("CODMD_BACKEND", "auto") or "auto"
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, CODMD_BACKEND={requested}"]
    if torch.cuda.is_available():
        lines += [
            f"cuda:{i} {torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        ]
    for device in ("cpu", "cuda"):
        here = device == "cpu" or torch.cuda.is_available()
        lines.append(f"\n{device} tensors (float32, bfloat16, float16):")
        if not here:
            lines[-1] = "\ncuda tensors: no CUDA device is visible to torch, so nothing runs. With one:"
        for operator, entries in _all_measured(device):
            lines.append(f"  {operator}, half precision: {entries}")
        chosen = None
        for name, backend in BACKENDS.items():
            reason = _refusal(name, device, torch.float32)
            if not reason and chosen is None and requested in ("auto", name):
                chosen, state = name, "runs" if here else "would run"
            elif not reason:
                state = "available on request" if here else "would be available on request"
            elif device not in backend.devices and name != "reference":
                continue
            else:
                state = f"not usable: {reason}"
            lines.append(f"  {name:<10} {backend.summary:<38} {state}")
        if chosen is None:
            lines.append(f"  CODMD_BACKEND={requested} cannot serve {device} tensors: operators will raise")
    lines.append("\nfloat64 tensors always run on the reference.")
    return "\n".join(lines)
