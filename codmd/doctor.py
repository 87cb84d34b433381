"""Show which backend runs for which device, and why not another; with --report, what an issue report needs."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata

HELP = "show which backend runs for which device, and why"
PACKAGES = ("torch", "triton", "numpy", "einops")
EXTRAS = ("train", "demo", "inspect", "flash")
VARIABLES = ("CODMD_", "TRITON_", "CUDA_", "TORCH", "PYTORCH_", "NCCL_", "OMP_", "MKL_")
"""Beginnings of the environment variables that change how the operators or a run behave."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd doctor`."""
    parser.add_argument("--report", action="store_true", help="add versions, hardware and environment, as Markdown")


def run(args: argparse.Namespace) -> int:
    """Prints the description of the backends, in a report if asked."""
    from codmd import backends

    print(report(backends.describe()) if args.report else backends.describe())
    return 0


def report(description: str) -> str:
    """What an issue report needs: versions, hardware and environment in front of the backends, as a Markdown block."""
    import torch

    from codmd import __version__, extras

    names = dict.fromkeys([*PACKAGES, *sorted(name for extra in EXTRAS for name in extras.requirements(extra))])
    environment = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)]
    lines = [
        f"codmd {__version__} in {os.path.dirname(__file__)}",
        f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}",
        f"CPU: {platform.machine()}, {os.cpu_count()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}",
        f"torch built for CUDA {torch.version.cuda}, ROCm {torch.version.hip}; NVIDIA driver {_driver()}",
        f"packages: {', '.join(f'{name} {_version(name)}' for name in names)}",
        f"environment: {' '.join(environment) or 'nothing that matters here'}",
    ]
    return "\n".join(["```", *lines, "", description, "```"])


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "not found"
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(question, capture_output=True, text=True).stdout.split()
    return answer[0] if answer else "silent"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
