"""Toolkits that only say what they are asked to do."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
