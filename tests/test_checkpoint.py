"""Checkpoints: complete or not there, damaged ones found, old ones removed last, read by any number of processes."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from train_cases import ALONE, RECORD

from codmd.distill.run import checkpoint as checkpoints
from codmd.distill.run.checkpoint import CheckpointStore, load, read_student, resolve
from codmd.distill.run.integrity import CheckpointError, read_meta


def tensors(value=1.0):
    return {
        "student.weight": torch.full((3, 2), value),
        "ema.weight": torch.full((3, 2), value + 10),
        "student_optimizer.weight.step": torch.tensor(value),
        "random.noise": torch.Generator().manual_seed(int(value)).get_state(),
    }


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def store(tmp_path, warnings):
    return CheckpointStore(tmp_path / "checkpoints", ALONE, 3, warnings.append)


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def loaded(path):
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    load(path, found, ALONE)
    return found


def test_what_was_saved_is_loaded_bit_for_bit_and_in_place(store):
    path = store.save(7, tensors(3.0), RECORD)
    assert path.name == "step_00000007"
    for name, tensor in loaded(path).items():
        assert torch.equal(tensor, tensors(3.0)[name])
    meta = read_meta(path)
    assert (meta["step"], meta["mode"]) == (7, "distill")


def test_the_newest_checkpoint_is_the_one_with_the_highest_step(store, warnings):
    assert store.newest() is None
    for step in (2, 10, 9):
        store.save(step, tensors(step), RECORD)
    # Saving 9 after 10 is a run that went back to before 10, which it found damaged.
    assert store.newest().name == "step_00000009"
    store.save(10, tensors(), RECORD)
    assert store.newest().name == "step_00000010"
    assert warnings == []


def test_only_the_last_checkpoints_stay(store):
    for step in range(1, 7):
        store.save(step, tensors(step), RECORD)
    assert names(store) == ["step_00000004", "step_00000005", "step_00000006"]


def largest(path):
    return max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)


def truncate(path):
    file = largest(path)
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(largest(path).read_bytes())
    content[len(content) // 2] ^= 1
    largest(path).write_bytes(bytes(content))


def lose_a_file(path):
    largest(path).unlink()


def lose_the_mark(path):
    (path / "meta.json").unlink()


def truncate_the_mark(path):
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text[: len(text) // 2])


def empty_the_mark(path):
    (path / "meta.json").write_text("{}")


DAMAGES = [truncate, flip_a_bit, lose_a_file, lose_the_mark, truncate_the_mark, empty_the_mark]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_skipped(store, warnings, damage):
    good = store.save(1, tensors(1), RECORD)
    bad = store.save(2, tensors(2), RECORD)
    damage(bad)
    assert store.newest() == good
    assert len(warnings) == 1
    assert str(bad) in warnings[0]
    assert "damaged and will be skipped" in warnings[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, r"bytes, not \d+"), (flip_a_bit, "its content has changed"), (lose_a_file, "No such file")],
)
def test_the_report_says_what_is_damaged(store, damage, message):
    path = store.save(1, tensors(), RECORD)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        store.verify(path)


def test_a_run_that_skipped_a_damaged_checkpoint_replaces_it_and_keeps_the_good_ones(store):
    store.keep_last = 1
    store.save(1, tensors(1), RECORD)
    for step in (2, 3):
        shutil.copytree(store.folder / "step_00000001", store.folder / f"step_0000000{step}")
        lose_the_mark(store.folder / f"step_0000000{step}")
    store.save(2, tensors(2), RECORD)
    assert names(store) == ["step_00000002"]
    assert torch.equal(loaded(store.newest())["student.weight"], tensors(2)["student.weight"])


def disk_full(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["write", "check", "finish"])
def test_a_full_disk_is_a_clear_error_and_leaves_the_previous_checkpoint_alone(store, monkeypatch, moment):
    store.save(1, tensors(1), RECORD)
    before = {file.name: file.read_bytes() for file in (store.folder / "step_00000001").iterdir()}
    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr("torch.distributed.checkpoint.filesystem._write_files_from_queue", disk_full)
        else:
            patch.setattr(checkpoints, {"check": "sums", "finish": "_flush_folder"}[moment], disk_full)
        if moment == "finish":
            patch.setattr(checkpoints.os, "rename", disk_full)
        with pytest.raises(CheckpointError, match=r"No space left on device; .* step_00000001, is untouched"):
            store.save(2, tensors(2), RECORD)
    assert names(store) == ["step_00000001"]
    assert {file.name: file.read_bytes() for file in (store.folder / "step_00000001").iterdir()} == before
    assert store.newest().name == "step_00000001"


def test_the_first_save_that_fails_says_that_there_is_no_earlier_one(tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints", ALONE, 3, pytest.fail)
    with pytest.raises(CheckpointError, match=r"could not prepare a checkpoint .*: .*; there is no earlier one"):
        store.save(1, tensors(), RECORD)


def test_what_a_killed_save_left_is_no_checkpoint_and_is_cleared_by_the_next(store):
    store.save(1, tensors(), RECORD)
    (store.folder / "step_00000001").rename(store.folder / ".step_00000002.partial")
    assert store.newest() is None
    store.save(3, tensors(), RECORD)
    assert names(store) == ["step_00000003"]


def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_the_tensor(store):
    path = store.save(1, tensors(), RECORD)
    with pytest.raises(CheckpointError, match=r"has no tensor critic.weight: it is of another model or recipe"):
        load(path, {**tensors(), "critic.weight": torch.zeros(1)}, ALONE)
    with pytest.raises(CheckpointError, match=r"student.weight has shape \(3, 2\); the model here has \(3, 3\)"):
        load(path, {"student.weight": torch.zeros(3, 3)}, ALONE)


def test_the_student_is_read_from_a_checkpoint_a_folder_of_them_or_a_run(store):
    store.save(1, tensors(1), RECORD)
    path = store.save(2, tensors(2), RECORD)
    for place in (path, store.folder, store.folder.parent):
        assert resolve(place, ALONE) == path
        (name,), (weight,) = zip(*read_student(place).items(), strict=True)
        assert name == "weight"
        assert torch.equal(weight, tensors(2)["student.weight"])
    assert torch.equal(read_student(path, ema=True)["weight"], tensors(2)["ema.weight"])


def test_a_student_that_is_not_there_is_refused(store, tmp_path):
    path = store.save(1, {"critic.weight": torch.zeros(1)}, RECORD)
    with pytest.raises(CheckpointError, match="has no student"):
        read_student(path)
    with pytest.raises(CheckpointError, match=r"has no running average \(ema_decay\)"):
        read_student(path, ema=True)
    with pytest.raises(CheckpointError, match="nowhere is not a complete checkpoint"):
        read_student(tmp_path / "nowhere")
    lose_the_mark(path)
    with pytest.raises(CheckpointError, match=r"has no usable checkpoint: .*step_00000001 is damaged"):
        read_student(store.folder)


def test_the_mark_lists_every_other_file_with_its_size(store):
    path = store.save(1, tensors(), RECORD)
    meta = json.loads((path / "meta.json").read_text())
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.name != "meta.json"}
    assert {name: size for name, (size, _) in meta["files"].items()} == sizes
    assert list(sizes) == ["shard-00001-model-00001-of-00001.safetensors"]
