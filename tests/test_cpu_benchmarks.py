"""`pytest benchmarks`: speed-ups as a table and a picture, and none of a case that fails its accuracy gate."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from codmd.ops.backends import cpp

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(bool(cpp.load_error), reason=str(cpp.load_error))


def run(tmp_path, *options, path=os.environ["PATH"]):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "--threads", "1"]
    done = subprocess.run(
        [*command, "-k", "relation_loss and float32", "-rs", "--speed-plot", str(tmp_path / "speed.png"), *options],
        cwd=ROOT,
        env={"PATH": path, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, tmp_path / "speed.png"


@pytest.mark.parametrize("path", [os.environ["PATH"], ""], ids=["compiler", "no compiler"])
def test_pytest_benchmarks_prints_and_draws_the_speed_ups(tmp_path, path):
    done, picture = run(tmp_path, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    rivals = r"[\d.]+x compiled, " * bool(path) + r"[\d.]+x eager, [\d.]+x lean"
    assert re.search(rf"relation_loss, wan-480p, float32 +[\d.]+ ms +{rivals}", done.stdout)
    assert ("needs a C++ compiler" in done.stdout) == (not path)
    assert Image.open(picture).width > 600


def test_a_case_that_fails_its_gate_has_no_time(tmp_path):
    (tmp_path / "wrong_by_a_tenth.py").write_text(
        "from benchmarks import relation_cpu\n"
        "right = relation_cpu.codmd_loss\n"
        "relation_cpu.codmd_loss = relation_cpu.LOSSES['codmd'] = lambda *a, **k: 1.1 * right(*a, **k)\n"
    )
    done, picture = run(tmp_path, "-p", "wrong_by_a_tenth")
    assert done.returncode == 1
    assert "accuracy gate failed" in done.stdout
    assert not re.search(r"\d ms", done.stdout)
    assert not picture.exists()
