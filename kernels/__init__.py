"""Triton kernels behind the operators of :mod:`codmd.ops`, for NVIDIA and AMD GPUs.

Importing this package never fails: ``load_error`` is None, or says why the kernels cannot run here.
"""

from __future__ import annotations

import importlib
from typing import Any

OLDEST_TRITON = (3, 4)

_RELATION = "relation_forward", "relation_frames", "relation_batch", "relation_backward", "batch_grad_shape"
_CODMD = "codmd_forward", "codmd_terms", "codmd_rows", "codmd_gathered", "codmd_backward"
_HOME = {
    **dict.fromkeys(_RELATION, ".relation"),
    **dict.fromkeys(("dmd_forward", "dmd_backward", *_CODMD), ".codmd"),
}


def _load_error() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


load_error: str | None = _load_error()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(importlib.import_module(_HOME[name], __name__), name)
    return function


__all__ = ["load_error", *_HOME]
