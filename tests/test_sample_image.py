"""`codmd sample` from a first frame: equal to diffusers' `WanImageToVideoPipeline`, and the files it makes."""

from __future__ import annotations

import json

import pytest
import tiny_wan
import torch
from PIL import Image
from safetensors import safe_open
from tiny_wan import LATENT, PROMPTS

from codmd.cli import main
from codmd.models.embeddings import EMBEDDING
from codmd.models.wan.image import IMAGE_EMBEDDING, IMAGE_LATENTS
from codmd.models.wan.image_encoder import WanImageEncoder
from codmd.models.wan.options import WanOptions
from codmd.sample.names import jobs_of
from codmd.sample.samplers import Guided, noise_of
from codmd.sample.source import open_source

CELL = {"clip": 8, "beside": 8, "in place": 16}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("clip", "beside", "in place"):
        (root / name).mkdir()
    return {
        "clip": tiny_wan.write_i2v_pipeline(root / "clip" / "pipeline", clip=True),
        "beside": tiny_wan.write_i2v_pipeline(root / "beside" / "pipeline", clip=False),
        "in place": tiny_wan.write_ti2v_pipeline(root / "in place" / "pipeline"),
    }


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return tiny_wan.write_image(tmp_path_factory.mktemp("image") / "first.png", size=(300, 200))


def size(kind):
    return [9, 4 * CELL[kind], 6 * CELL[kind]]


def sample(pipeline, kind, out, *options, status=0):
    frames, height, width = size(kind)
    sides = ["--frames", frames, "--height", height, "--width", width]
    assert main(["sample", str(pipeline), "--out", str(out), *map(str, [*sides, *options])]) == status
    return out


def diffusers_pipeline(folder, kind):
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

    clip = kind == "clip"
    pipe = WanImageToVideoPipeline(
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        AutoencoderKLWan.from_pretrained(folder / "vae"),
        Guided(steps=4).scheduler(),
        CLIPImageProcessor.from_pretrained(folder / "image_processor") if clip else None,
        CLIPVisionModel.from_pretrained(folder / "image_encoder") if clip else None,
        WanTransformer3DModel.from_pretrained(folder / "transformer"),
        expand_timesteps=kind == "in place",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", list(CELL))
def test_the_teacher_from_an_image_is_diffusers_pipeline(pipelines, image, kind, tmp_path):
    """Through the command, from files: text encoder, VAE, CLIP, guidance and solver."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS[0])
    folder, (frames, height, width) = pipelines[kind], size(kind)
    out = sample(
        folder, kind, tmp_path / "out", "--prompts", prompts, "--image", image, "--latents", "--teacher",
        "--steps", 4, "--guidance", 4, "--compute", "float32", "--negative-prompt", PROMPTS[1], "--device", "cpu",
    )  # fmt: skip
    with safe_open(out / "latents" / f"{PROMPTS[0]}-0.safetensors", "pt") as file:
        found = file.get_tensor("latents")[None]
    channels = 48 if kind == "in place" else 16
    start = noise_of(PROMPTS[0], 0).rows(torch.randn, (1, 3, channels, 4, 6))
    expected = diffusers_pipeline(folder, kind)(
        Image.open(image), PROMPTS[0], PROMPTS[1], height, width, frames, num_inference_steps=4, guidance_scale=4.0,
        latents=start.transpose(1, 2), output_type="latent",
    ).frames.transpose(1, 2)  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_image_is_encoded_as_diffusers_does(pipelines, image):
    """At any proportions for CLIP, and at those of the video for the VAE."""
    options = WanOptions(weights=str(pipelines["clip"]), vae=str(pipelines["clip"]),
                         image_encoder=str(pipelines["clip"]), **LATENT)  # fmt: skip
    encoder, pipe = WanImageEncoder.load(options, "cpu"), diffusers_pipeline(pipelines["clip"], "clip")
    found, opened = encoder([image]), Image.open(image)
    pixels = pipe.video_processor.preprocess(opened, 32, 48)
    _, condition = pipe.prepare_latents(
        pixels, 1, 16, 32, 48, 9, torch.float32, torch.device("cpu"), latents=torch.zeros(1, 16, 3, 4, 6)
    )
    torch.testing.assert_close(found[IMAGE_LATENTS], condition[:, 4:].transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[IMAGE_EMBEDDING], pipe.encode_image(opened), rtol=1e-5, atol=1e-5)
    assert {name: (1, *shape) for name, shape in encoder.shapes.items()} == {n: v.shape for n, v in found.items()}


def test_a_wide_image_is_cut_and_not_stretched(pipelines, tmp_path):
    options = WanOptions(weights=str(pipelines["beside"]), vae=str(pipelines["beside"]), **LATENT)
    narrow, wide = Image.new("RGB", (48, 32), "white"), Image.new("RGB", (144, 32), "red")
    wide.paste(narrow, (48, 0))
    narrow.save(tmp_path / "narrow.png")
    wide.save(tmp_path / "wide.png")
    encoder = WanImageEncoder.load(options, "cpu")
    one, other = (encoder([tmp_path / f"{name}.png"])[IMAGE_LATENTS] for name in ("narrow", "wide"))
    torch.testing.assert_close(other, one)


def test_a_student_of_a_frame_in_place_begins_with_it(pipelines, image, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS[0])
    folder = pipelines["in place"]
    out = sample(folder, "in place", tmp_path / "out", "--prompts", prompts, "--image", image, "--latents",
                 "--sigmas", "1,0.5", "--compute", "float32", "--device", "cpu")  # fmt: skip
    with safe_open(out / "latents" / f"{PROMPTS[0]}-0.safetensors", "pt") as file:
        found = file.get_tensor("latents")
    options = WanOptions(weights=str(folder), vae=str(folder), from_image=True, **LATENT)
    first = WanImageEncoder.load(options, "cpu")([image])[IMAGE_LATENTS]
    assert torch.equal(found[:1], first[0])


def test_every_prompt_has_its_own_image_and_videos_are_kept(pipelines, tmp_path, capsys):
    table = tmp_path / "pairs.jsonl"
    names = ("red.png", "blue.png")
    for seed, name in enumerate(names):
        tiny_wan.write_image(tmp_path / name, seed)
    lines = [{"prompt": PROMPTS[0], "image": name} for name in names]
    table.write_text("\n".join(map(json.dumps, lines)))
    options = ["--prompts", table, "--sigmas", "1,0.5", "--device", "cpu"]
    out = sample(pipelines["beside"], "beside", tmp_path / "out", *options)
    found = {path.name for path in (out / "videos").iterdir()}
    assert found == {f"{PROMPTS[0]} {name}-0.mp4" for name in names}
    capsys.readouterr()
    sample(pipelines["beside"], "beside", out, *options)
    assert "0 sampled, 2 complete before" in capsys.readouterr().out
    tiny_wan.write_image(tmp_path / names[0], 5)
    sample(pipelines["beside"], "beside", out, *options, status=1)
    assert f"images.{PROMPTS[0]} red.png" in capsys.readouterr().err


def test_what_is_missing_is_said(pipelines, image, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS[0])
    common = ["--prompts", prompts, "--sigmas", "1,0.5", "--device", "cpu"]
    for kind, options, message in (
        ("beside", [], "--image: not given; this model starts every video from an image"),
        ("beside", ["--image", tmp_path / "lost.png"], "lost.png: no such file"),
        ("beside", ["--image", prompts], "prompts.txt cannot be read as an image"),
        ("clip", ["--image", image, "--image-encoder", tmp_path], "image_encoder: no such folder"),
    ):
        sample(pipelines[kind], kind, tmp_path / "out", *common, *options, status=1)
        assert message in capsys.readouterr().err


def test_images_of_one_prompt_need_names_of_their_own():
    assert [job.name for job in jobs_of(["a", "b"], range(1), ["x/1.png", "y/1.png"])] == ["a", "b"]
    with pytest.raises(ValueError, match=r"two images of one prompt are called alike, 'a 1.png'"):
        jobs_of(["a", "a"], range(1), ["x/1.png", "y/1.png"])


def test_the_unused_names_of_a_condition_are_the_networks_own(pipelines):
    source = open_source(pipelines["clip"], False, {"vae": str(pipelines["clip"])}, torch.device("cpu"))
    assert source.model.from_image
    assert set(source.model.empty_cond(1)) == {EMBEDDING, IMAGE_LATENTS, IMAGE_EMBEDDING}
