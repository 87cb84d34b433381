"""The compiled module ``codmd._C_cuda``, or why it cannot run here and what to do about it."""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

NAME = "_C_cuda"
ABI_VERSION = 3

REBUILD = (
    "run `pip install` again with nvcc at hand (CUDA_HOME or PATH) and CODMD_FORCE_CUDA=1, which says why it "
    "cannot be built"
)


def load() -> tuple[ModuleType | None, str | None]:
    """(the module, ``None``) where it can run on the current device, else (the module or ``None``, the reason)."""
    try:
        binary = import_module(f"codmd.{NAME}")
    except ImportError as error:
        return None, _import_problem(error, Path(__file__).parents[2])
    found = getattr(binary, "abi_version", None)
    if found != ABI_VERSION:
        return binary, (
            f"the CUDA extension codmd.{NAME} is stale (interface {found}, this version needs {ABI_VERSION}): "
            "run `pip install` again"
        )
    if not torch.cuda.is_available():
        return binary, "torch sees no CUDA device"
    return binary, _device_problem(binary, torch.cuda.current_device())


def _import_problem(error: ImportError, package: Path) -> str:
    """What lies in the package under the module's name tells a missing binary from a foreign one."""
    files = sorted(path.name for path in package.glob(f"{NAME}.*") if path.suffix in (".so", ".pyd"))
    if not files:
        return f"the CUDA extension is not available ({error}); {REBUILD}"
    if any(name == NAME + suffix for name in files for suffix in EXTENSION_SUFFIXES):
        return f"the CUDA extension was built for another machine or Python and does not load ({error}); {REBUILD}"
    return (
        f"the CUDA extension was built for another Python or platform ({', '.join(files)}; this Python loads "
        f"{NAME}{EXTENSION_SUFFIXES[0]}); {REBUILD}"
    )


def _device_problem(binary: ModuleType, index: int) -> str | None:
    """Of the current device alone: asking another would start a context on it."""
    problem = binary.device_problem(index)
    if not problem:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"the CUDA extension, built for {binary.targets}, cannot run on cuda:{index} (sm_{major}{minor}): {problem}. "
        f"Run `pip install` again with CODMD_CUDA_ARCHS={major}{minor} and an nvcc that is not newer than the driver"
    )
