"""`codmd train` from outside: crash and go on, resume, and the errors that a user meets."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time

import pytest
import torch
from fresh import Command
from train_cases import ALONE, QUIET, TOY, curve, train

from codmd.distill.run.checkpoint import read_student
from codmd.distill.run.integrity import read_meta
from codmd.distill.run.lock import only_run
from codmd.distill.run.log import read_log
from codmd.models.wan.network import WanDenoiser


def start(folder, *arguments):
    """The command as a process of its own; what it prints goes to a file beside its run's `folder`."""
    return Command(folder.with_name(f"{folder.name}.txt"), "train", f"out={folder}", *arguments)


def finish(process, status=0):
    """Waits for its end and returns what it printed."""
    assert process.finish() == status, process.text()[-4000:]
    return process.text()


def wait_for(condition, process):
    while not condition():
        assert process.status is None, process.text()
        time.sleep(0.0005)


def logged(folder):
    path = folder / "log.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def partial(folder):
    return list((folder / "checkpoints").glob(".*.partial"))


# Crash and go on


def test_a_run_killed_in_training_and_in_a_save_and_terminated_has_the_curve_of_an_undisturbed_one(tmp_path):
    common = [*TOY, QUIET, "distill.ema_decay=0.9", "distill.grad_clip=0.5", "seed=5"]
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    updates = 3000
    slow = [run, *common, f"updates={updates}"]

    process = start(*slow, "checkpoint.every=4")
    wait_for(lambda: logged(run) > 10, process)
    os.kill(process.pid, signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    killed_at = len(curve(run))

    for _ in range(20):
        process = start(*slow, "checkpoint.every=1")
        wait_for(lambda: partial(run), process)
        os.kill(process.pid, signal.SIGKILL)
        finish(process, -signal.SIGKILL)
        if partial(run):  # or the save was faster than the signal
            break
    else:
        pytest.fail("no save was caught in twenty runs")

    process = start(*slow, "checkpoint.every=1000")
    before = logged(run)
    wait_for(lambda: logged(run) > before + 3, process)
    os.kill(process.pid, signal.SIGTERM)
    assert "continuing from" in finish(process, 143)
    assert not partial(run)
    stopped_at = len(curve(run))
    assert stopped_at > killed_at - 4
    assert read_student(run)

    last = stopped_at + 5
    printed = finish(start(run, *common, f"updates={last}", "checkpoint.every=1000"))
    assert f"updates: {updates} -> {last}" in printed
    finish(start(undisturbed, *common, f"updates={last}", "checkpoint.every=1000"))
    assert [line["update"] for line in curve(run)] == list(range(1, last + 1))
    assert curve(run) == curve(undisturbed)
    for ema in (False, True):
        ours, theirs = read_student(run, ema), read_student(undisturbed, ema)
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_continues(tmp_path, capsys):
    out = f"out={tmp_path / 'run'}"
    train(*TOY, QUIET, out, "updates=6", "checkpoint.every=2")
    expected = curve(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    train(*TOY, QUIET, out, "updates=6", "checkpoint.every=2")
    printed = capsys.readouterr().err
    assert "step_00000006 is damaged and will be skipped" in printed
    assert "continuing from" in printed
    assert "step_00000004" in printed
    assert curve(tmp_path / "run") == expected
    assert read_student(newest)


def test_a_full_disk_ends_the_run_with_a_clear_error_and_the_previous_checkpoint_goes_on(tmp_path, capsys):
    run = tmp_path / "run"
    train(*TOY, QUIET, f"out={run}", "updates=2")
    size = max(file.stat().st_size for file in (run / "checkpoints" / "step_00000002").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))  # the system refuses to write more
    try:
        train(*TOY, QUIET, f"out={run}", "updates=4", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large; the newest one there, step_00000002, is untouched" in capsys.readouterr().err
    train(*TOY, QUIET, f"out={run}", "updates=4")
    assert [line["update"] for line in curve(run)] == [1, 2, 3, 4]


def test_a_run_that_diverges_ends_with_advice_and_an_intact_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    common = [*TOY, QUIET, f"out={run}", "checkpoint.every=1", "distill.max_nonfinite=3"]
    train(*common, "updates=2")
    train(*common, "updates=20", "distill.critic_lr=1e30", "distill.student_lr=1e30", status=1)
    assert "in a row were not finite" in capsys.readouterr().err
    skipped = [line for line in read_log(run / "log.jsonl") if isinstance(line.get("skipped"), dict)]
    assert skipped
    meta = read_meta(max((run / "checkpoints").iterdir()))
    assert all(torch.isfinite(weight).all() for weight in read_student(run / "checkpoints").values())
    assert sum(count for count, _ in meta["nonfinite"].values()) <= sum(skipped[-1]["skipped"].values())


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path, capsys):
    with only_run(tmp_path, ALONE):
        train(*TOY, QUIET, f"out={tmp_path}", "updates=1", status=1)
        assert f"another run is training in {tmp_path}" in capsys.readouterr().err
    train(*TOY, QUIET, f"out={tmp_path}", "updates=1")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    train(*TOY, QUIET, f"out={tmp_path / 'file' / 'run'}", "updates=1", status=1)
    assert "cannot be used: Not a directory" in capsys.readouterr().err


# Resuming


def test_resume_none_refuses_a_folder_with_checkpoints(tmp_path, capsys):
    train(*TOY, QUIET, f"out={tmp_path}", "updates=1", "resume=none")
    train(*TOY, QUIET, f"out={tmp_path}", "updates=2", "resume=none", status=1)
    assert "resume: " in capsys.readouterr().err


def test_resume_takes_a_checkpoint_of_another_run(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    train(*TOY, QUIET, f"out={first}", "updates=4", "checkpoint.every=2")
    train(*TOY, QUIET, f"out={second}", "updates=4", f"resume={first / 'checkpoints' / 'step_00000002'}")
    assert curve(second) == curve(first)[2:]
    train(*TOY, QUIET, f"out={second}", "updates=4", f"resume={first}", status=1)
    assert "has checkpoints of its own" in capsys.readouterr().err
    train(*TOY, QUIET, f"out={first}", f"resume={first / 'checkpoints' / 'step_00000002'}", status=1)
    assert "has checkpoints of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["resume=nowhere"], "nowhere is not a complete checkpoint"),
        (["model.width=8"], "the model here has"),
        (
            ["distill.ema_decay=0.9"],
            "has no running average, for it was saved without ema_decay; set",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, capsys, changes, message):
    if "resume=nowhere" not in changes:
        train(*TOY, QUIET, f"out={tmp_path}", "updates=1")
    train(*TOY, QUIET, f"out={tmp_path}", "updates=2", *changes, status=1)
    assert message in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(tmp_path):
    train(*TOY, QUIET, f"out={tmp_path}", "updates=2")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train(*TOY, QUIET, f"out={tmp_path}", "updates=2")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# Two commands: a teacher on real pixels, then its student


@pytest.fixture
def network(tmp_path):
    """A Wan smaller than the packaged one."""
    config = {
        "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2,
        "attention_head_dim": 12, "in_channels": 12, "out_channels": 12, "text_dim": 16, "freq_dim": 16,
        "ffn_dim": 32, "num_layers": 1, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
        "rope_max_seq_len": 64,
    }  # fmt: skip
    path = tmp_path / "network.json"
    path.write_text(json.dumps(config))
    return path


def test_two_commands_train_a_teacher_on_real_pixels_and_distil_it(tmp_path, network):
    run = tmp_path / "run"
    common = ["textures_tiny", f"out={run}", f"model.config={network}", "model.height=4", "model.width=4", QUIET,
              "model.frames=4", "log.preview_every=4", "log.preview_samples=2", "log.every=1"]  # fmt: skip
    teacher = [*common, "mode=teacher", "teacher.batch_size=4"]
    train(*teacher, "teacher.updates=2")
    train(*teacher, "teacher.updates=4")  # continues, and exports again
    assert [line["update"] for line in curve(run / "teacher")] == [1, 2, 3, 4]
    assert read_meta(run / "teacher" / "checkpoints" / "step_00000004")["position"] == 16
    exported = WanDenoiser.load(run / "teacher" / "model", config=str(network)).state_dict()
    average = read_student(run / "teacher", ema=True)
    assert all(torch.equal(exported[name], weight) for name, weight in average.items())

    train(
        *common, "updates=4", "distill.batch_size=4", "distill.critic_updates=1", "log.preview_prompts=[chelsea pan up]"
    )
    assert (run / "previews" / "step_00000004.mp4").exists()
    assert read_meta(run / "checkpoints" / "step_00000004")["position"] == 4 * 4
    started = read_student(run)
    assert any(not torch.equal(started[name], weight) for name, weight in exported.items())


def test_a_plan_needs_no_files(capsys):
    train("--plan", "wan_1.3b", "model.config=tiny", "model.height=8", "model.width=8", "lora.rank=4")
    assert "GB" in capsys.readouterr().out


def test_a_missing_package_names_the_extra_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "codmd.distill.run.training", None)
    train(*TOY, status=1)
    assert "[train]" in capsys.readouterr().err
