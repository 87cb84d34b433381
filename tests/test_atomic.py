"""Files and folders that are written whole or not at all, and follow no link that somebody planted."""

from __future__ import annotations

import os
import zlib

import pytest
from train_cases import ALONE

from codmd.atomic import HOST, creating_folder, replacing, replacing_folder
from codmd.distill.config.typed import ConfigError
from codmd.distill.run.lock import only_run
from codmd.encode.prompts import encode_prompts

FOLDERS = [creating_folder, replacing_folder]
GONE = 99_999_999
"""No process has this number."""


def write(manager, path, text="new"):
    with manager(path) as partial:
        (partial / "file" if manager in FOLDERS else partial).write_text(text)


def content(path):
    return (path / "file" if path.is_dir() else path).read_text()


def fail_halfway(manager, path):
    with manager(path) as partial:
        (partial / "file" if manager in FOLDERS else partial).write_text("half")
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("manager", [replacing, *FOLDERS])
def test_files_and_folders_appear_complete_or_not_at_all(tmp_path, manager):
    with pytest.raises(RuntimeError, match="interrupted"):
        fail_halfway(manager, tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []
    write(manager, tmp_path / "a.txt")
    assert content(tmp_path / "a.txt") == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("manager", [replacing, replacing_folder])
def test_what_was_there_stays_until_the_new_is_complete(tmp_path, manager):
    write(manager, tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="interrupted"):
        fail_halfway(manager, tmp_path / "a")
    assert content(tmp_path / "a") == "old"
    write(manager, tmp_path / "a")
    assert content(tmp_path / "a") == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    write(replacing_folder, tmp_path / "a", "old")
    rename, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="no"):
        write(replacing_folder, tmp_path / "a")
    assert content(tmp_path / "a") == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_of_this_machine_left_is_removed(tmp_path):
    other = f"{zlib.crc32(b'another machine'):08x}"
    (tmp_path / f".a.txt.partial-{GONE}.txt").write_text("half")
    (tmp_path / f".a.txt.partial-{GONE}-{HOST}-abc").mkdir()
    kept = {f".a.txt.partial-{os.getppid()}-{HOST}-abc", f".a.txt.partial-{GONE}-{other}-abc"}
    for name in kept:
        (tmp_path / name).mkdir()
    write(replacing, tmp_path / "a.txt")
    assert set(os.listdir(tmp_path)) == {"a.txt", *kept}


@pytest.mark.parametrize("manager", [replacing, *FOLDERS])
def test_a_planted_link_is_not_followed(tmp_path, manager):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    for pid in (os.getpid(), GONE):
        for name in (f".a.txt.partial-{pid}", f".a.txt.partial-{pid}.txt", f".a.txt.partial-{pid}-{HOST}"):
            (folder / name).symlink_to(victim)
    write(manager, folder / "a.txt")
    assert content(folder / "a.txt") == "new"
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("manager", [replacing, replacing_folder])
def test_a_link_in_the_place_itself_is_replaced(tmp_path, manager):
    write(manager, tmp_path / "victim", "precious")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    write(manager, tmp_path / "a")
    assert content(tmp_path / "a") == "new"
    assert content(tmp_path / "victim") == "precious"
    assert not (tmp_path / "a").is_symlink()


def test_the_lock_of_a_run_is_no_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="cannot be used"), only_run(tmp_path / "run", ALONE):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_the_folder_that_encode_goes_on_with_is_no_link(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.out\.partial: is a link; remove it"):
        encode_prompts(None, ["a prompt"], "", tmp_path / "out", 1, 1)
    assert not any((tmp_path / "victim").iterdir())
