"""Tests that Triton's CPU interpreter runs: a session of their own, since it replaces the compiler for a process.

``TRITON_INTERPRET=1 python -m pytest tests/contract tests/test_triton_*.py``
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is that session."""


def needs_interpreter() -> None:
    """Skip where the interpreter itself cannot run."""
    from codmd.kernels.launch import TRITON

    if TRITON < (3, 8) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"numpy {np.__version__}: the interpreter of Triton before 3.8 needs one before 2.4")


def patch_language_once() -> None:
    """Patch Triton's language for the whole session, instead of in every call of every function: a third of its time.

    Nothing restores it: this process compiles no kernel.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing_to_restore = type(scope)()
    interpreter._patch_lang = lambda fn: nothing_to_restore
