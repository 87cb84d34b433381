"""A run's own files, damaged: its log keeps what is valid, a checkpoint whose mark is inconsistent is skipped."""

from __future__ import annotations

import json

import pytest
import torch
from train_cases import ALONE, QUIET, RECORD, TOY, curve, train

from codmd.distill.run.checkpoint import CheckpointStore, is_sound, read_student
from codmd.distill.run.integrity import CheckpointError, read_meta
from codmd.distill.run.log import read_log

GARBAGE = {
    "a lone byte": b"\xff\xfe",
    "half a line": b'{"update": 3, "loss": 0.',
    "a list": b"[]",
    "a number": b"5",
    "no update": b"{}",
    "null": b'{"update": null}',
    "text": b'{"update": "3"}',
    "true": b'{"update": true}',
    "negative": b'{"update": -1}',
    "deep": b"[" * 100_000,
}


@pytest.fixture
def run(tmp_path):
    train(*TOY, QUIET, f"out={tmp_path / 'run'}", "updates=4", "checkpoint.every=2", "checkpoint.keep_last=2")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_line_that_is_no_entry_is_named_and_the_others_stay(run, capsys, kind):
    expected = curve(run)
    first, second, *rest = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes(first + GARBAGE[kind] + b"\n" + second + b"".join(rest))
    capsys.readouterr()
    train(*TOY, QUIET, f"out={run}", "updates=5")
    assert "log.jsonl: 1 lines are no entries of a log and are left out: 2" in capsys.readouterr().err
    assert curve(run)[:4] == expected
    assert len(curve(run)) == 5
    assert all(json.loads(line)["update"] for line in (run / "log.jsonl").read_bytes().splitlines())


def test_what_a_killed_process_left_of_the_last_line_is_dropped_without_a_word(run, capsys):
    whole = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(whole + b'{"update": 5, "lo')
    capsys.readouterr()
    assert len(read_log(run / "log.jsonl", pytest.fail)) == len(whole.splitlines())
    train(*TOY, QUIET, f"out={run}", "updates=5")
    assert "no entries" not in capsys.readouterr().err


def with_values(**changes):
    return lambda meta: {**meta, **changes}


def without(name):
    return lambda meta: {key: value for key, value in meta.items() if key != name}


WRONG_MARKS = {
    "of another folder": (with_values(step=3), "step: got 3; expected 4"),
    "huge": (with_values(step=10**30), "step: got 1000000000000000000000000000000"),
    "true": (with_values(step=True), "step: got True; expected an integer"),
    "text": (with_values(step="4"), "step: got '4'; expected an integer"),
    "no files": (with_values(files={}), "files: got none"),
    "a list of files": (with_values(files=[]), "files: got []; expected a section"),
    "a file elsewhere": (with_values(files={"../x": [1, 2]}), "files: got '../x'"),
    "a file without a sum": (with_values(files={"x": [1]}), "files: got 'x': [1]"),
    "no mode": (without("mode"), "mode: not given"),
    "no processes": (without("processes"), "processes: not given"),
    "no configuration": (without("config"), "config: not given"),
    "no counts": (without("nonfinite"), "nonfinite: not given"),
    "another mode": (with_values(mode="sample"), "mode: got 'sample'; expected one of distill, teacher"),
    "no process": (with_values(processes=0), "processes: got 0"),
    "a position before the data": (with_values(position=-1), "position: got -1"),
    "counts that are none": (with_values(nonfinite={"student": [0]}), "nonfinite.student: got [0]"),
    "a tensor of no dtype": (with_values(tensors={"x": ["load", [1]]}), "tensors: got 'x'"),
    "a tensor of no shape": (with_values(tensors={"x": ["float32", [-1]]}), "tensors: got 'x'"),
    "an unknown key": (with_values(extra=1), "extra: unknown"),
    "a list": (lambda meta: [], "got []; expected a section"),
    "a number": (lambda meta: 5, "got 5; expected a section"),
}


@pytest.mark.parametrize("kind", WRONG_MARKS)
def test_a_checkpoint_with_an_inconsistent_mark_is_named_and_skipped(run, capsys, kind):
    change, message = WRONG_MARKS[kind]
    newest = run / "checkpoints" / "step_00000004"
    mark = newest / "meta.json"
    mark.write_text(json.dumps(change(json.loads(mark.read_text()))))
    with pytest.raises(CheckpointError) as error:
        read_meta(newest)
    assert message in str(error.value)
    assert str(newest) in str(error.value)
    capsys.readouterr()
    train(*TOY, QUIET, f"out={run}", "updates=5")
    printed = capsys.readouterr().err
    assert f"checkpoint {newest} is damaged and will be skipped" in printed
    assert f"continuing from {run / 'checkpoints' / 'step_00000002'}" in printed


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"", b"{"])
def test_a_mark_that_is_not_json_is_named(run, content):
    mark = run / "checkpoints" / "step_00000004" / "meta.json"
    mark.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000004 is not a complete checkpoint: meta.json is damaged"):
        read_meta(mark.parent)


def test_a_file_that_the_mark_does_not_list_is_no_part_of_a_checkpoint(run):
    newest = run / "checkpoints" / "step_00000004"
    (newest / "shard-00009.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shard-00009.safetensors: is not listed in meta.json"):
        read_student(newest)


def among_nonfinite(in_a_row):
    return {**RECORD, "nonfinite": {"student": [in_a_row, in_a_row], "critic": [0, 0]}}


def test_the_last_checkpoint_before_a_streak_stays_until_the_streak_is_over(tmp_path):
    store = CheckpointStore(tmp_path, ALONE, 2, pytest.fail)
    for step, in_a_row in enumerate([0, 0, 1, 2, 3, 4], start=1):
        store.save(step, {"student.w": torch.zeros(1)}, among_nonfinite(in_a_row))
    assert [path.name[-1] for path in store.paths()] == ["6", "5", "2"]
    assert store.sound() == tmp_path / "step_00000002"
    assert not is_sound(store.newest())
    for step in (7, 8):
        store.save(step, {"student.w": torch.zeros(1)}, among_nonfinite(0))
    assert [path.name[-1] for path in store.paths()] == ["8", "7"]


def test_a_run_that_ends_or_resumes_in_a_streak_offers_the_checkpoint_before_it(tmp_path, capsys):
    run = tmp_path / "run"
    common = [*TOY, QUIET, f"out={run}", "checkpoint.every=1", "checkpoint.keep_last=1"]
    diverging = ["distill.critic_lr=1e30", "distill.student_lr=1e30", "updates=40"]
    train(*common, "updates=2")
    train(*common, *diverging, "distill.max_nonfinite=9", status=1)
    sound = CheckpointStore(run / "checkpoints", ALONE, 1, pytest.fail).sound()
    offer = f"{sound} is from before them: resume={sound} out=ANOTHER_FOLDER"
    assert offer in capsys.readouterr().err
    train(*common, *diverging, "distill.max_nonfinite=9", status=1)
    assert f"saved among updates that were not finite; {offer}" in capsys.readouterr().err
    train(*TOY, QUIET, f"resume={sound}", f"out={tmp_path / 'again'}", f"updates={read_meta(sound)['step'] + 1}")
