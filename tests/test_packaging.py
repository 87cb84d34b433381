"""What an installation holds, and that the package imports and computes with parts of it missing."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def source_copy(folder: Path) -> Path:
    """The tracked part of the tree, so that a build leaves nothing behind in it."""
    for name in ("codmd", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    folder = source_copy(tmp_path_factory.mktemp("source"))
    built = run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "out",
        cwd=folder, CODMD_SKIP_EXT="1",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "out").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_installs_codmd_alone(wheel):
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"codmd"}


def test_the_wheel_holds_kernels_types_and_licence(wheel):
    assert "codmd/kernels/__init__.py" in wheel
    assert "codmd/reference/relation.py" in wheel
    assert "codmd/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_every_python_file_of_the_package_is_in_the_wheel(wheel):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "codmd").rglob("*.py")}
    expected |= {f"codmd/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert expected <= set(wheel)


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
