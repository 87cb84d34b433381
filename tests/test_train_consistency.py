"""`codmd train` by rcm and scm on a folder of latents: what it logs, refuses, and how it continues."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from train_cases import QUIET, TOY, curve, train

from codmd.distill.config.run_config import read_config
from codmd.distill.config.typed import ConfigError
from codmd.distill.data.latents import Latents
from codmd.distill.data.prompts import Embeddings
from codmd.distill.run.checkpoint import read_student
from codmd.sample.video import write_latents

SHAPE = (4, 4, 1, 1)
OPTIONS = [*TOY, QUIET, "data.kind=latents", "distill.convention=rcm", "distill.relation_weight=0",
           "distill.ema_width=0.1", "distill.micro_batch=2", "checkpoint.every=1"]  # fmt: skip


@pytest.fixture
def latents(tmp_path):
    """Six files, as `codmd sample --latents` leaves them."""
    folder = tmp_path / "data" / "latents"
    folder.mkdir(parents=True)
    for number in range(6):
        value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))
        write_latents(folder / f"clip-{number}.safetensors", value, f"prompt {number % 3}", number)
    return tmp_path / "data"


def options(method, latents, out, *more):
    return [*OPTIONS, f"distill.method={method}", f"data.path={latents}", f"out={out}", *more]


@pytest.mark.parametrize("method", ["rcm", "scm"])
def test_a_stopped_run_continues_bit_for_bit(method, latents, tmp_path):
    warm = "distill.consistency.warmup=1"
    train(*options(method, latents, tmp_path / "whole", "updates=4", warm))
    train(*options(method, latents, tmp_path / "parts", "updates=2", warm))
    train(*options(method, latents, tmp_path / "parts", "updates=4", warm))
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert whole == parts
    assert [line["warmth"] for line in whole] == [1.0] * 4
    assert all(line["tangent_norm"] > 0 and line["derivative_norm"] > 0 and line["dropped"] == 0 for line in whole)
    assert [line.get("steps") for line in whole] == ([None, 2, 3, 4] if method == "rcm" else [None] * 4)
    runs = (tmp_path / name / "checkpoints" / "step_00000004" for name in ("whole", "parts"))
    one, other = (read_student(path, ema=True) for path in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_and_differences_train_too(latents, tmp_path):
    lora = ["lora={rank: 2}", "model.weights=random", "distill.consistency.tangent=difference", "updates=1"]
    train(*options("rcm", latents, tmp_path / "run", "distill.consistency.warmup=0", *lora))
    (line,) = curve(tmp_path / "run")
    assert line["tangent_norm"] > 0
    assert line["critic_grad_norm"] > 0


def test_a_method_without_videos_is_refused():
    with pytest.raises(ConfigError, match=r"distill.method: rcm learns from videos, which data.kind 'none' has not"):
        read_config("toy", ["distill.method=rcm"])


def test_embeddings_beside_other_data_are_refused():
    with pytest.raises(ConfigError, match=r"data.embeddings: got 'e'; data of kind 'none' has none beside it"):
        read_config("toy", ["data.embeddings=e"])


def embeddings_of(folder, *prompts):
    folder.mkdir()
    values = torch.arange(len(prompts), dtype=torch.float32).view(-1, 1, 1)
    save_file({"embedding": values}, folder / "0.safetensors", {"prompts": json.dumps(prompts)})
    return Embeddings(folder)


def test_latents_find_the_embedding_of_their_prompt(latents, tmp_path):
    source = Latents(latents, SHAPE, embeddings_of(tmp_path / "e", "prompt 2", "prompt 0", "prompt 1"))
    assert source.prompts == [f"prompt {number % 3}" for number in range(6)]
    assert source.condition([0, 1, 5]).flatten().tolist() == [1, 2, 0]
    expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    assert torch.equal(source.videos([4], [0])[0], expected)
    before = source.fingerprint()
    write_latents(latents / "latents" / "clip-0.safetensors", torch.zeros(SHAPE), "prompt 1", 0)
    assert Latents(latents, SHAPE, source.embeddings).fingerprint() != before


def test_files_that_are_no_latents_of_the_model_are_named(latents, tmp_path):
    with pytest.raises(ConfigError, match=r"clip-0\.safetensors has latents of shape \(4, 4, 1, 1\); the model's are"):
        Latents(latents, (3, 4, 1, 1), None)
    with pytest.raises(ConfigError, match=r"clip-1\.safetensors is of the prompt 'prompt 1', which has no embedding"):
        Latents(latents, SHAPE, embeddings_of(tmp_path / "e", "prompt 0", "prompt 2"))
    save_file({"embedding": torch.zeros(1)}, latents / "latents" / "a.safetensors")
    with pytest.raises(ConfigError, match=r"a.safetensors holds no latents of codmd sample --latents"):
        Latents(latents, SHAPE, None)
    with pytest.raises(ConfigError, match="has no safetensors files"):
        Latents(tmp_path / "nowhere", SHAPE, None)
