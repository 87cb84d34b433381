"""Builds the CUDA kernels' bodies for the host: the same sources, threads simulated one after another."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock

from codmd import backends
from codmd.ops.backends import cuda

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))


def build(folder: Path, sources: Sequence[Path], target: Path, flags: Sequence[str], link: Sequence[str]) -> None:
    """Compile ``sources`` as C++ with ``flags`` in parallel and link them into ``target``."""

    def compile_one(source: Path) -> str:
        output = str(folder / f"{source.name}.o")
        subprocess.run([COMPILER, "-std=c++17", *flags, "-x", "c++", "-c", str(source), "-o", output], check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([COMPILER, *link, *objects, "-o", str(target)], check=True)


@functools.cache
def module() -> ModuleType:
    """The binding with simulated kernels, under the name ``codmd_cuda_simulated``; built once for the same sources."""
    import pybind11

    name = "codmd_cuda_simulated"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", "-DCODMD_SIMULATED", f"-DCODMD_CUDA_MODULE={name}", *includes]
    sources = [path.read_bytes() for path in sorted(CSRC.rglob("*.*")) if path.suffix in (".cpp", ".cu", ".h")]
    key = hashlib.sha256(b"\0".join([repr((COMPILER, flags)).encode(), *sources])).hexdigest()[:16]
    folder = CSRC.parent / "build" / f"simulated-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with FileLock(folder / "lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / target.name
                build(Path(scratch), [*KERNELS, CSRC / "bind_cuda.cpp"], built, flags, ["-shared"])
                built.rename(target)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The body of a fixture: every operator on float32, bfloat16 and float16 runs on the simulated extension."""
    reference, wide, extension = backends.select, torch.float64, module()
    monkeypatch.setattr(cuda, "_C", extension)
    monkeypatch.setattr(cuda, "_tickets", {})
    monkeypatch.setattr(
        backends, "select", lambda name, t, _="": reference("reference", t) if t.dtype is wide else cuda
    )
    extension.shuffle(0)
    yield extension
    for tickets in cuda._tickets.values():
        assert not tickets.any(), "tickets are zero after every call"
