"""Repositories of the Hub in the place of folders, the student as a whole pipeline, and its way to the Hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import tiny_wan
import torch
from hub_server import serving
from test_convert import write_run
from tiny_wan import LATENT, PROMPTS

import codmd
from codmd import hub, models
from codmd.cli import main
from codmd.distill.update.schedule import sampling_sigmas
from codmd.models.wan.network import FRAMES_PER_SECOND
from codmd.sample.samplers import FewStep, noise_of
from codmd.scheduler import FewStepScheduler, nearest_stock
from codmd.vbench import DIMENSIONS, score
from examples.wan_tiny import pipeline as tiny_pipeline

SIGMAS = (1.0, 0.9, 0.75, 0.5)
SMALL = ["--frames", "5", "--height", "32", "--width", "32"]
REPOSITORY = "some-one/Wan.tiny-Diffusers"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A teacher's pipeline as diffusers writes it, and a pickle beside that nobody may fetch."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"code")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"code")
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub._snapshot.cache_clear()
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield found
    hub._snapshot.cache_clear()


@pytest.fixture
def student(tmp_path, base):
    """A run of some updates, and its pipeline."""
    write_run(tmp_path / "run", weights=base / "transformer")
    folder = tmp_path / "student"
    assert main(["convert", str(tmp_path / "run"), str(folder), "--pipeline", "--base", str(base)]) == 0
    return folder


# Repositories for folders


def test_a_repository_is_what_looks_like_one_and_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_repository("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert hub.is_repository("Wan-AI/Wan2.1-T2V-1.3B-Diffusers@refs/pr/3")
    for path in ("/a/b", "./a/b", "a", "a/b/c", "a/b.safetensors", "../a", "runs/x.pt", ""):
        assert not hub.is_repository(path)
        assert hub.local(path) == type(tmp_path)(path)
    (tmp_path / "Wan-AI" / "x").mkdir(parents=True)
    assert not hub.is_repository("Wan-AI/x")


def test_a_repository_serves_sample_and_encode_like_its_folder(tmp_path, server, base, monkeypatch):
    server.add(REPOSITORY, base)
    (tmp_path / "prompts.txt").write_text(PROMPTS[0] + "\n")
    files = {}
    for name, source in (("folder", str(base)), ("hub", REPOSITORY)):
        out = tmp_path / name
        assert main(["encode", str(tmp_path / "prompts.txt"), f"{out}-text", "--text-encoder", source]) == 0
        options = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(out), "--sigmas", "1,0.5", *SMALL]
        assert main(["sample", source, *options]) == 0
        written = [*sorted((out / "videos").iterdir()), *sorted(tmp_path.glob(f"{name}-text/*.safetensors"))]
        files[name] = [path.read_bytes() for path in written]
    assert files["hub"] == files["folder"]
    fetched = server.fetched()
    assert {"model_index.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"} <= fetched
    assert not [name for name in fetched if name.endswith(".bin")]
    asked = len(server.asked)
    hub._snapshot.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (hub.local(REPOSITORY, "vae") / "vae" / "config.json").is_file()
    assert len(server.asked) == asked
    with pytest.raises(FileNotFoundError, match="some/other: not whole in huggingface_hub's cache"):
        hub.local("some/other", "vae")


def test_a_revision_is_honoured_and_what_is_missing_is_said(server, base, tmp_path):
    server.add(REPOSITORY, base)
    (tmp_path / "config.json").write_text("{}")
    server.add(REPOSITORY, tmp_path, "v2")
    assert hub.components(REPOSITORY) >= {"vae", "text_encoder", "tokenizer", "transformer"}
    assert hub.components(f"{REPOSITORY}@v2") == set()
    assert (hub.local(f"{REPOSITORY}@v2", "transformer") / "config.json").read_text() == "{}"
    with pytest.raises(FileNotFoundError, match="has no revision 'v3'"):
        hub.local(f"{REPOSITORY}@v3", "vae")
    with pytest.raises(FileNotFoundError, match="some/other: no file or folder here, and no repository of the Hub"):
        hub.local("some/other", "vae")


def test_a_teacher_of_the_hub_is_trained_from_and_known_by_content(tmp_path, server, base, capsys):
    server.add(REPOSITORY, base)
    options = [f"model.weights={REPOSITORY}", "data.kind=prompts", f"data.path={tmp_path / 'prompts.txt'}",
               f"model.text_encoder={REPOSITORY}", "distill.batch_size=1", "distill.critic_updates=1", "updates=1",
               "log.tracker=none", f"out={tmp_path / 'run'}"]  # fmt: skip
    (tmp_path / "prompts.txt").write_text(PROMPTS[0] + "\n")
    assert main(["train", "wan_tiny", *options, "--dry-run"]) == 0
    assert main(["train", "wan_tiny", *options]) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "meta.json").read_text())["identity"]["teacher"][0] == REPOSITORY


def test_hf_endpoint_and_the_offline_switch_reach_a_process(tmp_path, server, base):
    server.add(REPOSITORY, base)
    code = f"from codmd import hub; print(hub.local({REPOSITORY!r}, 'vae'))"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    for offline in ("0", "1"):
        before = len(server.asked)
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert (len(server.asked) > before) == (offline == "0")
        assert ("Fetching" in done.stderr or "Downloading" in done.stderr) == (offline == "0")


# The student as a pipeline


def test_the_pipeline_samples_what_codmd_samples(student, base):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(student)
    pipe.scheduler = codmd.scheduler.FewStepScheduler.from_pretrained(student, subfolder="few_step_scheduler")
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 512, tiny_wan.TEXT_DIM)
    model = models.build("wan", weights=str(student), compute="float32", **LATENT)
    expected = FewStep(SIGMAS)(model, noise_of("p", 7), text, lambda _: None)
    start = pipe.scheduler.begin("p", 7, model.latent_shape)
    found = pipe(
        prompt_embeds=text, latents=start, height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
        output_type="latent",
    ).frames  # fmt: skip
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=0, atol=0)


def test_without_codmd_the_folders_own_scheduler_takes_nearly_the_students_steps(student):
    code = """
import sys
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
frames = pipe("a red fox", height=32, width=32, num_frames=5, num_inference_steps=4, guidance_scale=1.0).frames
assert frames.shape == (1, 5, 32, 32, 3), frames.shape
assert "codmd" not in sys.modules
print(type(pipe.scheduler).__name__, *pipe.scheduler.sigmas.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code, str(student)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, *levels = done.stdout.split()
    assert kind == "FlowMatchEulerDiscreteScheduler"
    error = max(abs(float(found) - sigma) for found, sigma in zip(levels, (*SIGMAS, 0.0), strict=True))
    assert error < 3e-3
    (said,) = re.findall(r"off by up to (\S+) \(of 1\)", (student / "README.md").read_text())
    assert float(said) == pytest.approx(error, rel=0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("sigmas", "most"),
    [
        ((1.0, 0.9, 0.757, 0.522), 1.1e-3),
        ((1.0, 0.937, 0.833, 0.624), 2.6e-4),
        ((1.0, 0.5), 1e-6),
        ((1.0,), 1e-6),
        (sampling_sigmas(8, 5.0), 1e-6),
    ],
)
def test_the_nearest_stock_scheduler_is_as_near_as_it_says(sigmas, most):
    scheduler, error = nearest_stock(sigmas)
    assert error <= most
    scheduler.set_timesteps(len(sigmas))
    assert max(abs(a - b) for a, b in zip(scheduler.sigmas[:-1].tolist(), sigmas, strict=True)) == pytest.approx(
        error, abs=1e-6
    )
    shift = scheduler.config.shift
    for other in (0.97 * shift, 1.03 * shift):  # no better one beside it
        neighbour = type(scheduler).from_config(scheduler.config, shift=other)
        neighbour.set_timesteps(len(sigmas))
        worse = max(abs(a - b) for a, b in zip(neighbour.sigmas[:-1].tolist(), sigmas, strict=True))
        assert worse >= error - 1e-6


def test_a_generator_in_the_place_of_the_stream_decides_the_noise():
    scheduler, v, x = FewStepScheduler((1.0, 0.5)), torch.zeros(1, 2, 3, 4, 4), torch.ones(1, 2, 3, 4, 4)
    steps = []
    for seed in (1, 1, 2):
        scheduler.set_timesteps(50)
        steps.append(scheduler.step(v, scheduler.timesteps[0], x, torch.Generator().manual_seed(seed)).prev_sample)
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])
    assert torch.equal(scheduler.step(v, scheduler.timesteps[1], x, return_dict=False)[0], x)


def test_the_card_tells_recipe_versions_and_measures(tmp_path, base, capsys, monkeypatch):
    monkeypatch.setitem(FRAMES_PER_SECOND, 16, 24)  # a model of as many channels is not of the default rate
    results = {"distances": {"cosine": {"mean": 0.0123, "std": 0.004, "count": 3}, "order": None}, "measures": {}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_run(tmp_path / "run", weights=base / "transformer")
    (tmp_path / "run" / "log.jsonl").write_text(
        '{"update": 7, "loss": 0.5, "std_ratio": 1.25}\n{"update": 9, "loss": 3}\n'
    )
    arguments = ["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--pipeline", "--base", str(base)]
    scores = score(dict.fromkeys(DIMENSIONS, 0.5))
    (tmp_path / "scores.json").write_text(json.dumps({"student": asdict(scores)}))
    assert main([*arguments, "--measures", str(tmp_path / "results.json"), str(tmp_path / "scores.json")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "4-step student",
        "in 7 updates of 64 samples",
        "| sigmas | 1, 0.9, 0.75, 0.5 |",
        "| std_ratio | 1.25 |",
        "| distance to the reference: cosine | 0.0123 ± 0.004 (3 videos) |",
        f"| VBench, total | {scores.total:.2f} % |",
        "| VBench, dynamic degree | 50.00 % |",
        "num_frames=9, height=32, width=48",
        "fps=24",
    ):
        assert part in card
    for content in ([], {}, {"student": asdict(scores), "dmd": asdict(scores)}):
        (tmp_path / "scores.json").write_text(json.dumps(content))
        other = [*arguments[:2], str(tmp_path / "two"), *arguments[3:], "--measures", str(tmp_path / "scores.json")]
        assert main(other) == 1
        assert "expected results.json of codmd inspect or codmd vbench --json of one model" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pipeline"], "holds no model_index.json; expected a diffusers pipeline"),
        (["--base", "x"], "--base: only with --pipeline"),
        (["--pipeline", "--adapter"], "--pipeline: only for a training checkpoint"),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused_and_leaves_nothing(tmp_path, base, capsys, options, message):
    write_run(tmp_path / "run", weights=base / "transformer")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pushed_student_is_sampled_from_the_hub_with_its_own_steps(tmp_path, server, base, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    server.add(REPOSITORY, base)
    write_run(tmp_path / "run", weights=base / "transformer")
    arguments = ["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--pipeline", "--base", REPOSITORY]
    assert main([*arguments, "--push", "me/student"]) == 0
    assert f"{server.url}/me/student" in capsys.readouterr().out
    written = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert server.files["me/student"]["main"] == written
    (tmp_path / "prompts.txt").write_text(PROMPTS[0] + "\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "videos"), "--latents", *SMALL]
    assert main(["sample", "me/student", *options]) == 0
    assert json.loads((tmp_path / "videos" / "sampling.json").read_text())["sigmas"] == list(SIGMAS)
