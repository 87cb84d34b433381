"""How a run ends: asked to by Ctrl-C, by itself, or again; and what it says then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from train_cases import QUIET, TOY, curve, train

from codmd.distill.run.stop import stop_requests
from codmd.models.toy import ToyConfig, ToyDenoiser

ENDLESS = "updates=1000000"


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "codmd", "train", *TOY, QUIET, "checkpoint.every=1000000", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_until_trained(process, run, updates=3):
    while not (run / "log.jsonl").exists() or len((run / "log.jsonl").read_bytes().splitlines()) < updates:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def test_ctrl_c_finishes_the_update_saves_and_says_where(tmp_path):
    run = tmp_path / "run"
    process = start(f"out={run}", ENDLESS)
    wait_until_trained(process, run)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.returncode == 130, printed
    (checkpoint,) = (run / "checkpoints").iterdir()
    made = len(curve(run))
    assert checkpoint.name == f"step_{made:08d}"
    assert f"stopped by SIGINT: {made} of 1000000 updates, {checkpoint}; the same command continues" in printed
    train(*TOY, QUIET, f"out={run}", f"updates={made + 1}")
    assert [line["update"] for line in curve(run)] == list(range(1, made + 2))


def test_a_second_ctrl_c_ends_at_once_and_sigterm_beside_it_does_not():
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes both on
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_from_before_are_back_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_says_what_it_made_and_what_comes_next_and_again_that_it_is_finished(tmp_path, capsys):
    ToyDenoiser(ToyConfig(4, 4, 16, 1)).save(tmp_path / "teacher.safetensors")
    run = tmp_path / "run"
    options = (*TOY, QUIET, f"out={run}", "updates=2", f"model.weights={tmp_path / 'teacher.safetensors'}")
    made = f"2 of 2 updates, {run / 'checkpoints' / 'step_00000002'}; next: codmd sample {run}"
    train(*options)
    printed = capsys.readouterr().err
    assert f"\nfinished: {made}" in printed
    assert "random" not in printed
    train(*options)
    assert f"\nfinished before, nothing to do: {made}" in capsys.readouterr().err


def test_a_run_from_random_weights_says_that_its_numbers_test_the_loop(tmp_path, capsys):
    train(*TOY, QUIET, f"out={tmp_path}", "updates=1")
    before, _, after = capsys.readouterr().err.partition("\r")
    assert "its teacher has random weights: the numbers test the loop and say nothing of a method\n" in before
    assert "nothing to see; a first video: codmd train textures_tiny mode=teacher" in after


def test_what_changed_is_said_above_the_bar(tmp_path, capsys):
    train(*TOY, QUIET, f"out={tmp_path}", "updates=2")
    capsys.readouterr()
    train(*TOY, QUIET, f"out={tmp_path}", "updates=3", "distill.student_lr=2e-4")
    notes, _, bar = capsys.readouterr().err.partition("\r")
    assert "changed since: distill.student_lr: 0.0001 -> 0.0002\n" in notes
    assert "changed since" not in bar
    assert "3/3" in bar


def test_updates_of_a_teacher_have_one_name(capsys):
    train("textures_tiny", "mode=teacher", "updates=30", "--dry-run", status=1)
    assert "updates: counts the student's; those of a teacher are teacher.updates" in capsys.readouterr().err
