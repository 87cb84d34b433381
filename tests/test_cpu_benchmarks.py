"""`pytest benchmarks`: speed-ups as a table and a picture, and none of a case that fails its accuracy gate."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import relation_cpu
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


@pytest.mark.parametrize(
    "path", [pytest.param(os.environ["PATH"], marks=pytest.mark.every), ""], ids=["compiler", "no compiler"]
)
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


def test_sides_take_turns_and_the_least_time_counts_but_for_the_first_of_a_block(monkeypatch):
    turns = []

    def step(loss, *inputs):
        turns.append(loss)
        return (0.001, 0.009, 0.004, 0.005)[(len(turns) - 1) % 4]

    monkeypatch.setattr(relation_cpu, "step", step)
    monkeypatch.setattr(relation_cpu, "floor_step", lambda *inputs: step("floor"))
    monkeypatch.setattr(relation_cpu, "LOSSES", {"compiled": "compiled", "codmd": "codmd"})
    found = relation_cpu.least((torch.ones(2), torch.ones(2), torch.ones(2)), "mean", 2)
    assert found == {"compiled": 4.0, "codmd": 4.0, "floor": 4.0}
    assert turns == [side for side in ("compiled", "codmd", "floor") for _ in range(4)] * 2


def test_the_floor_reads_three_latents_and_writes_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    relation_cpu._floor.cache_clear()
    student, real, fake = (torch.full((3,), float(value), requires_grad=value == 1) for value in (1, 2, 4))
    out = torch.zeros(3)
    assert relation_cpu.floor_step(student, real, fake, out) > 0
    assert out.tolist() == [7, 7, 7]
    relation_cpu._floor.cache_clear()


def test_the_committed_figures_have_the_floor_and_are_those_of_the_readme():
    report = json.loads((ROOT / "benchmarks/results/cpu/relation_cpu_floor.json").read_text())
    assert next(iter(relation_cpu.LOSSES)) == "compiled"
    readme = " ".join((ROOT / "README.md").read_text().split())
    for case in report["cases"]:
        assert case["most_speed_up"] == pytest.approx(case["compiled_ms"] / case["floor_ms"])
        ratio, most = case["compiled_ms"] / case["codmd_ms"], case["most_speed_up"]
        assert f"| {case['dtype']} | {ratio:.1f} × | {most:.1f} × |" in readme
