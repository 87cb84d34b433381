"""Triton kernels behind the operators of :mod:`codmd.ops`, for NVIDIA and AMD GPUs.

Importing this package never fails: ``load_error`` is None, or says why the kernels cannot run here.
"""

from __future__ import annotations

OLDEST_TRITON = (3, 4)


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
