"""The CUDA extension as nvcc builds it: every kernel for every default architecture, without a GPU.

Skipped only where there is no usable nvcc; what the kernels compute is tested in test_cuda_host.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PER_DTYPE = ("RelationPass", "BroadcastPass", "DmdPass", "DmdBackwardPass", "GramPass", "MeanPass", "MixPass")
ONCE = ("FinishPass", "GatheredPass", "DmdFinishPass", "UnitPass", "DivergencePass", "MatrixPass", "TermsPass")
# Registers that leave room for the blocks a multiprocessor should hold: the pooling pass and the write of its gradient
# are bound by memory alone.
BUDGETS = {"RelationPass": 64, "BroadcastPass": 64, "UnitPass": 64}
LARGEST_BUDGET = 128


def load_nvcc() -> ModuleType:
    spec = importlib.util.spec_from_file_location("codmd_nvcc", ROOT / "csrc" / "nvcc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


nvcc = load_nvcc()


@pytest.fixture(scope="module")
def toolkit():
    try:
        return nvcc.find_toolkit()
    except nvcc.Unavailable as error:
        if os.environ.get("CUDA_HOME") or shutil.which("nvcc"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(toolkit, tmp_path_factory):
    """(architectures, [(object, messages)]) of the full build, ptxas talking."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        archs = [arch for arch in nvcc.DEFAULT_ARCHS if arch in toolkit.known]
        folder = tmp_path_factory.mktemp("cuda")
        return archs, nvcc.compile_sources(toolkit, archs, str(folder), "-Xptxas=-v")
    finally:
        os.chdir(before)


def kernel_of(symbol: str) -> str:
    (name,) = re.findall(r"\d([A-Z][A-Za-z]*Pass)", symbol)
    return name


def reports(messages: str) -> list[tuple[str, int, int, int]]:
    """(kernel, architecture, bytes spilled, registers) of every compiled entry."""
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        (kernel_of(symbol), int(arch), int(stores) + int(loads), int(registers))
        for symbol, arch, stores, loads, registers in re.findall(pattern, messages, re.DOTALL)
    ]


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_without_spills(compiled):
    archs, objects = compiled
    found = [report for _, messages in objects for report in reports(messages)]
    expected = Counter({(kernel, arch): 3 for kernel in PER_DTYPE for arch in archs})
    expected.update({(kernel, arch): 1 for kernel in ONCE for arch in archs})
    assert Counter((kernel, arch) for kernel, arch, _, _ in found) == expected
    assert not [report for report in found if report[2]], "spills"
    beyond = [report for report in found if report[3] > BUDGETS.get(report[0], LARGEST_BUDGET)]
    assert not beyond, "registers"


@pytest.mark.slow
def test_the_binary_holds_every_kernel_links_no_cuda_library_and_says_why_it_cannot_run(toolkit, compiled, tmp_path):
    import pybind11

    archs, objects = compiled
    target = tmp_path / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    macro = f'-DCODMD_CUDA_TARGETS="{nvcc.target_names(archs)}"'
    subprocess.run(
        [
            os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", macro,
            *includes, str(ROOT / nvcc.BINDING), *(name for name, _ in objects), f"-L{toolkit.library_dir}",
            *(f"-l{name}" for name in toolkit.libraries), "-o", str(target),
        ],
        check=True,
    )  # fmt: skip
    symbols = subprocess.run(["nm", str(target)], capture_output=True, text=True, check=True).stdout
    stubs = Counter(kernel_of(name) for name in set(re.findall(r"_ZN5codmd4cudaL?3runI\S+_$", symbols, re.MULTILINE)))
    assert stubs == Counter({**dict.fromkeys(PER_DTYPE, 3), **dict.fromkeys(ONCE, 1)})
    linked = subprocess.run(["ldd", str(target)], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in linked.replace(str(target), "")
    assert "torch" not in linked
    script = "import _C_cuda as m; print(m.targets); print(m.device_problem(99))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    targets, problem = said.stdout.splitlines()
    assert targets == nvcc.target_names(archs)
    assert re.search(r"\(cudaError\w+\)$", problem)


def test_latents_are_read_sixteen_bytes_at_a_time(toolkit, tmp_path):
    target = tmp_path / "relation.ptx"
    arch = max(arch for arch in nvcc.DEFAULT_ARCHS if arch in toolkit.known)
    command = [toolkit.nvcc, "-std=c++17", "-O3", f"-arch=compute_{arch}", "-ptx", "csrc/cuda/relation.cu"]
    subprocess.run([*command, "-o", str(target)], check=True, cwd=ROOT)
    entries = dict(re.findall(r"\.entry (\S+?)\((.*?)\n}", target.read_text(), re.DOTALL))
    passes = [body for name, body in entries.items() if kernel_of(name) == "RelationPass"]
    writes = [body for name, body in entries.items() if kernel_of(name) == "BroadcastPass"]
    assert len(passes) == len(writes) == 3
    assert all(len(re.findall(r"ld\.global\.nc\.v4\.[ubf]32", body)) == 3 for body in passes)
    assert all(re.search(r"st\.global\.v4\.[ubf]32", body) for body in writes)


def test_the_default_architectures_are_those_that_nvcc_knows(monkeypatch):
    monkeypatch.delenv("CODMD_CUDA_ARCHS", raising=False)
    assert nvcc.architectures(nvcc.Toolkit("nvcc", (75, 80, 86, 89, 90), "lib")) == [80, 86, 89, 90]


@pytest.mark.parametrize("wanted", ["90;80", "9.0,8.0", "sm_80 sm_90 "])
def test_architectures_can_be_named_in_the_usual_ways(wanted, monkeypatch):
    monkeypatch.setenv("CODMD_CUDA_ARCHS", wanted)
    assert nvcc.architectures(nvcc.Toolkit("nvcc", (80, 90), "lib")) == [80, 90]


def test_an_unknown_architecture_is_refused_with_those_that_exist(monkeypatch):
    monkeypatch.setenv("CODMD_CUDA_ARCHS", "80;70")
    with pytest.raises(nvcc.Unavailable, match=r"70 is unknown.*80, 90"):
        nvcc.architectures(nvcc.Toolkit("nvcc", (80, 90), "lib"))


def build_in_place(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("codmd", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", "lib"],
        cwd=folder,
        env={**os.environ, "CC": "false", "CXX": "false", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "skip, force, fails, said",
    [
        ("0", "0", False, "installing without the CUDA extension: CUDA_HOME="),
        ("0", "1", True, "CODMD_FORCE_CUDA=1, but the CUDA extension cannot be built: CUDA_HOME="),
        ("1", "0", False, ""),
    ],
    ids=["warns", "forced", "skipped"],
)
def test_without_nvcc_the_build_warns_unless_it_is_forced(skip, force, fails, said, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    done = build_in_place(folder, CUDA_HOME=str(tmp_path), CODMD_SKIP_CUDA=skip, CODMD_FORCE_CUDA=force)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    assert said in output
    assert ("CUDA extension" in output) == bool(said)
