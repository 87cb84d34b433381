"""Which implementation of the fused DMD and CoDMD losses runs: the backend's own, or the reference with a reason."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

from codmd import backends
from codmd.ops import _reference_dmd

logger = logging.getLogger("codmd")


def select(requested: str, tensor: Tensor) -> ModuleType:
    """The module with ``dmd_forward``, ``dmd_backward``, ``codmd_forward`` and ``codmd_backward`` for ``tensor``.

    Raises:
        ValueError: ``requested`` is unknown, or names a backend that cannot serve the tensor.
    """
    backend = backends.select(requested, tensor)
    module, reason = _companion(backend)
    if module is None:
        if requested not in ("auto", "reference"):
            raise ValueError(f"backend={requested!r} has no fused DMD loss: {reason}. `codmd doctor` lists backends")
        return _reference_dmd
    return module


@functools.cache
def _companion(backend: ModuleType) -> tuple[ModuleType | None, str]:
    """The backend itself when it has the functions, else the module ``<backend>_dmd`` beside it."""
    if hasattr(backend, "codmd_forward"):
        return backend, ""
    try:
        module = importlib.import_module(f"{backend.__name__}_dmd")
    except Exception as error:
        module, reason = None, f"{type(error).__name__}: {error}"
    else:
        reason = getattr(module, "load_error", None) or ""
    if reason:
        logger.info("codmd: the DMD losses run on the reference instead of %s: %s", backend.__name__, reason)
        return None, reason
    return module, ""


def report_stepwise(requested: str, reason: str) -> None:
    """Log, once, why a convention does not run fused; an explicit backend other than the reference is an error."""
    if requested not in ("auto", "reference"):
        raise ValueError(f"backend={requested!r} cannot serve this convention: {reason}. Use backend='reference'")
    if not torch.compiler.is_compiling():
        _log_once(reason)


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("codmd: this DMD convention runs on the reference: %s", reason)
