"""What an installation holds, and that the package imports and computes with parts of it missing."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def source_copy(folder: Path) -> Path:
    """The tracked part of the tree, so that a build leaves nothing behind in it."""
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("codmd", "kernels", "csrc", "src"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def build(folder: Path, *kinds: str) -> Path:
    """What a build of ``folder`` gives, each of ``kinds`` in a file of its own: a folder."""
    made = run(
        sys.executable, "-c",
        "import sys; from setuptools import build_meta as b; [getattr(b, f'build_{k}')('out') for k in sys.argv[1:]]",
        *kinds, cwd=folder, CODMD_SKIP_EXT="1", PYTHONDONTWRITEBYTECODE="",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "warning" not in (made.stdout + made.stderr).lower()
    return folder / "out"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return source_copy(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def built(source) -> Path:
    return build(source, "wheel", "sdist")


@pytest.fixture(scope="module")
def wheel(built) -> list[str]:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_installs_codmd_alone(wheel):
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"codmd"}


def test_the_wheel_holds_kernels_types_and_licence(wheel):
    assert "codmd/kernels/__init__.py" in wheel
    assert "codmd/reference/relation.py" in wheel
    assert {"codmd/py.typed", "codmd/fastest.json"} <= set(wheel)
    assert {"codmd/configs/toy.yaml", "codmd/models/wan/configs/wan_tiny.json", "codmd/compare/page.html"} <= set(wheel)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_every_python_file_of_the_package_is_in_the_wheel(wheel):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "codmd").rglob("*.py")}
    expected |= {f"codmd/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert expected <= set(wheel)


def test_the_source_archive_builds_the_same_wheel_and_holds_no_links(wheel, built, tmp_path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    (again,) = build(source, "wheel").glob("*.whl")
    with zipfile.ZipFile(again) as archive:
        assert set(archive.namelist()) == set(wheel)


def test_a_tree_whose_links_became_text_builds_the_same_wheel(wheel, tmp_path):
    folder = source_copy(tmp_path)
    for link in ("src/codmd", "codmd/kernels"):
        target = os.readlink(folder / link)
        (folder / link).unlink()
        (folder / link).write_text(target)
    (again,) = build(folder, "wheel").glob("*.whl")
    with zipfile.ZipFile(again) as archive:
        assert set(archive.namelist()) == set(wheel)


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory) -> Path:
    """The Python of an environment that holds an editable install and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (path,) = build(source, "editable").glob("*editable*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    return folder / "bin" / "python"


def test_an_editable_install_is_one_path_that_exposes_codmd_alone(editable, source):
    (path,) = editable.parents[1].glob("lib/python*/site-packages/__editable__*")
    assert path.suffix == ".pth"
    folder = Path(path.read_text().strip())
    assert folder == source / "src"
    assert {entry.name for entry in folder.iterdir() if not entry.name.endswith(".egg-info")} == {"codmd"}


@pytest.mark.parametrize("place", ["elsewhere", "beside a folder called codmd"])
def test_an_editable_install_imports_the_tree_from(place, editable, source, tmp_path):
    if place != "elsewhere":
        (tmp_path / "codmd" / "docs").mkdir(parents=True)
    script = "import codmd, codmd.kernels; print(codmd.__file__); print(codmd.kernels.__file__)"
    done = run(str(editable), "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [Path(line).resolve() for line in done.stdout.splitlines()]
    assert found == [source / "codmd/__init__.py", source / "kernels/__init__.py"]


USER_FILE = """
import codmd
from codmd.conventions import replace
from codmd.kernels.limits import MOST_POOLED
from torch import Tensor

def step(student: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    codmd.ops.relation_loss(student, real, fake).backward()
    codmd.ops.dmd_loss(student, real=real, fake=fake, convention=codmd.conventions.rcm).backward()
    terms = codmd.ops.codmd_loss(student, real=real, fake=fake, return_terms=True)
    terms.total.backward()
    codmd.ops.relation_loss(student, real, fake, return_terms=True).total.backward()
    loss, log = codmd.compat.compute_copula_aware_loss(student, real, fake)
    distance: float = codmd.metrics.speed_distance(student, real)
    print(MOST_POOLED, replace, log["copula_batch_loss"].item(), distance)
    return loss
"""
TORCH = """
from typing import Any
class Tensor:
    def backward(self) -> None: ...
    def item(self) -> float: ...
def __getattr__(name: str) -> Any: ...
"""


def test_a_type_checker_sees_the_editable_install(editable, tmp_path):
    """torch is a stub here: mypy takes a minute to read all of it."""
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "torch.pyi").write_text(TORCH)
    (tmp_path / "user.py").write_text(USER_FILE)
    wrong = USER_FILE.replace("fake).backward()", "fake).total.backward()").replace("terms.total.", "terms.")
    (tmp_path / "wrong.py").write_text(wrong)
    done = run(
        sys.executable, "-m", "mypy", "--strict", "--no-incremental", f"--python-executable={editable}",
        "user.py", "wrong.py", cwd=tmp_path, MYPYPATH="stubs",
    )  # fmt: skip
    assert "user.py" not in done.stdout + done.stderr
    assert '"Tensor" has no attribute "total"' in done.stdout
    assert '"CodmdTerms" has no attribute "backward"' in done.stdout


def test_a_failing_compiler_warns_and_leaves_a_working_build(tmp_path):
    folder = source_copy(tmp_path)
    built = run(
        sys.executable,
        "setup.py",
        "build",
        "--build-lib",
        "lib",
        cwd=folder,
        CC="false",
        CXX="false",
        CODMD_SKIP_CUDA="1",
    )
    assert built.returncode == 0, built.stderr
    assert "codmd._C" in built.stdout + built.stderr
    assert (folder / "lib/codmd/__init__.py").exists()
    assert not list((folder / "lib/codmd").glob("_C*"))


def test_the_build_never_imports_torch():
    text = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "torch" not in text.replace("without torch", "").replace("never imports torch", "")


BLOCKED_IMPORT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r} or name in {blocked!r}:
            raise ImportError(f"{{name}} is blocked in this test")
sys.meta_path.insert(0, Block())
import torch, codmd
from codmd import backends
torch.manual_seed(0)
student, real, fake = torch.randn(3, 2, 3, 4, 5, 6)
loss = codmd.ops.relation_loss(student.requires_grad_(), real, fake)
loss.backward()
assert loss > 0 and student.grad.abs().max() > 0
print(backends.select("auto", student).__name__)
print(backends.describe())
"""


@pytest.mark.parametrize(
    "blocked, module, reason",
    [
        (["triton"], None, "triton is blocked"),
        (["codmd._C"], "codmd.ops.backends.reference", "codmd._C is blocked"),
        (
            ["triton", "codmd._C", "diffusers", "matplotlib", "tqdm", "safetensors"],
            "codmd.ops.backends.reference",
            "blocked",
        ),
    ],
)
def test_a_fresh_process_works_without(blocked, module, reason, tmp_path):
    done = run(sys.executable, "-c", BLOCKED_IMPORT.format(blocked=blocked), cwd=tmp_path, CODMD_BACKEND="auto")
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout
    if module:
        assert done.stdout.splitlines()[0] == module


def test_a_stale_binary_is_a_reason_and_no_crash(tmp_path):
    script = """
import sys, types
stale = types.ModuleType("codmd._C")
sys.modules["codmd._C"] = stale
import torch
from codmd import backends, ops
assert backends.load("cpp")[0] is None
print(backends.load("cpp")[1])
x = torch.randn(3, 2, 3, 4, 5, 6)
assert ops.relation_loss(*x) > 0
"""
    done = run(sys.executable, "-c", script, cwd=tmp_path, CODMD_BACKEND="auto")
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout


def test_importing_codmd_needs_no_gpu_and_starts_no_cuda(tmp_path):
    script = "import torch, codmd, codmd.kernels; assert not torch.cuda.is_initialized()"
    done = run(sys.executable, "-c", script, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
