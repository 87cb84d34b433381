"""Finds nvcc and compiles the CUDA sources; used by setup.py and by the tests, so that both build the same code.

Environment: ``CUDA_HOME`` (or ``CUDA_PATH``) names the toolkit, ``CODMD_CUDA_ARCHS`` the compute capabilities
("80;90" or "8.0,9.0"), ``CODMD_BUILD_JOBS`` the parallel compiles. nvcc itself reads ``NVCC_CCBIN``, its host compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = (80, 86, 89, 90, 100, 120)
SOURCES = ("csrc/cuda/dmd.cu", "csrc/cuda/long_relation.cu", "csrc/cuda/relation.cu", "csrc/cuda/pooled.cu")
BINDING = "csrc/bind_cuda.cpp"
WINDOWS = os.name == "nt"


class Unavailable(Exception):
    """Why the CUDA extension cannot be built here."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc, the architectures it knows (80 for sm_80) and where the static CUDA runtime lies."""

    nvcc: str
    known: tuple[int, ...]
    library_dir: str
    host: tuple[str, ...] = ()  # flags that name the host compiler; without, nvcc looks on the PATH

    @property
    def libraries(self) -> list[str]:
        """What a binary of its objects links with."""
        return ["cudart_static"] if WINDOWS else ["cudart_static", "rt", "pthread", "dl"]


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, or at least the driver's tools."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def find_toolkit(host_compiler: str | None = None) -> Toolkit:
    """The toolkit of ``CUDA_HOME``, ``CUDA_PATH`` or the PATH.

    Args:
        host_compiler: the C++ compiler that nvcc is to use, by its path; ``None`` leaves the choice to nvcc.

    Raises:
        Unavailable: no nvcc, an nvcc that does not run, or no static runtime beside it.
    """
    nvcc = _find_nvcc()
    host = (f"-ccbin={host_compiler}",) if host_compiler else ()
    try:
        listing = _output(nvcc, "--list-gpu-code")
        described = _output(nvcc, *host, "--dryrun", "-c", "probe.cu")
    except OSError as error:
        raise Unavailable(f"{nvcc} does not run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{nvcc} does not run: {error.stdout.strip()[-1000:] or error}") from error
    known = tuple(sorted({int(number) for number in re.findall(r"^sm_(\d+)\r?$", listing, re.MULTILINE)}))
    return Toolkit(nvcc, known, _runtime_folder(nvcc, described), host)


def architectures(toolkit: Toolkit) -> list[int]:
    """The architectures to build for: ``CODMD_CUDA_ARCHS``, or the default ones that nvcc knows.

    Raises:
        Unavailable: an architecture asked for is malformed or unknown to nvcc, or nvcc knows no default one.
    """
    wanted = os.environ.get("CODMD_CUDA_ARCHS", "").strip()
    known = f"{toolkit.nvcc} knows {', '.join(map(str, toolkit.known)) or 'none'}"
    if not wanted:
        archs = [arch for arch in DEFAULT_ARCHS if arch in toolkit.known]
        if not archs:
            raise Unavailable(f"no architecture among {', '.join(map(str, DEFAULT_ARCHS))} can be built: {known}")
        return archs
    names = [name for name in re.split(r"[;,\s]+", wanted) if name]
    found = {name: re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)", name) for name in names}
    archs = sorted({int(match[1] + match[2]) for match in found.values() if match})
    unknown = [name for name, match in found.items() if not match or int(match[1] + match[2]) not in toolkit.known]
    if unknown or not archs:
        refused = f"{', '.join(unknown)} cannot be built" if unknown else "it names no architecture"
        raise Unavailable(f'CODMD_CUDA_ARCHS={wanted!r}: {refused}. Write "80;90" or "8.0,9.0"; {known}')
    return archs


def compile_command(toolkit: Toolkit, archs: Sequence[int], source: str, target: str, *extra: str) -> list[str]:
    """nvcc's command line for one source: machine code for ``archs``, and PTX of the newest for later devices."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    host = ["-Xcompiler=/MD,/EHsc"] if WINDOWS else ["-Xcompiler=-fPIC,-fvisibility=hidden"]
    return [toolkit.nvcc, "-std=c++17", "-O3", *toolkit.host, *targets, *host, *extra, "-c", source, "-o", target]


def compile_sources(toolkit: Toolkit, archs: Sequence[int], folder: str, *extra: str) -> list[tuple[str, str]]:
    """Compile all CUDA sources in parallel, from the project's root. Returns (object, what nvcc said) of each.

    Raises:
        Unavailable: a source does not compile; nvcc's message is in it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)

    def build(source: str) -> tuple[str, str]:
        target = str(Path(folder, Path(source).stem + (".cu.obj" if WINDOWS else ".cu.o")))
        done = subprocess.run(
            compile_command(toolkit, archs, source, target, *extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise Unavailable(f"nvcc failed on {source}:\n{done.stdout[-4000:]}")
        return target, done.stdout

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(build, SOURCES))


def jobs() -> int:
    """Parallel compiles: ``CODMD_BUILD_JOBS``, or one for each processor.

    Raises:
        ValueError: ``CODMD_BUILD_JOBS`` is not a positive integer.
    """
    wanted = os.environ.get("CODMD_BUILD_JOBS", "").strip()
    if not wanted:
        return os.cpu_count() or 1
    if not wanted.isdecimal() or not int(wanted):
        raise ValueError(f"CODMD_BUILD_JOBS={wanted!r} must be a positive integer")
    return int(wanted)


def target_names(archs: Iterable[int]) -> str:
    """The architectures as the binary names them."""
    names = [f"sm_{arch}" for arch in archs]
    return ", ".join(names) + f" and PTX of {names[-1]}"


def _find_nvcc() -> str:
    name = "nvcc.exe" if WINDOWS else "nvcc"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home, "bin", name)
            if not nvcc.exists():
                raise Unavailable(f"{variable}={home} holds no bin/{name}")
            return str(nvcc)
    nvcc_on_path = shutil.which("nvcc")
    if nvcc_on_path is None:
        raise Unavailable("nvcc is neither under CUDA_HOME nor on the PATH")
    return nvcc_on_path


def _runtime_folder(nvcc: str, described: str) -> str:
    """Where cudart_static lies, from nvcc's own description of its toolkit (it may be a wrapper elsewhere)."""
    top = re.search(r"^#\$ TOP=(.+?)\r?$", described, re.MULTILINE)
    root = Path(top.group(1)) if top else Path(nvcc).resolve().parents[1]
    file = "cudart_static.lib" if WINDOWS else "libcudart_static.a"
    folders = [root / "lib64", root / "lib", root / "lib" / "x64", *sorted(root.glob("targets/*/lib"))]
    for folder in folders:
        if (folder / file).exists():
            return str(folder)
    raise Unavailable(
        f"{file} is not in {', '.join(map(str, folders))}: install the toolkit's cudart development files"
    )


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout
