"""The build's own nvcc module, csrc/nvcc.py, which is no part of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PATH = Path(__file__).resolve().parents[1] / "csrc" / "nvcc.py"


def load_nvcc() -> ModuleType:
    """That module."""
    spec = importlib.util.spec_from_file_location("codmd_nvcc", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
