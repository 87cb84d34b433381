"""The build's own nvcc module, and toolkits that only say what they are asked to do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_nvcc() -> ModuleType:
    """csrc/nvcc.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("codmd_nvcc", ROOT / "csrc" / "nvcc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pretend_toolkit(folder: Path, compile_step: str, windows: bool = False) -> Path:
    """A toolkit whose nvcc knows sm_80 and sm_90, logs its arguments and runs ``compile_step`` (sh) for ``-c``."""
    runtime = folder / ("lib/x64/cudart_static.lib" if windows else "lib64/libcudart_static.a")
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    program = folder / "bin" / ("nvcc.exe" if windows else "nvcc")
    program.parent.mkdir()
    program.write_text(f"""#!/bin/sh
cd "{folder}"
printf '%s\\n' "$*" >> log
case "$*" in
  *--list-gpu-code*) echo sm_80; echo sm_90 ;;
  *--dryrun*) echo "#\\$ TOP={folder}" ;;
  *) {compile_step} ;;
esac
""")
    program.chmod(0o755)
    return folder
