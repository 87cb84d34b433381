"""A run from a file of prompts through a real text encoder: to its end, resumed, and equal to one from shards."""

from __future__ import annotations

import pytest
import tiny_wan
import torch
from train_cases import curve, train

from codmd import cli
from codmd.distill.run.checkpoint import read_student
from codmd.distill.run.integrity import read_meta

LORA = ("lora.rank=2", "lora.alpha=2")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Folder with a tiny UMT5 and its tokenizer."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan.write_text_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """UTF-8 with a byte-order mark, empty lines and letters beyond ASCII."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\ufeff" + "\n\n".join([*tiny_wan.PROMPTS, "ein Bär läuft", "犬"]) + "\n", "utf-8")
    return path


def options(out, pipeline, source, updates):
    return ["wan_tiny", f"out={out}", f"updates={updates}", "model.frames=2", "model.height=4", "model.width=4",
            f"model.text_encoder={pipeline}", *source, "distill.batch_size=3", "distill.critic_updates=2",
            "distill.student_lr=1e-3", "distill.critic_lr=1e-3", "log.tracker=none"]  # fmt: skip


def text(prompts):
    """The negative prompt, too, is encoded by the run."""
    return ["data.kind=prompts", f"data.path={prompts}", "model.null_embedding=''"]


@pytest.fixture(scope="module")
def from_text(tmp_path_factory, pipeline, prompts):
    """Five updates from the prompts, uninterrupted."""
    run = tmp_path_factory.mktemp("text") / "run"
    train(*options(run, pipeline, text(prompts), 5))
    return run


def test_a_run_from_prompts_goes_through_them_in_a_new_order_each_epoch(from_text, prompts):
    lines = curve(from_text)
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5]
    meta = read_meta(from_text / "checkpoints" / "step_00000005")
    assert meta["position"] == 5 * 3 * 2, "three samples for the student's update, three fresh ones for the critic's"
    assert meta["config"]["data"] == {"kind": "prompts", "path": str(prompts), "embeddings": "", "zoom": 4.0}


@pytest.mark.parametrize("adapters", [(), LORA], ids=["whole", "lora"])
def test_a_run_from_prompts_resumes_bit_for_bit(tmp_path, pipeline, prompts, from_text, adapters, capsys):
    expected = from_text
    if adapters:
        expected = tmp_path / "undisturbed"
        train(*options(expected, pipeline, text(prompts), 5), *adapters)
    for updates in (2, 5):
        train(*options(tmp_path / "run", pipeline, text(prompts), updates), *adapters)
    assert "continuing from" in capsys.readouterr().err
    assert curve(tmp_path / "run") == curve(expected)
    ours, theirs = read_student(tmp_path / "run"), read_student(expected)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_prompts_and_their_encoded_shards_give_the_same_losses(tmp_path, pipeline, prompts, from_text):
    shards = tmp_path / "shards"
    assert cli.main(["encode", str(prompts), str(shards), "--text-encoder", str(pipeline), "--shard", "2"]) == 0
    encoded = [f"data.path={shards}", f"model.null_embedding={shards}"]
    train(*options(tmp_path / "run", "''", encoded, 5))
    assert curve(tmp_path / "run") == curve(from_text)
    plain = [f"data.path={shards}", "model.null_embedding=zeros"]
    train(*options(tmp_path / "plain", "''", plain, 1))
    assert curve(tmp_path / "plain")[0]["loss"] != curve(from_text)[0]["loss"], "the negative prompt is heard"


def test_previews_of_a_run_from_prompts_show_those_that_were_asked_for(tmp_path, pipeline, prompts):
    wanted = f"log.preview_prompts=[{tiny_wan.PROMPTS[2]}, 犬]"
    train(*options(tmp_path, pipeline, text(prompts), 1), "log.preview_every=1", wanted)
    assert (tmp_path / "previews" / "step_00000001.mp4").is_file()
    train(*options(tmp_path / "b", pipeline, text(prompts), 1), "log.preview_prompts=[a red fox runs]", status=1)


@pytest.mark.parametrize("how", [(), ("--dry-run",)], ids=["run", "dry"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.text_encoder=''", "text_encoder: not given; prompts as text need its folder"),
        ("model.text_encoder=nowhere", "model.text_encoder: nowhere does not exist"),
        ("model.vae=nowhere", "model.vae: nowhere does not exist"),
        ("model.null_embedding=nowhere", "nowhere"),
        ("log.preview_prompts=[a red fox]", "log.preview_prompts: 'a red fox' is not in the data; did you mean"),
        ("data.path=empty.txt", "empty.txt: has no prompts; expected one a line"),
        ("data.path=latin.txt", "latin.txt: line 2 is not UTF-8; save the file in that encoding"),
        ("data.path=missing.txt", "missing.txt: cannot be read: No such file"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_before_anything_is_trained(
    tmp_path, monkeypatch, pipeline, prompts, change, message, how, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("a cat\nein Bär\n".encode("latin-1"))
    train(*options(tmp_path / "run", pipeline, text(prompts), 1), change, *how, status=1)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_dry_run_from_prompts_encodes_one_and_counts_all(tmp_path, pipeline, prompts, capsys):
    train(*options(tmp_path / "run", pipeline, text(prompts), 5), "--dry-run")
    assert "data: prompts, 5 items" in capsys.readouterr().out
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    tiny_wan.write_text_encoder(narrow)
    train(*options(tmp_path / "run", narrow, text(prompts), 5), "model.config=1.3b", "--dry-run", status=1)
    assert "cond: shape (3, 512, 32); expected (3, L, 4096)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
