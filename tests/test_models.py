"""The table of docs/models.md: what it names exists, and Wan2.2-TI2V-5B goes through the whole way."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_wan
from process_runs import write_embeddings
from train_cases import train

from codmd import cli, models
from codmd.distill.config.run_config import read_config
from codmd.distill.plan.page import PLACEHOLDERS, describe
from codmd.models.wan.config import parameter_shapes
from codmd.models.wan.config import read_config as network_config

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_table_names_exists():
    rows = [line for line in (ROOT / "docs" / "models.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    named = set(re.findall(r"`(test_\w+\.py)`", "".join(rows)))
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []


@pytest.mark.parametrize(("name", "width", "billions"), [("ti2v_5b", 3072, 5.0), ("i2v_14b", 5120, 16.4)])
def test_the_shipped_configurations_have_the_size_of_their_names(name, width, billions):
    config = network_config(name)
    shapes = parameter_shapes(config)
    assert config["num_attention_heads"] * config["attention_head_dim"] == width
    assert sum(shape.numel() for shape in shapes.values()) == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("wan2.2_ti2v_5b", (121, 704, 1280)),
        ("wan2.2_ti2v_5b_image", (121, 704, 1280)),
        ("wan2.1_i2v_14b_480p", (81, 480, 832)),
    ],
)
def test_the_shipped_recipes_are_for_videos_of_that_size(name, video):
    options = read_config(name, PLACEHOLDERS).model.options
    assert options.for_video(*video) == options
    assert options.from_image == name.endswith("image")


@pytest.mark.every
def test_the_shipped_recipe_has_a_plan():
    text = describe(read_config("wan2.2_ti2v_5b", PLACEHOLDERS), (64,))
    assert "5.000 billion parameters" in text
    assert "latents of 31 x 48 x 44 x 80" in text


@pytest.mark.parametrize("adapters", [[], ["lora.rank=2", "lora.alpha=2"]], ids=["whole", "lora"])
def test_wan22_ti2v_is_trained_converted_and_sampled(tmp_path, adapters):
    folder, run = tiny_wan.write_ti2v_pipeline(tmp_path / "pipeline"), tmp_path / "run"
    data = write_embeddings(tmp_path / "embeddings")
    train("wan_tiny", f"model.weights={folder}", "model.config=''", f"data.path={data}", "model.frames=2",
          "model.height=4", "model.width=4", "updates=1", "distill.critic_updates=1", f"out={run}",
          "log.tracker=none", *adapters)  # fmt: skip
    assert cli.main(["convert", str(run), str(tmp_path / "student")]) == 0
    student = models.build("wan", weights=str(tmp_path / "student"), frames=2, height=4, width=4)
    assert student.latent_shape == (2, 48, 4, 4)
    assert student.frames_per_second == 24
    sample = ["sample", str(run), "--prompts", str(data), "--out", str(tmp_path / "videos"), "--device", "cpu"]
    assert cli.main([*sample, "--vae", str(folder)]) == 0
    assert len(list((tmp_path / "videos" / "videos").iterdir())) == 7
