"""Wan2.2-A14B's two experts: loaded, sampled and converted as one model, distilled one at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import tiny_wan
import torch
from process_runs import assert_same_curve, assert_same_student, torchrun, write_embeddings
from process_runs import curve as losses
from safetensors.torch import load_file
from tiny_wan import LATENT, PROMPTS, TEXT_DIM
from train_cases import ALONE, QUIET, curve, train

from codmd import cli, models
from codmd.distill import DistillConfig
from codmd.distill.config.run_config import read_config
from codmd.distill.plan import footprint as footprints
from codmd.distill.plan.layouts import Forwards, Layout, Sizes, plan
from codmd.distill.plan.page import PLACEHOLDERS, describe
from codmd.distill.run.checkpoint import read_student
from codmd.distill.run.job import assemble
from codmd.distill.update.schedule import sampling_sigmas
from codmd.models.wan import WanDenoiser
from codmd.models.wan.config import FOLDERS
from codmd.sample.samplers import FewStep, Guided, noise_of
from codmd.scheduler import FewStepScheduler

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

RUN = ["data.kind=embeddings", "model.config=''", "model.frames=2", "model.height=4", "model.width=6",
       "distill.sigmas=[1,0.9375,0.8333,0.625]", "distill.transition=euler", "distill.shift=5", "distill.batch_size=2",
       "distill.critic_updates=1", QUIET]  # fmt: skip
ADAPTERS = ["lora.rank=2", "lora.alpha=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_embeddings(tmp_path_factory.mktemp("data") / "embeddings")


def distil(expert, source, data, run, *more, updates=1):
    train("wan_tiny", f"model.weights={source}", f"data.path={data}", f"distill.expert={expert}", f"out={run}",
          f"updates={updates}", *RUN, *more)  # fmt: skip
    return run


def test_two_experts_are_not_trained_as_one_network(pipeline, capsys):
    command = ["train", "wan_tiny", f"model.weights={pipeline}", "data.kind=none", "data.path=''"]
    for more in ([], ["--dry-run"]):
        assert status(*command, *more) == 1
        assert "distill.expert: not given; model.weights holds two experts" in capsys.readouterr().err


def test_experts_are_distilled_one_after_the_other_into_one_pipeline(pipeline, data, tmp_path, capsys):
    """The high-noise one in whole; then the low-noise one, as an adapter, from the pipeline that came of it."""
    from diffusers import WanPipeline

    before = weights_of(pipeline)
    distil("high", pipeline, data, tmp_path / "high", "log.preview_every=1")
    assert status("convert", tmp_path / "high", tmp_path / "halfway", "--pipeline") == 0
    halfway = weights_of(tmp_path / "halfway")
    assert any(not torch.equal(halfway["high"][name], value) for name, value in before["high"].items())
    assert all(torch.equal(halfway["low"][name], value) for name, value in before["low"].items())

    capsys.readouterr()
    distil("low", tmp_path / "halfway", data, tmp_path / "low", *ADAPTERS)
    assert "high-noise expert" not in capsys.readouterr().err
    assert status("convert", tmp_path / "low", tmp_path / "student", "--pipeline") == 0
    after = weights_of(tmp_path / "student")
    assert all(torch.equal(after["high"][name], value) for name, value in halfway["high"].items())
    assert any(not torch.equal(after["low"][name], value) for name, value in before["low"].items())
    merged = read_student(tmp_path / "low")
    name = "blocks.0.attn1.to_q"
    up, down = (merged[f"adapter.transformer.{name}.lora_{part}.weight"] for part in "BA")
    torch.testing.assert_close(after["low"][f"{name}.weight"], before["low"][f"{name}.weight"] + 2 * up @ down)

    assert status("convert", tmp_path / "low", tmp_path / "adapter", "--adapter") == 0
    assert "load it with WanPipeline.load_lora_weights (load_into_transformer_2=True)" in capsys.readouterr().out
    adapted = WanPipeline.from_pretrained(tmp_path / "halfway")
    adapted.load_lora_weights(tmp_path / "adapter", load_into_transformer_2=True)
    student = WanPipeline.from_pretrained(tmp_path / "student")
    inputs = torch.randn(1, 16, 3, 4, 6), torch.tensor([700.0]), torch.randn(1, 5, TEXT_DIM)
    with torch.no_grad():
        found, expected = (pipe.transformer_2(*inputs, return_dict=False)[0] for pipe in (adapted, student))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    videos = []
    for source in ("low", "student"):
        common = ["--prompts", data, "--latents", "--device", "cpu", "--compute", "float32", "--out", tmp_path / "out"]
        size = ["--frames", "5", "--height", "32", "--width", "48"]
        assert status("sample", tmp_path / source, *common, *size) == 0
        videos.append({path.name: load_file(path)["latents"] for path in (tmp_path / "out" / "latents").iterdir()})
        shutil.rmtree(tmp_path / "out")
    assert len(videos[0]) == 7
    assert all(torch.equal(videos[1][name], latents) for name, latents in videos[0].items())


def test_the_student_s_pipeline_of_two_experts_samples_its_euler_steps_in_diffusers(pipeline, data, tmp_path, capsys):
    from diffusers import WanPipeline

    distil("low", pipeline, data, tmp_path / "run")
    assert f"the high-noise expert of {pipeline} is no student's: distil it first" in capsys.readouterr().err
    assert status("convert", tmp_path / "run", tmp_path / "student", "--pipeline") == 0
    model = load(tmp_path / "student")
    assert WanDenoiser.student_transition(tmp_path / "student") == "euler"
    cond = torch.randn(1, 512, TEXT_DIM)
    levels = WanDenoiser.student_sigmas(tmp_path / "student")
    expected = FewStep(levels, "euler")(model, noise_of("p", 7), cond, lambda _: None)
    pipe = WanPipeline.from_pretrained(tmp_path / "student")
    assert not pipe.scheduler.config.stochastic_sampling
    pipe.scheduler = FewStepScheduler.from_pretrained(tmp_path / "student", subfolder="few_step_scheduler")
    pipe.set_progress_bar_config(disable=True)
    start = pipe.scheduler.begin("p", 7, model.latent_shape)
    found = pipe(
        prompt_embeds=cond, latents=start, height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
        output_type="latent",
    ).frames  # fmt: skip
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("expert", "more"), [("high", ADAPTERS), ("low", [])], ids=["high-lora", "low-whole"])
def test_a_resumed_run_of_an_expert_is_the_uninterrupted_one(pipeline, data, tmp_path, expert, more):
    whole = distil(expert, pipeline, data, tmp_path / "whole", *more, updates=3)
    parts = distil(expert, pipeline, data, tmp_path / "parts", *more, updates=1)
    distil(expert, pipeline, data, parts, *more, updates=3)
    assert curve(parts) == curve(whole)
    assert_same_student(parts, whole)


def test_a_run_does_not_go_on_beside_another_high_noise_expert(pipeline, data, tmp_path, capsys):
    source = shutil.copytree(pipeline, tmp_path / "pipeline")
    distil("low", source, data, tmp_path / "run")
    shutil.rmtree(source / "transformer")
    shutil.copytree(source / "transformer_2", source / "transformer")
    command = ["wan_tiny", f"model.weights={source}", f"data.path={data}", "distill.expert=low", "updates=2", *RUN]
    train(*command, f"out={tmp_path / 'run'}", status=1)
    assert "high-noise expert: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.boundary=0.9", "distill.boundary: got 0.9; model.weights says 0.875"),
        ("watch.every=1", "watch.every: watches whole students"),
        ("teacher_model.expert=low", "model.expert: distill.expert names it"),
    ],
)
def test_settings_that_contradict_the_expert_are_refused(pipeline, data, change, message, capsys):
    command = ["wan_tiny", f"model.weights={pipeline}", f"data.path={data}", "distill.expert=high", *RUN, "--dry-run"]
    train(*command, change, status=1)
    assert message in capsys.readouterr().err


def test_a_model_without_experts_is_refused(capsys):
    train("toy", "distill.expert=high", "--dry-run", status=1)
    assert "distill.expert: model toy has no experts" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_an_expert_as_one_does(pipeline, data, tmp_path):
    common = ["wan_tiny", f"model.weights={pipeline}", f"data.path={data}", "distill.expert=low", "updates=1", *RUN]
    torchrun(tmp_path / "two", 2, *common)
    train(*common, f"out={tmp_path / 'one'}")
    assert_same_curve(losses(tmp_path / "two"), losses(tmp_path / "one"))
    assert_same_student(tmp_path / "two", tmp_path / "one")


# The plan


@pytest.mark.parametrize(("expert", "more"), [("high", []), ("low", []), ("low", ADAPTERS)])
def test_the_plan_has_the_frozen_networks_of_an_expert_s_run_to_the_byte(pipeline, data, monkeypatch, expert, more):
    monkeypatch.setattr(footprints, "_peaks", lambda *_: (0, 0, 0, 0, 0, 0))
    config = read_config(
        "wan_tiny",
        [
            f"model.weights={pipeline}",
            f"data.path={data}",
            f"distill.expert={expert}",
            *RUN,
            *more,
            "model.config=tiny",
        ],
    )
    trainer = assemble(config, ALONE).trainer
    teacher = trainer.teacher.roles.base if more else trainer.teacher
    bases = [teacher, *([trainer.resting] if trainer.resting else [])]
    held = sum(w.numel() * w.element_size() for base in bases for n, w in base.named_parameters() if ".lora_" not in n)
    found = plan(config, Layout("full", 1, 1, lora=bool(more)), Sizes.of(config, 2))
    assert found.frozen == held
    assert len(bases) == (1 if expert == "high" else 2)


def test_a_cycle_of_an_expert_has_the_rollouts_of_its_own_steps():
    recipe = DistillConfig(sigmas=SIGMAS, critic_updates=1, expert="high")
    assert Forwards.of(recipe).student == 0.5
    assert Forwards.of(replace(recipe, expert="low")).student == 2.5


def test_the_shipped_recipe_has_the_public_students_steps_and_a_plan(monkeypatch):
    monkeypatch.setattr(footprints, "_peaks", lambda *_: (0, 0, 0, 0, 0, 0))
    config = read_config("wan2.2_t2v_a14b", PLACEHOLDERS)
    assert config.model.options.expert == "high"
    assert config.distill.sigmas == pytest.approx(sampling_sigmas(4, shift=5.0), abs=5e-5)
    assert config.distill.phase.stop == 2
    assert config.distill.phase.end == 0.8333
    assert "14.288 billion parameters a network" in describe(config, (32,))
