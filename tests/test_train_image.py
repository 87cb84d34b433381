"""From pairs of prompts and images to a student: encoded, trained, resumed, converted, sampled."""

from __future__ import annotations

import json

import pytest
import tiny_wan
import torch
from PIL import Image
from safetensors import safe_open
from tiny_wan import PROMPTS
from train_cases import curve, train

from codmd import cli, models
from codmd.distill.config.run_config import read_config
from codmd.distill.data.prompts import Embeddings
from codmd.distill.plan.footprint import footprint
from codmd.distill.plan.page import describe
from codmd.distill.run.checkpoint import read_student
from codmd.models.embeddings import EMBEDDING
from codmd.models.wan.image import IMAGE_EMBEDDING, IMAGE_LATENTS
from codmd.models.wan.image_encoder import WanImageEncoder
from codmd.models.wan.options import WanOptions
from codmd.scheduler import FewStepScheduler

SIZE = {"frames": 2, "height": 4, "width": 4}
CELL = {"clip": 8, "in place": 16}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {"clip": tiny_wan.write_i2v_pipeline(root / "clip"), "in place": tiny_wan.write_ti2v_pipeline(root / "ti2v")}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A table of three prompts and their images beside it."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = [{"prompt": prompt, "image": f"{seed}.png"} for seed, prompt in enumerate(PROMPTS)]
    for seed, line in enumerate(lines):
        tiny_wan.write_image(folder / line["image"], seed)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "pairs.jsonl"


def encode(pipeline, kind, pairs, out, *options, status=0):
    sides = ["--frames", 5, "--height", 4 * CELL[kind], "--width", 4 * CELL[kind]]
    command = ["encode", pairs, out, "--text-encoder", pipeline, "--dtype", "float32", "--device", "cpu", *sides]
    assert cli.main([*map(str, [*command, *options])]) == status
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory, pipelines, pairs):
    root = tmp_path_factory.mktemp("shards")
    return {kind: encode(pipelines[kind], kind, pairs, root / kind, "--shard", 2) for kind in CELL}


def run_options(out, pipeline, source, updates=2):
    return ["wan_tiny", f"out={out}", f"updates={updates}", f"model.weights={pipeline}", "model.config=''",
            "model.from_image=true", *(f"model.{name}={value}" for name, value in SIZE.items()), *source,
            "distill.batch_size=2", "distill.critic_updates=1", "distill.student_lr=1e-3",
            "log.tracker=none"]  # fmt: skip


def encoded(folder):
    return [f"data.path={folder}", f"model.null_embedding={folder}"]


# Encoding


@pytest.mark.parametrize("kind", list(CELL))
def test_shards_hold_prompts_images_and_what_the_encoders_make(pipelines, pairs, shards, kind):
    data, folder = Embeddings(shards[kind]), str(pipelines[kind])
    assert data.prompts == PROMPTS
    assert [name.rpartition("/")[2] for name in data.images] == ["0.png", "1.png", "2.png"]
    options = WanOptions(weights=folder, vae=folder, image_encoder=folder, from_image=True, **SIZE)
    expected = WanImageEncoder.load(options, "cpu")([pairs.parent / "2.png", pairs.parent / "0.png"])
    cond = data.condition([2, 0])
    assert cond.keys() == {EMBEDDING, *expected}
    for name, value in expected.items():
        torch.testing.assert_close(cond[name], value, rtol=1e-5, atol=1e-5)
    with safe_open(shards[kind] / "negative" / "embedding.safetensors", "pt") as file:
        assert file.keys() == [EMBEDDING]


def test_an_interrupted_encoding_goes_on_and_a_changed_image_is_noticed(
    pipelines, pairs, shards, tmp_path, monkeypatch
):
    original, seen = WanImageEncoder.__call__, []

    def call(self, images):
        seen.append(images[0].name)
        if len(seen) == 2:
            raise RuntimeError("the machine went away")
        return original(self, images)

    table = tmp_path / "pairs.jsonl"
    table.write_bytes(pairs.read_bytes())
    for seed in range(3):
        tiny_wan.write_image(tmp_path / f"{seed}.png", seed)
    monkeypatch.setattr(WanImageEncoder, "__call__", call)
    out, shard = tmp_path / "out", ["--shard", 1]
    encode(pipelines["in place"], "in place", table, out, *shard, status=1)
    encode(pipelines["in place"], "in place", table, out, *shard)
    assert seen == ["0.png", "1.png", "1.png", "2.png"]
    found, expected = (Embeddings(folder).condition([0, 1, 2]) for folder in (out, shards["in place"]))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    seen.clear()
    encode(pipelines["in place"], "in place", table, tmp_path / "other", *shard, status=1)
    tiny_wan.write_image(tmp_path / "0.png", 7)
    encode(pipelines["in place"], "in place", table, tmp_path / "other", *shard)
    assert seen == ["0.png", "1.png", "0.png", "1.png", "2.png"]


def test_pairs_that_cannot_be_encoded_are_named(pipelines, pairs, tmp_path, capsys):
    image = tiny_wan.write_image(tmp_path / "a.png").name
    (tmp_path / "broken.png").write_bytes(b"no image")
    for lines, options, message in (
        ([{"prompt": "a", "image": "lost.png"}], [], "line 1: "),
        ([{"prompt": "a", "image": image}, {"prompt": "b"}], [], 'line 2 has no "image", others have'),
        ([{"prompt": "a", "image": 3}], [], 'line 1: "image": got 3; expected a path'),
        ([{"prompt": "a", "image": "broken.png"}], [], "broken.png cannot be read as an image"),
        ([{"prompt": "a"}], ["--config", "ti2v_5b"], "--config: for images, and "),
        ([{"prompt": "a", "image": image}], ["--config", "tiny"], "has latents of 48 channels; the network has 16"),
        ([{"prompt": "a", "image": image}], ["--height", 40], "height: got 40; expected a multiple of 32"),
    ):
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
        command = [
            "encode",
            tmp_path / "t.jsonl",
            tmp_path / "out",
            "--text-encoder",
            pipelines["in place"],
            "--device",
            "cpu",
        ]
        if "image" in lines[0] and "--height" not in options:
            command += ["--height", 64, "--width", 64, "--frames", 5]
        assert cli.main([*map(str, [*command, *options])]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


# Training


@pytest.mark.parametrize("kind", list(CELL))
def test_a_run_from_pairs_resumes_and_equals_one_from_their_shards(pipelines, pairs, shards, tmp_path, kind, capsys):
    folder = pipelines[kind]
    parts = [
        f"model.{name}={folder}" for name in ("text_encoder", "vae", *(["image_encoder"] if kind == "clip" else []))
    ]
    text = ["data.kind=prompts", f"data.path={pairs}", "model.null_embedding=''", *parts]
    train(*run_options(tmp_path / "whole", folder, encoded(shards[kind])))
    for updates in (1, 2):
        train(*run_options(tmp_path / "text", folder, text, updates))
    assert "continuing from" in capsys.readouterr().err
    names = ("loss", "dmd", "relation_frame", "critic", "student_grad_norm")
    ours, theirs = curve(tmp_path / "text"), curve(tmp_path / "whole")
    assert [line["update"] for line in ours] == [1, 2]
    for line, expected in zip(ours, theirs, strict=True):
        # The run's own text encoder computes in bfloat16.
        assert [line[name] for name in names] == pytest.approx([expected[name] for name in names], rel=5e-2, abs=1e-5)
        assert line["student_grad_norm"] > 0
    start = models.build("wan", weights=str(folder), from_image=True, **SIZE).state_dict()
    student = read_student(tmp_path / "text")
    assert any(not torch.equal(student[name], start[name]) for name in start)


@pytest.mark.parametrize("kind", list(CELL))
def test_a_student_with_adapters_is_a_pipeline_that_samples_as_codmd_does(pipelines, shards, tmp_path, kind):
    run, folder = tmp_path / "run", pipelines[kind]
    train(*run_options(run, folder, encoded(shards[kind]), 1), "lora.rank=2", "lora.alpha=2", "log.preview_every=1")
    tiny_wan.write_index(folder)
    assert cli.main(["convert", str(run), str(tmp_path / "student"), "--pipeline", "--base", str(folder)]) == 0
    assert "image=load_image" in (tmp_path / "student" / "README.md").read_text("utf-8")
    image = tiny_wan.write_image(tmp_path / "square.png", 3, (64, 64))
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    out, parts = tmp_path / "out", ["--text-encoder", folder, "--vae", folder]
    command = ["sample", run, "--prompts", tmp_path / "prompts.txt", "--image", image, "--out", out, "--latents",
               "--device", "cpu", *parts, *(["--image-encoder", folder] if kind == "clip" else [])]  # fmt: skip
    assert cli.main(list(map(str, command))) == 0
    with safe_open(out / "latents" / f"{PROMPTS[0]}-0.safetensors", "pt") as file:
        found = file.get_tensor("latents")[None]
    expected = sampled_by_diffusers(tmp_path / "student", image, 4 * CELL[kind], found.shape[1:])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def sampled_by_diffusers(folder, image, side, latent_shape):
    """As the model card says."""
    from diffusers import WanImageToVideoPipeline

    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.scheduler = FewStepScheduler.from_pretrained(folder, subfolder="few_step_scheduler")
    pipe.set_progress_bar_config(disable=True)
    start = pipe.scheduler.begin(PROMPTS[0], 0, tuple(latent_shape))
    return pipe(
        Image.open(image), PROMPTS[0], latents=start, height=side, width=side, num_frames=5, num_inference_steps=4,
        guidance_scale=1.0, output_type="latent",
    ).frames.transpose(1, 2)  # fmt: skip


def test_a_dry_run_asks_for_what_the_network_is_given(pipelines, shards, tmp_path, capsys):
    options = run_options(tmp_path / "run", pipelines["in place"], encoded(shards["in place"]))
    train(*options, "--dry-run")
    assert "data: embeddings, 3 items" in capsys.readouterr().out
    train(*options, "model.from_image=false", "--dry-run", status=1)
    assert "holds a first frame, which this network is not given" in capsys.readouterr().err
    train(*options, f"data.path={shards['clip']}", "--dry-run", status=1)
    assert f"expected {EMBEDDING}, {IMAGE_LATENTS}" in capsys.readouterr().err


def test_a_method_without_a_form_for_it_is_refused(pipelines, shards, tmp_path, capsys):
    folder, options = tmp_path / "latents", run_options(tmp_path / "run", pipelines["in place"], [])
    sample = ["sample", pipelines["in place"], "--prompts", shards["in place"], "--out", folder, "--latents",
              "--sigmas", "1", "--frames", 5, "--height", 64, "--width", 64, "--device", "cpu"]  # fmt: skip
    assert cli.main(list(map(str, sample))) == 0
    data = ["data.kind=latents", f"data.path={folder}", f"data.embeddings={shards['in place']}", "distill.method=rcm"]
    train(*options, *data, status=1)
    assert "distill.method: rcm has no form for a first frame in place; expected dmd" in capsys.readouterr().err


def test_a_plan_counts_a_timestep_for_every_token(pipelines):
    """Six modulations a token, kept for the backward pass."""
    network, tokens, width = tiny_wan.write_ti2v_config(pipelines["in place"].parent), 8 * 8 * 8, 48

    def kept(*changes):
        sizes = ["model.frames=8", "model.height=16", "model.width=16", f"model.config={network}"]
        config = read_config("wan_tiny", [*run_options("x", "random", encoded("x"))[1:], *sizes, *changes])
        return footprint(config.model, 1, 1).kept

    assert kept() - kept("model.from_image=false") > 6 * 4 * tokens * width


def test_a_plan_is_of_the_latents_that_are_generated(pipelines):
    network = tiny_wan.write_i2v_config(pipelines["clip"].parent, clip=True)
    options = run_options("x", "random", encoded("x"))[1:]
    assert "latents of 2 x 16 x 4 x 4" in describe(read_config("wan_tiny", [*options, f"model.config={network}"]), (1,))


def test_an_embedding_of_the_image_is_part_of_the_condition(shards):
    assert Embeddings(shards["clip"]).condition([0])[IMAGE_EMBEDDING].shape == (1, 17, tiny_wan.IMAGE_DIM)
