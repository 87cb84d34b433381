"""Wan2.2-A14B's two experts: loaded, sampled and converted as one model, distilled one at a time."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_wan
import torch
from safetensors.torch import load_file
from tiny_wan import LATENT, PROMPTS, TEXT_DIM

from codmd import cli, models
from codmd.models.wan.config import FOLDERS
from codmd.sample.samplers import FewStep, Guided, noise_of

SIGMAS = (1.0, 0.9375, 0.833, 0.625)
VIDEO = ["--frames", "9", "--height", "32", "--width", "48"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_wan.write_a14b_pipeline(tmp_path_factory.mktemp("a14b") / "pipeline")


def status(*arguments):
    return cli.main([str(argument) for argument in arguments])


def load(source, **options):
    return models.build("wan", weights=str(source), null_embedding="zeros", compute="float32", **LATENT, **options)


def weights_of(folder):
    return {expert: load_file(next((folder / name).glob("*.safetensors"))) for expert, name in FOLDERS.items()}


# One model


def test_the_teacher_of_two_experts_is_diffusers_pipeline(pipeline):
    from diffusers import WanPipeline

    model = load(pipeline)
    cond, null = (torch.randn(1, 512, TEXT_DIM, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    model.low._null = null
    sampler = Guided(steps=6, guidance=4.0, shift=5.0, solver="euler")
    found = sampler(model, noise_of("p", 1), cond, lambda _: None)
    reference = WanPipeline.from_pretrained(pipeline, scheduler=sampler.scheduler())
    reference.set_progress_bar_config(disable=True)
    start = noise_of("p", 1).rows(torch.randn, (1, *model.latent_shape))
    expected = reference(
        prompt_embeds=cond, negative_prompt_embeds=null, latents=start.transpose(1, 2), height=32, width=48,
        num_frames=9, num_inference_steps=6, guidance_scale=4.0, output_type="latent",
    ).frames.transpose(1, 2)  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    model.high = model.low
    alone = sampler(model, noise_of("p", 1), cond, lambda _: None)
    assert (alone - expected).abs().max() > 0.1


def test_each_sample_of_a_batch_is_the_expert_s_of_its_level(pipeline):
    model = load(pipeline)
    x_t, cond = torch.randn(3, *model.latent_shape), torch.randn(3, 5, TEXT_DIM)
    sigma = torch.tensor([0.875, 0.874, 1.0])
    for predict in (model, model.predict_x0):
        together = predict(x_t, sigma, cond)
        for row, expert in enumerate((model.high, model.low, model.high)):
            one = slice(row, row + 1)
            alone = (expert if predict is model else expert.predict_x0)(x_t[one], sigma[one], cond[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


def test_a_pipeline_that_does_not_tell_its_boundary_is_refused(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": None}))
    with pytest.raises(ValueError, match="boundary_ratio: got None; expected the level between two experts"):
        load(folder)


def test_an_expert_of_a_pipeline_that_has_one_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no transformer; expected a pipeline of two experts"):
        load(tmp_path, expert="high")


# The commands


def test_the_command_samples_both_and_converts_both(pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n")
    assert status("convert", "--codmd", pipeline, tmp_path / "converted") == 0
    found, expected = weights_of(tmp_path / "converted"), weights_of(pipeline)
    assert all(torch.equal(found[e][name], value) for e in FOLDERS for name, value in expected[e].items())
    common = ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", "--latents", "--device", "cpu",
              "--compute", "float32", *VIDEO, "--text-encoder", pipeline]  # fmt: skip
    assert status("sample", tmp_path / "converted", "--sigmas", ",".join(map(str, SIGMAS)), *common) == 0
    (latents,) = (tmp_path / "out" / "latents").iterdir()
    model = load(pipeline, text_encoder=str(pipeline))
    expected = FewStep(SIGMAS)(model, noise_of(PROMPTS[0], 0), model.encode(PROMPTS[:1]), lambda _: None)
    torch.testing.assert_close(load_file(latents)["latents"], expected[0], rtol=1e-4, atol=1e-5)


# Training


def test_two_experts_are_not_trained_as_one_network(pipeline, capsys):
    command = ["train", "wan_tiny", f"model.weights={pipeline}", "data.kind=none", "data.path=''"]
    for more in ([], ["--dry-run"]):
        assert status(*command, *more) == 1
        assert "model.weights: holds two experts" in capsys.readouterr().err
