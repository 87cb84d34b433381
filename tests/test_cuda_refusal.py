"""A CUDA binary that is missing, foreign, stale or of another architecture: a reason, a log line, advice, no crash."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from codmd import backends
from codmd.ops.backends import cuda, cuda_binary

ROOT = Path(__file__).resolve().parents[1]
NO_IMAGE = "no kernel image is available for execution on the device (cudaErrorNoKernelImageForDevice)"


@pytest.fixture
def fresh_choice():
    """Backends are chosen once a process: forget the choices before and after."""
    caches = (backends.load, backends._refusal, backends._resolve)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def binary(monkeypatch):
    """A binary that works, on a machine with one GPU of capability 7.5."""
    found = SimpleNamespace(
        abi_version=cuda_binary.ABI_VERSION, targets="sm_80, sm_90 and PTX of sm_90", device_problem=lambda index: ""
    )
    monkeypatch.setattr(cuda_binary, "import_module", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    return found


def test_a_binary_that_runs_here_is_loaded_without_a_reason(binary):
    assert cuda_binary.load() == (binary, None)


def test_a_binary_for_another_architecture_is_refused_with_the_rebuild_that_helps(binary):
    binary.device_problem = lambda index: NO_IMAGE
    _, reason = cuda_binary.load()
    assert "built for sm_80, sm_90 and PTX of sm_90, cannot run on cuda:0 (sm_75)" in reason
    assert NO_IMAGE in reason
    assert "CODMD_CUDA_ARCHS=75" in reason


@pytest.mark.parametrize("version", [None, cuda_binary.ABI_VERSION - 1, cuda_binary.ABI_VERSION + 1])
def test_a_binary_of_another_interface_is_stale(binary, version):
    binary.abi_version = version
    _, reason = cuda_binary.load()
    assert f"stale (interface {version}, this version needs {cuda_binary.ABI_VERSION})" in reason
    assert "pip install" in reason


def test_the_binarys_architecture_is_not_asked_without_a_device(binary, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    binary.device_problem = lambda index: pytest.fail("a context was started")
    assert cuda_binary.load()[1] == "torch sees no CUDA device"


@pytest.mark.parametrize(
    "file, said",
    [
        (None, "is not available (No module named 'codmd._C_cuda')"),
        ("_C_cuda.cpython-39-x86_64-linux-gnu.so", "another Python or platform (_C_cuda.cpython-39-x86_64-linux-gnu"),
        ("_C_cuda.cp39-win_amd64.pyd", "another Python or platform (_C_cuda.cp39-win_amd64.pyd; this Python loads"),
        (f"_C_cuda{EXTENSION_SUFFIXES[0]}", "another machine or Python and does not load"),
    ],
    ids=["missing", "other Python", "other system", "other machine"],
)
def test_what_lies_in_the_package_tells_a_missing_binary_from_a_foreign_one(file, said, tmp_path):
    (tmp_path / "_C.so").touch()
    if file:
        (tmp_path / file).touch()
    error = ModuleNotFoundError("No module named 'codmd._C_cuda'")
    reason = cuda_binary._import_problem(error, tmp_path)
    assert said in reason
    assert "CODMD_FORCE_CUDA=1" in reason


def test_the_reason_is_logged_when_auto_passes_the_extension_over(fresh_choice, monkeypatch, caplog):
    monkeypatch.setattr(cuda, "load_error", "built for another architecture")
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: (None, "no Triton") if name == "triton" else load(name))
    with caplog.at_level(logging.INFO, logger="codmd"):
        assert backends._resolve("auto", torch.device("cuda"), torch.float32) is not cuda
    said = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert "codmd: backend cuda is not used for cuda tensors: built for another architecture" in said


def test_asking_for_it_by_name_raises_with_the_reason(fresh_choice, monkeypatch):
    monkeypatch.setattr(cuda, "load_error", "built for another architecture")
    with pytest.raises(ValueError, match=r"backend='cuda' cannot be used here: built for another architecture.*doctor"):
        backends._resolve("cuda", torch.device("cuda"), torch.float32)


def test_doctor_reports_a_file_that_is_no_binary_and_what_to_do(tmp_path):
    shutil.copytree(ROOT / "codmd", tmp_path / "codmd", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    (tmp_path / f"codmd/_C_cuda{EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF of another machine")
    done = subprocess.run(
        [sys.executable, "-m", "codmd", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "CUDA extension, NVIDIA GPUs" in line]
    assert "not usable: the CUDA extension was built for another machine or Python and does not load" in line
    assert "run `pip install` again with nvcc at hand (CUDA_HOME or PATH) and CODMD_FORCE_CUDA=1" in line
