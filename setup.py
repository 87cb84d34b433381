"""Builds the optional C++ extension ``codmd._C``; everything else is in pyproject.toml.

Environment: ``CODMD_SKIP_EXT=1`` installs without it, ``CODMD_BUILD_JOBS`` bounds the parallel compiles.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
SOURCES = [
    "csrc/bind.cpp",
    "csrc/bind_dmd.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/dmd_backward.cpp",
    "csrc/cpu/dmd_forward.cpp",
    "csrc/cpu/dmd_loops_baseline.cpp",
    "csrc/cpu/every_pixel.cpp",
    "csrc/cpu/grams.cpp",
    "csrc/cpu/passes_baseline.cpp",
    "csrc/cpu/pooled.cpp",
    "csrc/cpu/relation_cpu.cpp",
    "csrc/cpu/relations.cpp",
]
X86_SOURCES = [f"csrc/cpu/{loops}_{isa}.cpp" for loops in ("dmd_loops", "passes") for isa in ("avx2", "avx512")]

# One file per instruction set has flags of its own; everything else runs on every processor.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
UNIX_FLAGS = {
    "dmd_loops_avx2.cpp": AVX2,
    "dmd_loops_avx512.cpp": AVX512,
    "passes_avx2.cpp": AVX2,
    # GCC 12 warns about its own AVX-512 headers.
    "passes_avx512.cpp": [*AVX512, "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
}
MSVC_FLAGS = {Path(source).name: ["/arch:AVX512" if "512" in source else "/arch:AVX2"] for source in X86_SOURCES}


class BuildKernels(build_ext):
    """Compiles the sources in parallel, each with its own flags."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        msvc = self.compiler.compiler_type == "msvc"
        if msvc:
            common = ["/std:c++17", "/O2", "/EHsc", "/openmp:experimental"]
        else:
            common = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", *self._openmp(ext)]
        special = MSVC_FLAGS if msvc else UNIX_FLAGS
        include_dirs = [*ext.include_dirs, pybind11.get_include()]

        def compile_one(source: str) -> list[str]:
            flags = [*common, *special.get(Path(source).name, [])]
            return self.compiler.compile(
                [source], self.build_temp, ext.define_macros, include_dirs, extra_postargs=flags, depends=ext.depends
            )

        jobs = int(os.environ.get("CODMD_BUILD_JOBS", 0)) or os.cpu_count() or 1
        with ThreadPoolExecutor(jobs) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        sources, ext.sources, ext.extra_objects = ext.sources, [], objects
        try:
            super().build_extension(ext)
        finally:
            ext.sources, ext.extra_objects = sources, []

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
    if os.environ.get("CODMD_SKIP_EXT", "0") not in ("", "0"):
        return []
    return [
        Extension(
            "codmd._C",
            sources=[*SOURCES, *(X86_SOURCES if X86 else [])],
            depends=[str(path) for pattern in ("*.h", "*.inl") for path in sorted(Path("csrc").rglob(pattern))],
            define_macros=[("CODMD_X86", "1")] if X86 else [],
            language="c++",
            optional=True,
        )
    ]


setup(
    packages=[*find_packages(include=["codmd", "codmd.*"]), "codmd.kernels"],
    package_dir={"codmd.kernels": "kernels"},
    package_data={
        "codmd": ["py.typed", "configs/*.yaml", "configs/*.json"],
        "codmd.models": ["configs/*.json"],
        "codmd.compare": ["page.html"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
)
