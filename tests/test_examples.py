"""The README's snippet and everything in examples/ run as printed."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from codmd import cli

ROOT = Path(__file__).parents[1]


def test_the_snippet_of_the_readme_runs_as_printed():
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    scope: dict = {}
    exec(snippet, scope)
    assert scope["loss"] > 0
    assert scope["student"].grad.abs().max() > 0


def test_the_losses_add_up(capsys):
    terms = runpy.run_path(str(ROOT / "examples/losses.py"), run_name="__main__")["terms"]
    torch.testing.assert_close(terms.total, terms.dmd + 0.1 * (terms.batch + terms.frame))
    assert "frame relations" in capsys.readouterr().out


def test_the_training_loop_brings_the_student_nearer_to_the_data():
    before, after = runpy.run_path(str(ROOT / "examples/training_loop.py"))["distil"](updates=60)
    assert after < 0.7 * before


def test_mean_flow_learns_to_sample_in_one_step():
    before, after = runpy.run_path(str(ROOT / "examples/mean_flow.py"))["train"](updates=60)
    assert after < 0.85 * before


def test_distillation_from_python_brings_the_student_nearer_to_the_data(capsys):
    before, after = runpy.run_path(str(ROOT / "examples/distil_from_python.py"))["distil"](updates=100)
    assert after < 0.95 * before
    assert [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == [50, 100]


def test_the_notebook_runs_and_its_step_lowers_the_loss(capsys):
    """Its cells in one process; Jupyter itself is no dependency."""
    plt.switch_backend("Agg")
    cells = json.loads((ROOT / "examples/relations.ipynb").read_text("utf-8"))["cells"]
    scope: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    assert len(plt.get_fignums()) == 2
    plt.close("all")
    torch.testing.assert_close(scope["loss"], scope["by_hand"], rtol=1e-4, atol=1e-6)
    assert scope["distance"] < 0.9 * scope["loss"]


def test_the_step_of_self_forcing_trains_the_student():
    losses = runpy.run_path(str(ROOT / "examples/self_forcing_style.py"))["train"](cycles=2)
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)


def test_every_command_of_a_real_run_works_on_the_miniature(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_tiny.py", "wan-tiny"])
    runpy.run_path(str(ROOT / "examples/wan_tiny.py"), run_name="__main__")
    commands = re.findall(
        r"^codmd (.*wan-tiny.*)$", (ROOT / "docs/first_video.md").read_text("utf-8").replace("\\\n", ""), re.MULTILINE
    )
    assert [command.split()[0] for command in commands] == ["encode", "train", "sample", "convert"]
    for command in commands:
        assert cli.main([*command.split(), *(["updates=1"] if command.startswith("train") else [])]) == 0
    assert len(list(Path("videos/videos").glob("*.mp4"))) == 3
    assert (Path("student") / "README.md").is_file()
