"""Configuration files that are hostile or hold secrets: named, and nothing of the environment quoted."""

from __future__ import annotations

import pytest
from train_cases import QUIET, TOY, train

from codmd.distill.config.run_config import read_config
from codmd.distill.config.typed import ConfigError

SECRET = "hunter2-'quoted'-token"


@pytest.mark.parametrize(
    "content",
    [
        "a: " + "[" * 5_000 + "]" * 5_000,
        "a: " + "{b: " * 5_000 + "}" * 5_000,
        "\n".join(" " * depth + "a:" for depth in range(3_000)),
    ],
    ids=["lists", "sections", "indented"],
)
def test_deep_nesting_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "deep.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_config(str(path))
    assert str(path) in str(error.value)


def test_a_deep_override_is_an_error():
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_config("toy", [f"seed={'[' * 5_000}{']' * 5_000}"])


@pytest.mark.parametrize(
    "line",
    [
        "seed: ${oc.env:CODMD_TEST}",
        "resume: x\nmode: ${oc.env:CODMD_TEST}",
        "model: {name: '${oc.env:CODMD_TEST}'}",
        "${oc.env:CODMD_TEST}: 3",
        "seed: prefix ${oc.env:CODMD_TEST}",
        "data: {kind: none, path: '${oc.env: CODMD_TEST}'}",
    ],
)
def test_the_value_of_an_environment_variable_stays_out_of_messages(tmp_path, monkeypatch, line):
    monkeypatch.setenv("CODMD_TEST", SECRET)
    path = tmp_path / "run.yaml"
    path.write_text(f"out: {tmp_path}\n" + ("" if "model" in line else "model: {name: toy, weights: random}\n") + line)
    with pytest.raises(ConfigError) as error:
        read_config(str(path))
    assert "hunter2" not in str(error.value)
    assert error.value.__cause__ is None, "nor in what a traceback would show"


def test_nor_do_messages_of_the_run_itself_quote_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CODMD_TEST", SECRET)
    train(*TOY, QUIET, f"out={tmp_path}", "model.weights=${oc.env:CODMD_TEST}", status=1)
    printed = capsys.readouterr().err
    assert "model.weights: ${oc.env:CODMD_TEST} does not exist" in printed
    assert "hunter2" not in printed
