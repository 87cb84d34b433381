"""`codmd encode --vae`: videos to the latents that training reads, resumed where it stopped."""

from __future__ import annotations

import json
import shutil

import clips
import numpy as np
import pytest
import tiny_wan
import torch
from safetensors import safe_open
from train_cases import QUIET, curve, train

from codmd.cli import main
from codmd.distill.data.latents import Latents
from codmd.distill.data.prompts import Embeddings
from codmd.encode import folder as folder_module
from codmd.encode.videos import fitted
from codmd.inspect.clips import Clip, read_clip
from codmd.models.wan.vae import WanVideoEncoder

SIZE = {"frames": 5, "height": 64, "width": 96}
OPTIONS = [word for name, value in SIZE.items() for word in (f"--{name}", str(value))]
SHAPE = (2, 16, 8, 12)
CAPTIONS = {"boat": "two boats on a quiet lake", "fox": "a red fox runs over snow"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan.write_vae(folder)
    tiny_wan.write_text_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    for number, (name, caption) in enumerate(CAPTIONS.items()):
        clips.encode(folder / f"{name}.mp4", clips.pan("astronaut", 2 + number, 1, frames=9))
        (folder / f"{name}.txt").write_text(f" {caption}\n")
    return folder


@pytest.fixture
def videos(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "videos")


def encode(videos, pipeline, out, *options, status=0):
    assert main(["encode", str(videos), str(out), "--vae", str(pipeline), *(options or OPTIONS)]) == status
    return out


def read(path):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["sample"])


def test_latents_are_the_normalised_mode_of_the_vae_and_training_finds_their_captions(videos, pipeline, tmp_path):
    from diffusers import AutoencoderKLWan

    out = encode(videos, pipeline, tmp_path / "out")
    vae = AutoencoderKLWan.from_pretrained(pipeline / "vae")
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    for name, caption in CAPTIONS.items():
        pixels = fitted(read_clip(videos / f"{name}.mp4"), 16, **SIZE)
        with torch.no_grad():
            expected = vae.encode(2 * pixels.transpose(1, 2) - 1).latent_dist.mode()[0]
        latents, sample = read(out / "latents" / f"{name}.safetensors")
        torch.testing.assert_close(latents, ((expected - mean) / std).transpose(0, 1))
        assert latents.shape == SHAPE
        assert (sample["prompt"], sample["video"]) == (caption, f"{name}.mp4")
    embeddings = tmp_path / "embeddings"
    assert main(["encode", str(out / "prompts.json"), str(embeddings), "--text-encoder", str(pipeline)]) == 0
    data = Latents(out, SHAPE, Embeddings(embeddings))
    assert data.prompts == list(CAPTIONS.values())
    assert torch.equal(data.condition([1]), Embeddings(embeddings).condition([1]))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_rcm_s_method_trains_on_encoded_videos(videos, pipeline, tmp_path):
    out, run = encode(videos, pipeline, tmp_path / "out", *OPTIONS, "--dtype", "bfloat16"), tmp_path / "run"
    assert main(["encode", str(out / "prompts.json"), str(tmp_path / "text"), "--text-encoder", str(pipeline)]) == 0
    train(
        "wan_tiny", QUIET, f"out={run}", "updates=1", "model.frames=2", "model.width=12", "data.kind=latents",
        f"data.path={out}", f"data.embeddings={tmp_path / 'text'}", "distill.method=scm", "distill.relation_weight=0",
        "distill.batch_size=2",
    )  # fmt: skip
    (line,) = curve(run)
    assert line["tangent_norm"] > 0


def test_an_interrupted_run_goes_on_where_it_stopped(videos, pipeline, tmp_path, monkeypatch, capsys):
    original, calls = WanVideoEncoder.__call__, []

    def call(self, pixels):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the machine went away")
        return original(self, pixels)

    monkeypatch.setattr(WanVideoEncoder, "__call__", call)
    encode(videos, pipeline, tmp_path / "out", status=1)
    assert "the machine went away" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    first = tmp_path / ".out.partial" / "latents" / "boat.safetensors"
    stamp = first.stat().st_mtime_ns
    (first.parent / "of_another_run.safetensors").write_bytes(b"")
    out = encode(videos, pipeline, tmp_path / "out")
    assert len(calls) == 3
    assert (out / "latents" / "boat.safetensors").stat().st_mtime_ns == stamp
    assert sorted(path.stem for path in (out / "latents").iterdir()) == ["boat", "fox"]


def test_what_other_settings_made_is_made_again(videos, pipeline, tmp_path, capsys):
    (videos / "zebra.txt").write_text("a zebra")
    clips.encode(videos / "zebra.mp4", clips.pan("coffee", 1, 1, frames=3))
    encode(videos, pipeline, tmp_path / "out", status=1)
    error = capsys.readouterr().err
    assert "1 of 3 videos cannot be used: zebra.mp4 has 3 frames at 16 a second; expected 5. The others are" in error
    first = tmp_path / ".out.partial" / "latents" / "boat.safetensors"
    before = first.stat().st_mtime_ns
    (videos / "boat.txt").write_text("a boat")
    (videos / "zebra.mp4").unlink()
    out = encode(videos, pipeline, tmp_path / "out")
    assert (out / "latents" / "boat.safetensors").stat().st_mtime_ns > before
    assert read(out / "latents" / "boat.safetensors")[1]["prompt"] == "a boat"


def test_captions_of_sampled_videos_are_their_prompts(recorded, pipeline, tmp_path):
    folder = tmp_path / "sampled"
    (folder / "videos").mkdir(parents=True)
    shutil.copy(recorded / "fox.mp4", folder / "videos" / "fox-3.mp4")
    (folder / "sampling.json").write_text(json.dumps({"prompts": {"fox": "a fox, as it was asked for"}}))
    out = encode(folder, pipeline, tmp_path / "out")
    assert read(out / "latents" / "fox-3.safetensors")[1]["prompt"] == "a fox, as it was asked for"
    assert json.loads((out / "prompts.json").read_text()) == ["a fox, as it was asked for"]


def test_frames_are_taken_at_the_model_s_rate_and_pictures_cut_in_the_middle():
    numbers = np.arange(12, dtype=np.uint8)[:, None, None, None]
    slow = fitted(Clip(np.broadcast_to(numbers, (12, 16, 48, 3)), None, 24.0), 16, 5, 16, 16)
    assert (255 * slow[0, :, 0, 0, 0]).round().tolist() == [0, 2, 3, 4, 6]
    left_to_right = np.broadcast_to(np.arange(48, dtype=np.uint8)[:, None], (5, 16, 48, 3))
    middle = fitted(Clip(left_to_right, None, 16.0), 16, 5, 16, 16)
    assert (255 * middle[0, 0, 0, 0]).round().tolist() == list(range(16, 32))
    assert fitted(Clip(left_to_right, None, 16.0), 16, 5, 8, 8).shape == (1, 5, 3, 8, 8)


def test_what_cannot_be_used_is_named_before_anything_is_written(videos, pipeline, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mute").mkdir()
    shutil.copy(videos / "fox.mp4", tmp_path / "mute")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    for source, vae, out, options, message in [
        (tmp_path / "none", pipeline, "out", OPTIONS, "none: no such folder; expected one of videos"),
        (tmp_path / "empty", pipeline, "out", OPTIONS, "empty: has no videos; expected .avi"),
        (tmp_path / "mute", pipeline, "out", OPTIONS, "fox.mp4: has no caption; expected it in fox.txt beside it"),
        (videos, tmp_path, "out", OPTIONS, "config.json: no such file; expected an AutoencoderKLWan's folder"),
        (videos, pipeline, "taken", OPTIONS, "taken: exists already; give a new folder"),
        (videos, pipeline, "out", ["--frames", "6"], "frames: got 6; expected a multiple of 4, plus 1"),
        (videos, pipeline, "out", ["--height", "60"], "height: got 60; expected a multiple of 8"),
        (videos, pipeline, "out", ["--shard", "2"], "--shard: only for prompts"),
        (videos, pipeline, "out", ["--model", "toy"], "ToyDenoiser has no encoder: its latents are not images"),
    ]:
        encode(source, vae, tmp_path / out, *options, status=1)
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "prompts.txt").write_text("a prompt")
    for options, message in [
        (["--text-encoder", "x", "--width", "64"], "--width: for images, and"),
        ([], "--text-encoder or --vae: expected the first for prompts"),
    ]:
        assert main(["encode", str(tmp_path / "prompts.txt"), "out", *options]) == 1
        assert message in capsys.readouterr().err


def test_a_truncated_video_and_a_full_disk_are_named(videos, pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    encode(videos, pipeline, tmp_path / "out", status=1)
    assert "needs 0.0 GB more and has 0.0 GB free" in capsys.readouterr().err
    monkeypatch.undo()
    (videos / "fox.mp4").write_bytes((videos / "fox.mp4").read_bytes()[:2000])
    encode(videos, pipeline, tmp_path / "out", status=1)
    assert "fox.mp4 is not a video, or its index is missing (truncated)" in capsys.readouterr().err


def test_the_vae_of_48_channels_has_its_own_cells_and_rate(tmp_path):
    folder = tiny_wan.write_ti2v_pipeline(tmp_path / "ti2v")
    encoder = WanVideoEncoder(folder, "cpu", torch.float32)
    assert encoder.frames_per_second == 24
    assert encoder.latent_shape(5, 32, 64) == (2, 48, 2, 4)
    assert encoder(torch.rand(1, 5, 3, 32, 64)).shape == (1, 2, 48, 2, 4)
