"""Tests that Triton's CPU interpreter runs, which replaces the compiler for a whole process: one of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is that process."""


def needs_interpreter() -> None:
    """Skip where the interpreter itself cannot run."""
    from codmd.kernels.launch import TRITON

    if TRITON < (3, 8) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"numpy {np.__version__}: the interpreter of Triton before 3.8 needs one before 2.4")


def run_interpreted(file: str) -> None:
    """Run the tests of ``file`` in an interpreted process."""
    needs_interpreter()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
