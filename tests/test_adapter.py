"""A model is a module and a row of the registry: every command then trains, encodes, samples and writes it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from train_cases import QUIET, train

from codmd import cli, models
from codmd.distill.plan.page import describe
from codmd.models.toy import ToyDenoiser, ToyOptions
from codmd.sample.video import read_video

SIZE = ["model.frames=3", "model.channels=4", "model.width=8", "model.blocks=2"]


@dataclass(frozen=True)
class PainterOptions(ToyOptions):
    """As the toy's, of another size."""

    frames: int = 3
    channels: int = 4
    width: int = 8
    blocks: int = 2


class Encoder:
    """The lengths of the words of a prompt."""

    tokens, width, dtype = 2, 3, torch.float32

    def length(self, prompt: str) -> int:
        return self.tokens

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        rows = torch.tensor([[float(len(word)) for word in prompt.split()[:3]] for prompt in prompts])
        return rows[:, None].expand(-1, self.tokens, -1).contiguous()


class PainterDenoiser(ToyDenoiser):
    """The toy with prompts and a decoder: 32 x 32 pixels of one grey a frame."""

    loaded_by = "PainterDenoiser.load"

    @classmethod
    def prompt_encoder(cls, folder, device, dtype):
        return Encoder()

    def forward(self, x_t, sigma, cond=None):
        assert cond.shape == (len(x_t), Encoder.tokens, Encoder.width)
        return super().forward(x_t, sigma)

    def encode(self, prompts, images=()):
        return Encoder()(prompts)

    def empty_cond(self, batch):
        return torch.empty(batch, Encoder.tokens, Encoder.width)

    @property
    def video_frames(self):
        return self.latent_shape[0]

    def load_decoder(self):
        return lambda latents: latents[:, :, :1].sigmoid().expand(-1, -1, 3, 32, 32)


@pytest.fixture(autouse=True)
def painter(monkeypatch):
    monkeypatch.setitem(models.REGISTRY, "painter", (__name__, "PainterDenoiser", "PainterOptions"))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def run(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


def test_a_model_of_one_row_is_encoded_trained_converted_and_sampled(tmp_path, capsys):
    prompts, shards, out = tmp_path / "prompts.txt", tmp_path / "embeddings", tmp_path / "run"
    prompts.write_text("one red fox\ntwo small boats\n")
    run("encode", prompts, shards, "--model", "painter", "--text-encoder", tmp_path, "--dtype", "float32")
    assert load_file(shards / "00000.safetensors")["embedding"].shape == (2, 2, 3)

    recipe = ["distill.batch_size=2", "distill.critic_updates=1", f"data.path={shards}", "data.kind=embeddings"]
    train("toy", "model.name=painter", *recipe, QUIET, f"out={out}", "updates=2")
    run("convert", out, tmp_path / "student.safetensors")
    assert "PainterDenoiser.load" in capsys.readouterr().out

    run("sample", out, "--prompts", shards, "--out", tmp_path / "trained", "--device", "cpu")
    run("sample", tmp_path / "student.safetensors", "--model", "painter", "--sigmas", "1,0.9,0.75,0.5",
        "--prompts", prompts, "--out", tmp_path / "plain", "--device", "cpu")  # fmt: skip
    for name in ("one red fox-0.mp4", "two small boats-0.mp4"):
        trained, plain = (read_video(tmp_path / kind / "videos" / name) for kind in ("trained", "plain"))
        assert trained.shape == (3, 32, 32, 3)
        assert (trained == plain).all()


def test_its_memory_is_planned():
    from codmd.distill.config.run_config import read_config

    overrides = ["model.name=painter", "data.kind=prompts", "data.path=none.txt"]
    assert "latents of 3 x 4 x 1 x 1" in describe(read_config("toy", overrides), (1,))


def test_an_unconditional_model_says_that_it_takes_no_prompts(tmp_path, capsys):
    train("toy", *SIZE, QUIET, f"out={tmp_path / 'run'}", "updates=1", "distill.batch_size=2")
    (tmp_path / "prompts.txt").write_text("a fox\n")
    command = ["sample", tmp_path / "run", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    for options, message in (([], "has no decoder"), (["--latents"], "encodes no prompts")):
        assert cli.main([str(argument) for argument in (*command, *options)]) == 1
        assert f"ToyDenoiser {'is unconditional: it ' if options else ''}{message}" in capsys.readouterr().err
