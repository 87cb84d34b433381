"""What setup.py gives the compilers of Unix and Windows, and the linker; no compiler needed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from cuda_toolkit import ROOT, pretend_toolkit
from setuptools.command.build_ext import build_ext

from benchmarks.nvcc import load_nvcc

nvcc = load_nvcc()


class Recorder:
    """A compiler of setuptools that compiles nothing."""

    def __init__(self, compiler_type: str):
        self.compiler_type, self.initialized, self.cc = compiler_type, False, r"C:\VS\cl.exe"
        self.flags: dict[str, list[str]] = {}

    def initialize(self, plat_name):
        assert not self.initialized
        self.initialized = True

    def compile(self, sources, folder, macros=None, include_dirs=None, extra_postargs=(), depends=None):
        assert self.initialized or self.compiler_type != "msvc", "before the threads start"
        self.flags |= {Path(source).name: list(extra_postargs) for source in sources}
        return [f"{folder}/{source}.obj" for source in sources]

    def link_executable(self, *arguments, **options):
        pass


@pytest.fixture
def build(monkeypatch):
    """Runs setup.py's own build of every extension on a recorder; returns what reaches the linker."""
    said: dict = {}
    for name in ("CODMD_SKIP_EXT", "CODMD_SKIP_CUDA", "CODMD_FORCE_CUDA", "CODMD_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", said.update)
    monkeypatch.setitem(sys.modules, "codmd_nvcc", nvcc)
    monkeypatch.setenv("CODMD_FORCE_CUDA", "1")
    runpy.run_path("setup.py")
    monkeypatch.delenv("CODMD_FORCE_CUDA")
    monkeypatch.setattr(sys.modules["codmd_nvcc"], "WINDOWS", False)

    def run(compiler: Recorder, folder: Path):
        linked = {}

        def link(self, ext):
            linked[ext.name] = SimpleNamespace(**vars(ext))

        monkeypatch.setattr(build_ext, "build_extension", link)
        monkeypatch.setattr(sys.modules["codmd_nvcc"], "WINDOWS", compiler.compiler_type == "msvc")
        command = said["cmdclass"]["build_ext"](setuptools.Distribution({"ext_modules": said["ext_modules"]}))
        command.compiler, command.build_temp, command.plat_name = compiler, str(folder / "temp"), "win-amd64"
        for ext in said["ext_modules"]:
            command.build_extension(ext)
        return linked

    return run


def test_msvc_is_given_its_own_flags_and_nvcc_the_same_compiler(build, tmp_path, monkeypatch):
    folder = pretend_toolkit(tmp_path / "cuda", "true", windows=True)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    compiler = Recorder("msvc")
    linked = build(compiler, tmp_path)
    everything = [flag for flags in compiler.flags.values() for flag in flags]
    assert all(flag.startswith("/") for flag in everything)
    assert all({"/std:c++17", "/O2", "/EHsc"} <= set(flags) for flags in compiler.flags.values())
    special = {name: flag for name, flags in compiler.flags.items() for flag in flags if flag.startswith("/arch")}
    assert special == {f"{loops}_{isa}.cpp": f"/arch:{isa.upper()}" for loops in ("dmd_loops", "passes")
                       for isa in ("avx2", "avx512")}  # fmt: skip
    assert "/openmp:experimental" in compiler.flags["pooled.cpp"]
    assert "/openmp:experimental" not in compiler.flags["bind_cuda.cpp"]
    cuda = linked["codmd._C_cuda"]
    assert cuda.libraries == ["cudart_static"]
    assert cuda.library_dirs == [str(folder / "lib" / "x64")]
    assert [Path(name).name for name in cuda.extra_objects[:4]] == [f"{Path(s).stem}.cu.obj" for s in nvcc.SOURCES]
    calls = [line for line in (folder / "log").read_text().splitlines() if " -c " in f" {line} "]
    assert len(calls) == 1 + len(nvcc.SOURCES)
    assert all(r"-ccbin=C:\VS\cl.exe" in line for line in calls)
    assert all("-Xcompiler=/MD,/EHsc" in line and "fPIC" not in line for line in calls[1:])


def test_unix_compilers_are_given_theirs(build, tmp_path, monkeypatch):
    folder = pretend_toolkit(tmp_path / "cuda", "true")
    monkeypatch.setenv("CUDA_HOME", str(folder))
    compiler = Recorder("unix")
    linked = build(compiler, tmp_path)
    assert all({"-std=c++17", "-O3"} <= set(flags) for name, flags in compiler.flags.items() if name != "probe.cpp")
    assert "-mavx512f" in compiler.flags["passes_avx512.cpp"]
    assert not any("-mavx" in flag for flag in compiler.flags["passes_baseline.cpp"])
    assert linked["codmd._C_cuda"].libraries == ["cudart_static", "rt", "pthread", "dl"]
    calls = [line for line in (folder / "log").read_text().splitlines() if "csrc/cuda" in line]
    assert all("-Xcompiler=-fPIC,-fvisibility=hidden" in line and "ccbin" not in line for line in calls)


def test_a_binary_of_an_earlier_build_is_linked_again(build, tmp_path, monkeypatch):
    """setuptools would keep it for as long as no header is newer, whatever architectures are asked for now."""
    monkeypatch.setenv("CUDA_HOME", str(pretend_toolkit(tmp_path / "cuda", "true")))
    for ext in build(Recorder("unix"), tmp_path).values():
        assert set(ext.extra_objects) <= set(ext.depends)
