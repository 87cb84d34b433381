"""How the build finds nvcc, chooses architectures, compiles in parallel, warns or fails; no compiler needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_toolkit import ROOT, pretend_toolkit

from benchmarks.nvcc import load_nvcc

nvcc = load_nvcc()


def toolkit(*known: int):
    return nvcc.Toolkit("nvcc", known, "lib")


def test_the_default_architectures_are_those_that_nvcc_knows(monkeypatch):
    monkeypatch.delenv("CODMD_CUDA_ARCHS", raising=False)
    assert nvcc.architectures(toolkit(75, 80, 86, 89, 90)) == [80, 86, 89, 90]


def test_an_nvcc_older_than_every_default_architecture_is_refused(monkeypatch):
    monkeypatch.delenv("CODMD_CUDA_ARCHS", raising=False)
    with pytest.raises(nvcc.Unavailable, match=r"80, 86, 89, 90, 100, 120 can be built: nvcc knows 60, 75"):
        nvcc.architectures(toolkit(60, 75))


@pytest.mark.parametrize("wanted", ["90;80", "9.0,8.0", "sm_80 sm_90 ", "80,8.0;sm_90"])
def test_architectures_can_be_named_in_the_usual_ways(wanted, monkeypatch):
    monkeypatch.setenv("CODMD_CUDA_ARCHS", wanted)
    assert nvcc.architectures(toolkit(80, 90)) == [80, 90]


@pytest.mark.parametrize(
    "wanted, refused",
    [
        ("80;70", "70 cannot be built"),
        ("90a 8", "90a, 8 cannot be built"),
        ("8.0+PTX", "8.0+PTX cannot be built"),
        ("native", "native cannot be built"),
        ("compute_80", "compute_80 cannot be built"),
        (" ; ,", "it names no architecture"),
    ],
)
def test_architectures_that_make_no_sense_are_refused_with_those_that_exist(wanted, refused, monkeypatch):
    monkeypatch.setenv("CODMD_CUDA_ARCHS", wanted)
    with pytest.raises(nvcc.Unavailable) as error:
        nvcc.architectures(toolkit(80, 90))
    assert str(error.value) == (
        f'CODMD_CUDA_ARCHS={wanted.strip()!r}: {refused}. Write "80;90" or "8.0,9.0"; nvcc knows 80, 90'
    )


@pytest.mark.parametrize("wanted", ["0", "-2", "two", "1.5"])
def test_a_number_of_jobs_that_is_none_is_refused(wanted, monkeypatch):
    monkeypatch.setenv("CODMD_BUILD_JOBS", wanted)
    with pytest.raises(ValueError, match=f"CODMD_BUILD_JOBS='{wanted}' must be a positive integer"):
        nvcc.jobs()


# Every compile waits until all of them have started, or holds a lock that another would find taken.
TOGETHER = "touch started.$$; for i in $(seq 400); do [ $(ls started.* | wc -l) = 4 ] && exit; sleep 0.05; done; exit 1"
ALONE = "mkdir lock || exit 1; sleep 0.05; rmdir lock"


@pytest.mark.parametrize("jobs, step", [("4", TOGETHER), ("1", ALONE)], ids=["four", "one"])
def test_objects_compile_in_parallel_as_far_as_asked(jobs, step, tmp_path, monkeypatch):
    assert len(nvcc.SOURCES) == 4
    monkeypatch.setenv("CUDA_HOME", str(pretend_toolkit(tmp_path, step)))
    monkeypatch.setenv("CODMD_BUILD_JOBS", jobs)
    made = nvcc.compile_sources(nvcc.find_toolkit(), [80, 90], str(tmp_path / "objects"))
    assert [Path(name).name for name, _ in made] == [Path(source).stem + ".cu.o" for source in nvcc.SOURCES]
    compiles = [line for line in (tmp_path / "log").read_text().splitlines() if "csrc/cuda" in line]
    assert all("code=sm_80" in line and "code=sm_90" in line and "code=compute_90" in line for line in compiles)


def test_an_nvcc_that_fails_is_quoted(tmp_path, monkeypatch):
    folder = pretend_toolkit(tmp_path, "echo 'relation.cu(7): error'; exit 2")
    monkeypatch.setenv("CUDA_HOME", str(folder))
    found = nvcc.find_toolkit()
    with pytest.raises(nvcc.Unavailable, match=r"nvcc failed on csrc/cuda/dmd.cu:\nrelation.cu\(7\): error"):
        nvcc.compile_sources(found, [80], str(tmp_path / "objects"))
    (folder / "bin/nvcc").write_text("#!/bin/sh\necho 'nvcc fatal: no host compiler'; exit 1\n")
    with pytest.raises(nvcc.Unavailable, match="does not run: nvcc fatal: no host compiler"):
        nvcc.find_toolkit()


def test_a_toolkit_without_its_static_runtime_says_what_to_install(tmp_path, monkeypatch):
    folder = pretend_toolkit(tmp_path, "true")
    (folder / "lib64/libcudart_static.a").unlink()
    monkeypatch.setenv("CUDA_HOME", str(folder))
    with pytest.raises(nvcc.Unavailable, match=r"libcudart_static.a is not in .*lib64.*cudart development files"):
        nvcc.find_toolkit()


def build_in_place(folder: Path, gpu: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` of a copy of the tree, without a C++ compiler; with the driver's tools if ``gpu``."""
    tools = folder.parent / "tools"
    tools.mkdir()
    if gpu:
        (tools / "nvidia-smi").touch(0o755)
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    unset = dict.fromkeys(("CODMD_SKIP_EXT", "CODMD_SKIP_CUDA", "CODMD_CUDA_ARCHS"), "")
    place = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CC": "false", "CXX": "false"}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "lib"],
        cwd=folder,
        env={**os.environ, **unset, **place, **environment},
        capture_output=True,
        text=True,
    )


FAILS = "echo 'relation.cu(7): error'; exit 2"


@pytest.mark.parametrize(
    "environment, compile_step, reason",
    [
        ({"CUDA_HOME": "/nowhere"}, "true", "CUDA_HOME=/nowhere holds no bin/nvcc"),
        ({"CODMD_CUDA_ARCHS": "75"}, "true", "CODMD_CUDA_ARCHS='75': 75 cannot be built"),
        ({}, FAILS, "nvcc failed on csrc/cuda/dmd.cu:"),
    ],
    ids=["no nvcc", "unknown architecture", "broken source"],
)
@pytest.mark.parametrize("forced", [False, True], ids=["warns", "forced"])
def test_what_cannot_be_built_is_a_warning_unless_it_is_forced(forced, environment, compile_step, reason, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    home = str(pretend_toolkit(tmp_path / "cuda", compile_step))
    done = build_in_place(folder, **{"CUDA_HOME": home, "CODMD_FORCE_CUDA": "1" if forced else "0", **environment})
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == forced, output
    consequence = "cannot be built: " if forced else "installing without the CUDA extension: "
    assert consequence + reason in output
    assert "Traceback" not in output


@pytest.mark.parametrize("forced", [False, True], ids=["warns", "forced"])
def test_a_binding_that_does_not_compile_fails_a_forced_build(forced, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    home = str(pretend_toolkit(tmp_path / "cuda", "true"))
    done = build_in_place(folder, CUDA_HOME=home, CODMD_FORCE_CUDA="1" if forced else "0")
    assert (done.returncode != 0) == forced, done.stdout + done.stderr


def test_without_a_wish_nothing_is_said_of_cuda(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    done = build_in_place(folder, CUDA_HOME="/nowhere", CODMD_SKIP_CUDA="1")
    assert done.returncode == 0
    assert "CUDA" not in done.stdout + done.stderr


@pytest.mark.skipif(nvcc.has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("forced", [False, True], ids=["left out", "forced"])
def test_without_a_gpu_nvcc_is_not_asked_unless_it_is_forced(forced, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    home = pretend_toolkit(tmp_path / "cuda", "true")
    build_in_place(folder, gpu=False, CUDA_HOME=str(home), CODMD_FORCE_CUDA="1" if forced else "0")
    assert (home / "log").exists() == forced


@pytest.mark.parametrize("skip", ["CODMD_SKIP_EXT", "CODMD_SKIP_CUDA"])
def test_forcing_what_is_skipped_is_a_contradiction(skip, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    done = build_in_place(folder, CODMD_FORCE_CUDA="1", **{skip: "1"})
    assert done.returncode != 0
    assert f"CODMD_FORCE_CUDA=1 asks for the CUDA extension and {skip}=1 leaves it out: unset one" in done.stderr
