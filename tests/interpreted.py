"""Tests that Triton's CPU interpreter runs: a session of their own, since it replaces the compiler for a process.

``TRITON_INTERPRET=1 python -m pytest tests/contract tests/test_triton_*.py``
"""

from __future__ import annotations

import os

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is that session."""


def needs_interpreter() -> None:
    """Skip where the interpreter itself cannot run."""
    from codmd.kernels.launch import TRITON

    if TRITON < (3, 8) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"numpy {np.__version__}: the interpreter of Triton before 3.8 needs one before 2.4")
