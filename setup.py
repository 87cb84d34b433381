"""Builds the optional extensions ``codmd._C`` (C++) and ``codmd._C_cuda``; everything else is in pyproject.toml.

Environment: ``CODMD_SKIP_EXT=1`` installs without either, ``CODMD_SKIP_CUDA=1`` without the second, which is built
where nvcc and a GPU are found. ``CODMD_FORCE_CUDA=1`` builds it without a GPU too, and fails instead of warning, or of
skipping; ``CODMD_CUDA_ARCHS`` and ``CUDA_HOME`` are read by csrc/nvcc.py, ``CODMD_BUILD_JOBS`` bounds the parallel
compiles.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

_spec = importlib.util.spec_from_file_location("codmd_nvcc", Path(__file__).with_name("csrc") / "nvcc.py")
nvcc = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = nvcc
_spec.loader.exec_module(nvcc)

X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
SOURCES = [
    "csrc/bind.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/dmd_loops_baseline.cpp",
    "csrc/cpu/features.cpp",
    "csrc/cpu/gradient.cpp",
    "csrc/cpu/grams.cpp",
    "csrc/cpu/objective.cpp",
    "csrc/cpu/passes_baseline.cpp",
    "csrc/cpu/pooled.cpp",
    "csrc/cpu/relation.cpp",
    "csrc/cpu/relations.cpp",
    "csrc/cpu/whole.cpp",
]
X86_SOURCES = [f"csrc/cpu/{loops}_{isa}.cpp" for loops in ("dmd_loops", "passes") for isa in ("avx2", "avx512")]

# One file per instruction set has flags of its own; everything else runs on every processor.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
UNIX_COMMON = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
UNIX_FLAGS = {
    "dmd_loops_avx2.cpp": AVX2,
    "dmd_loops_avx512.cpp": AVX512,
    "passes_avx2.cpp": AVX2,
    # GCC 12 warns about its own AVX-512 headers.
    "passes_avx512.cpp": [*AVX512, "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
}
MSVC_FLAGS = {Path(source).name: ["/arch:AVX512" if "512" in source else "/arch:AVX2"] for source in X86_SOURCES}

CUDA_MODULE = "codmd._C_cuda"
DATA = ["codmd.configs", "codmd.models.wan.configs"]
"""Folders without Python files; setuptools warns of data in folders that are no packages."""
LINKED = Path("src/codmd/kernels/__init__.py").is_file()
"""Whether src/codmd and codmd/kernels are the links they should be; on some systems they come as text files."""


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


class BuildKernels(build_ext):
    """Compiles the sources in parallel, each with its own flags."""

    def build_extension(self, ext: Extension) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        if msvc and not self.compiler.initialized:
            # Before the threads: the first compile would look for Visual Studio, and all of them are first.
            self.compiler.initialize(self.plat_name)
        common = ["/std:c++17", "/O2", "/EHsc", "/bigobj"] if msvc else UNIX_COMMON
        if ext.name == CUDA_MODULE:
            if self._compile_kernels(ext):
                self._compile_and_link(ext, common, {})
        elif msvc:
            self._compile_and_link(ext, [*common, "/openmp:experimental"], MSVC_FLAGS)
        else:
            self._compile_and_link(ext, [*common, "-ffp-contract=off", *self._openmp(ext)], UNIX_FLAGS)

    def _compile_and_link(self, ext: Extension, common: list[str], special: dict[str, list[str]]) -> None:
        import pybind11

        include_dirs = [*ext.include_dirs, pybind11.get_include()]

        def compile_one(source: str) -> list[str]:
            flags = [*common, *special.get(Path(source).name, [])]
            return self.compiler.compile(
                [source], self.build_temp, ext.define_macros, include_dirs, extra_postargs=flags, depends=ext.depends
            )

        with ThreadPoolExecutor(nvcc.jobs()) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        sources, given, depends = ext.sources, ext.extra_objects, ext.depends
        # New objects make the binary of an earlier build out of date, whatever they were compiled from and for.
        ext.sources, ext.extra_objects, ext.depends = [], [*given, *objects], [*depends, *given, *objects]
        try:
            super().build_extension(ext)
        finally:
            ext.sources, ext.extra_objects, ext.depends = sources, given, depends

    def _compile_kernels(self, ext: Extension) -> bool:
        """The CUDA objects, and how to link them with a static CUDA runtime; False, with a warning, where they fail."""
        try:
            # nvcc looks for cl.exe on the PATH alone, setuptools where Visual Studio lies.
            toolkit = nvcc.find_toolkit(self.compiler.cc if self.compiler.compiler_type == "msvc" else None)
            archs = nvcc.architectures(toolkit)
            ext.extra_objects = [name for name, _ in nvcc.compile_sources(toolkit, archs, self.build_temp)]
        except nvcc.Unavailable as error:
            if flag("CODMD_FORCE_CUDA"):
                raise SystemExit(f"CODMD_FORCE_CUDA=1, but the CUDA extension cannot be built: {error}") from error
            self.warn(f"installing without the CUDA extension: {error}")
            return False
        ext.define_macros = [("CODMD_CUDA_TARGETS", f'"{nvcc.target_names(archs)}"')]
        ext.libraries, ext.library_dirs = toolkit.libraries, [toolkit.library_dir]
        return True

    def _openmp(self, ext: Extension) -> list[str]:
        """``-fopenmp`` where the compiler has it: without, the extension runs on one thread."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(probe)], folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, "probe", folder, extra_postargs=["-fopenmp"])
            except Exception as error:
                self.warn(f"building without OpenMP: {error}")
                return []
        ext.extra_link_args = ["-fopenmp"]
        return ["-fopenmp"]


def extensions() -> list[Extension]:
    for skip in ("CODMD_SKIP_EXT", "CODMD_SKIP_CUDA"):
        if flag(skip) and flag("CODMD_FORCE_CUDA"):
            raise SystemExit(f"CODMD_FORCE_CUDA=1 asks for the CUDA extension and {skip}=1 leaves it out: unset one")
    if flag("CODMD_SKIP_EXT"):
        return []
    patterns = ("*.h", "*.inl", "*.cu")
    depends = [str(path) for pattern in patterns for path in sorted(Path("csrc").rglob(pattern))]
    found = [
        Extension(
            "codmd._C",
            sources=[*SOURCES, *(X86_SOURCES if X86 else [])],
            depends=depends,
            define_macros=[("CODMD_X86", "1")] if X86 else [],
            language="c++",
            optional=True,
        )
    ]
    forced = flag("CODMD_FORCE_CUDA")
    if forced or (nvcc.has_gpu() and not flag("CODMD_SKIP_CUDA")):
        found.append(Extension(CUDA_MODULE, [nvcc.BINDING], depends=depends, language="c++", optional=not forced))
    return found


def packages() -> dict[str, Any]:
    """Where the packages are: in src/, whose path an editable install adds, so that every tool finds them there."""
    if LINKED:
        return {"package_dir": {"": "src"}, "packages": [*find_packages("src"), *DATA]}
    kernels = find_packages(include=["kernels", "kernels.*"])
    return {
        "package_dir": {f"codmd.{package}": package.replace(".", "/") for package in kernels},
        "packages": [*find_packages(include=["codmd", "codmd.*"]), *(f"codmd.{package}" for package in kernels), *DATA],
    }


setup(
    **packages(),
    package_data={
        "codmd": ["py.typed", "fastest.json"],
        "codmd.configs": ["*.yaml", "*.json"],
        "codmd.models.wan.configs": ["*.json"],
        "codmd.compare": ["page.html"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
)
