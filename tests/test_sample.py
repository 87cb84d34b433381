"""`codmd sample`: real video files that depend on (prompt, seed) alone, made once, read back."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import tiny_wan
import torch
from PIL import Image
from safetensors import safe_open
from test_convert import write_run
from tiny_wan import LATENT, PIXELS, PROMPTS

from codmd import models
from codmd.cli import main
from codmd.distill.config.sections import ModelSettings
from codmd.distill.data.textures import Textures
from codmd.distill.update.rollout import sample_few_step
from codmd.models.wan.options import WanOptions
from codmd.sample.command import _jobs
from codmd.sample.names import file_name, jobs_of, vbench_jobs
from codmd.sample.samplers import FewStep, Guided, noise_of
from codmd.sample.source import enlarged
from codmd.sample.video import read_video, video_is_complete, write_video

SIGMAS = (1.0, 0.9, 0.757, 0.522)
SIZE = ["--frames", "9", "--height", "32", "--width", "48"]
STUDENT = [*SIZE, "--sigmas", "1,0.9,0.757,0.522"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_wan.write_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([PROMPTS[0], "", PROMPTS[1], PROMPTS[0]]) + "\n", encoding="utf-8")
    return path


def sample(pipeline, prompts, out, *options, status=0):
    code = main(["sample", str(pipeline), "--prompts", str(prompts), "--out", str(out), *map(str, options)])
    assert code == status
    return out


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def latents_of(path):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["sample"])


def denoiser(pipeline, **options):
    return models.build("wan", weights=str(pipeline), null_embedding="zeros", **{**LATENT, **options})


# Samplers


def test_the_student_sampler_is_diffusers_stochastic_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = models.build("toy", weights="random", frames=4, width=16)
    torch.nn.init.normal_(model.output[1].weight, std=0.1)
    found = FewStep(SIGMAS)(model, noise_of("p", 3), None, lambda _: None)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=list(SIGMAS))
    noise = noise_of("p", 3)
    x_t = noise.rows(torch.randn, (1, *model.latent_shape))
    with torch.no_grad():
        for sigma, t in zip(SIGMAS, scheduler.timesteps, strict=True):
            velocity = model(x_t, torch.tensor([sigma]))
            x_t = scheduler.step(velocity, t, x_t, generator=noise.generator, return_dict=False)[0]
    torch.testing.assert_close(found, x_t, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory):
    return tiny_wan.write_ti2v_pipeline(tmp_path_factory.mktemp("ti2v") / "pipeline")


@pytest.mark.parametrize(("source", "solver"), [("pipeline", "unipc"), ("pipeline", "euler"), ("ti2v", "unipc")])
def test_the_teacher_sampler_is_diffusers_pipeline(request, source, solver):
    """With a timestep a token, as diffusers calls Wan2.2-TI2V-5B, or one a sample."""
    pipeline, pixels = request.getfixturevalue(source), {"pipeline": 8, "ti2v": 16}[source]
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    model = denoiser(pipeline, compute="float32")
    cond, null = (torch.randn(1, 512, tiny_wan.TEXT_DIM) for _ in range(2))
    model._null = null
    sampler = Guided(steps=6, guidance=4.0, solver=solver)
    found = sampler(model, noise_of("p", 1), cond, lambda _: None)
    reference = WanPipeline(
        None,
        None,
        AutoencoderKLWan.from_pretrained(pipeline / "vae"),
        sampler.scheduler(),
        WanTransformer3DModel.from_pretrained(pipeline / "transformer"),
        expand_timesteps=source == "ti2v",
    )
    reference.set_progress_bar_config(disable=True)
    start = noise_of("p", 1).rows(torch.randn, (1, *model.latent_shape))
    expected = reference(
        prompt_embeds=cond,
        negative_prompt_embeds=null,
        latents=start.transpose(1, 2),
        height=4 * pixels,
        width=6 * pixels,
        num_frames=9,
        num_inference_steps=6,
        guidance_scale=4.0,
        output_type="latent",
    ).frames.transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_two_forms_of_guidance_differ_by_one(pipeline):
    model = denoiser(pipeline, compute="float32")
    cond = torch.randn(1, 8, tiny_wan.TEXT_DIM)
    results = [
        Guided(steps=3, guidance=scale, form=form)(model, noise_of("p", 1), cond, lambda _: None)
        for form, scale in (("uncond", 4.5), ("cond", 3.5), ("cond", 4.5))
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_guidance_that_changes_nothing_costs_one_evaluation_a_step(pipeline):
    model = denoiser(pipeline, compute="float32")
    calls = []
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    cond = torch.randn(1, 8, tiny_wan.TEXT_DIM)
    for scale, form, expected in ((1.0, "uncond", 3), (0.0, "cond", 3), (1.0, "cond", 6)):
        calls.clear()
        Guided(steps=3, guidance=scale, form=form)(model, noise_of("p", 1), cond, lambda _: None)
        assert len(calls) == expected


def test_noise_differs_between_seeds_and_prompts_and_repeats():
    draws = [noise_of(p, s).rows(torch.randn, (4,)) for p, s in (("a", 0), ("a", 1), ("b", 0), ("a", 0))]
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# The command


def test_videos_are_16_fps_of_the_asked_size_with_a_sheet_of_all_seeds(pipeline, prompts, tmp_path, capsys):
    import imageio.v2 as imageio

    out = sample(pipeline, prompts, tmp_path / "out", *STUDENT, "--seeds", 2, "--seed", 5)
    assert "4 sampled, 0 complete before" in capsys.readouterr().out
    names = [f"{prompt}-{seed}.mp4" for prompt in PROMPTS[:2] for seed in (5, 6)]
    assert sorted(p.name for p in (out / "videos").iterdir()) == sorted(names)
    for name in names:
        assert read_video(out / "videos" / name).shape == (PIXELS[0], PIXELS[2], PIXELS[3], 3)
        with imageio.get_reader(out / "videos" / name) as reader:
            assert reader.get_meta_data()["fps"] == 16
    sheet = Image.open(out / "sheets" / f"{PROMPTS[0]}.png")
    assert sheet.size == (34 + 8 * 160, 18 + 2 * 107)
    row = np.asarray(sheet)[18 + 53]
    assert row[34:].std() > 0, "frames, not a blank page"


def test_progress_counts_every_evaluation_and_tells_the_time_left(pipeline, prompts, tmp_path, capsys):
    sample(pipeline, prompts, tmp_path / "out", *STUDENT, "--seeds", 2)
    first, *_, last = capsys.readouterr().err.strip().split("\r")
    evaluations = len(PROMPTS[:2]) * 2 * len(SIGMAS)
    assert re.search(rf"sampling: +0%.* 0/{evaluations} \[00:00<\?, \?step/s\]", first)
    assert re.search(rf"sampling: 100%.* {evaluations}/{evaluations} \[\d+:\d+<00:00, .*{PROMPTS[1][:30]}\]", last)


def test_the_video_is_the_decoded_sample_of_prompt_and_seed(pipeline, prompts, tmp_path):
    out = sample(pipeline, prompts, tmp_path / "out", *STUDENT, "--compute", "float32")
    kept = sample(pipeline, prompts, tmp_path / "kept", *STUDENT, "--compute", "float32", "--latents")
    model = denoiser(pipeline, compute="float32", text_encoder=str(pipeline), vae=str(pipeline))
    noise = noise_of(PROMPTS[0], 0)
    start = noise.rows(torch.randn, (1, *model.latent_shape))
    expected = sample_few_step(model, start, SIGMAS, noise, model.encode(PROMPTS[:1]))
    latents, metadata = latents_of(kept / "latents" / f"{PROMPTS[0]}-0.safetensors")
    torch.testing.assert_close(latents, expected[0], rtol=1e-4, atol=1e-5)
    assert metadata == {"prompt": PROMPTS[0], "seed": 0}
    assert not (kept / "videos").exists()
    frames = read_video(out / "videos" / f"{PROMPTS[0]}-0.mp4") / 255.0
    pixels = model.decode(expected)[0].permute(0, 2, 3, 1).numpy()
    assert np.abs(frames - pixels).mean() < 0.05, "what H.264 loses"


def test_a_second_run_keeps_complete_files_and_remakes_partial_ones(pipeline, prompts, tmp_path, capsys):
    out = sample(pipeline, prompts, tmp_path / "out", *STUDENT, "--seeds", 2)
    before = contents(out)
    cut, whole = (out / "videos" / f"{PROMPTS[0]}-{seed}.mp4" for seed in (0, 1))
    cut.write_bytes(cut.read_bytes()[:400])
    stamp = whole.stat().st_mtime_ns
    sample(pipeline, prompts, out, *STUDENT, "--seeds", 2)
    assert "1 sampled, 3 complete before" in capsys.readouterr().out
    assert whole.stat().st_mtime_ns == stamp
    assert contents(out) == before
    sample(pipeline, prompts, out, *STUDENT, "--seeds", 3)
    assert "2 sampled, 4 complete before" in capsys.readouterr().out


def test_partial_latents_are_remade(pipeline, prompts, tmp_path):
    out = sample(pipeline, prompts, tmp_path / "out", *STUDENT, "--latents")
    before = contents(out)
    first, second = sorted((out / "latents").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    sample(pipeline, prompts, out, *STUDENT, "--latents")
    assert contents(out) == before


def test_several_processes_make_the_files_of_one(pipeline, prompts, tmp_path, monkeypatch):
    whole = contents(sample(pipeline, prompts, tmp_path / "one", *STUDENT, "--latents"))
    for rank in range(2):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        sample(pipeline, prompts, tmp_path / "two", *STUDENT, "--latents")
        assert len(list((tmp_path / "two" / "latents").iterdir())) == rank + 1
    assert contents(tmp_path / "two") == whole


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_a_trained_student_samples_with_its_own_steps_size_and_precision(pipeline, prompts, tmp_path, compute):
    options = WanOptions(weights="random", config="tiny", compute=compute, gradient_checkpointing=True, **LATENT)
    write_run(tmp_path / "run", model=ModelSettings("wan", options))
    for options in ([], ["--ema"]):
        out = tmp_path / f"out{len(options)}"
        sample(tmp_path / "run", prompts, out, *options, "--latents", "--text-encoder", pipeline)
        settings = json.loads((out / "sampling.json").read_text())
        assert settings["sigmas"] == [1.0, 0.9, 0.75, 0.5]
        latents, _ = latents_of(out / "latents" / f"{PROMPTS[0]}-0.safetensors")
        assert latents.shape == (3, 16, 4, 6)
        assert settings["compute"] == compute
    assert contents(tmp_path / "out0") != contents(tmp_path / "out1")


def test_the_teacher_is_sampled_with_its_options(pipeline, prompts, tmp_path):
    options = [*SIZE, "--teacher", "--steps", 3, "--guidance", 3.5, "--guidance-form", "cond", "--solver", "euler"]
    out = sample(pipeline, prompts, tmp_path / "out", *options, "--shift", 5, "--negative-prompt", PROMPTS[2])
    settings = json.loads((out / "sampling.json").read_text())
    expected = {"steps": 3, "guidance": 3.5, "form": "cond", "solver": "euler", "shift": 5.0, "sampler": "Guided"}
    assert {key: settings[key] for key in expected} == expected
    assert len(list((out / "videos").iterdir())) == 2


# Names


def test_names_are_the_prompts_where_a_file_can_be_called_that():
    assert file_name("a red fox, at dawn") == "a red fox, at dawn"
    slashed, other = file_name("a/b"), file_name("a_b")
    assert "/" not in slashed
    assert slashed != other
    long = file_name("ä" * 300)
    assert len(f"{long}-10000.safetensors".encode()) < 255
    assert file_name("ä" * 300) != file_name("ä" * 301)
    assert [job.prompt for job in jobs_of(["a", "b", "a"], range(2))] == ["a", "b"]


def test_a_prompt_with_a_slash_gets_a_file(pipeline, tmp_path):
    (tmp_path / "slash.txt").write_text("black/white\n")
    out = sample(pipeline, tmp_path / "slash.txt", tmp_path / "out", *STUDENT)
    (video,) = (out / "videos").iterdir()
    assert video.name.startswith("black_white ")


VBENCH = [
    {"prompt_en": PROMPTS[0], "dimension": ["subject_consistency"]},
    {"prompt_en": PROMPTS[1], "dimension": ["temporal_flickering"]},
    {"prompt_en": PROMPTS[0], "dimension": ["overall_consistency"]},
]


def test_vbench_files_have_its_names_and_numbers(pipeline, tmp_path):
    info = tmp_path / "VBench_full_info.json"
    info.write_text(json.dumps(VBENCH))
    assert [(job.name, len(job.seeds)) for job in vbench_jobs(info)] == [(PROMPTS[0], 5), (PROMPTS[1], 25)]
    augmented = tmp_path / "augmented.txt"
    augmented.write_text(f"{PROMPTS[2]}\n{PROMPTS[2]} again\n")
    out = sample(pipeline, augmented, tmp_path / "out", *STUDENT, "--vbench", info, "--latents")
    names = {f"{PROMPTS[0]}-{i}.safetensors" for i in range(5)} | {f"{PROMPTS[1]}-{i}.safetensors" for i in range(25)}
    assert {p.name for p in (out / "latents").iterdir()} == names
    _, metadata = latents_of(out / "latents" / f"{PROMPTS[0]}-4.safetensors")
    assert metadata["prompt"] == PROMPTS[2], "named by the original prompt, made from the augmented one"


# Errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not VBench's list"),
        ("[]", "has no prompts"),
        ('[{"prompt": "a"}]', "not VBench's list"),
        ('[{"prompt_en": "a/b", "dimension": []}]', "no file can be: 'a/b'"),
    ],
)
def test_a_wrong_vbench_list_is_refused(tmp_path, content, message):
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        vbench_jobs(tmp_path / "info.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*SIZE], "--sigmas: not given, and plain weights do not tell them"),
        ([*STUDENT, "--steps", "4"], "--steps: only with --teacher"),
        ([*STUDENT, "--guidance-form", "cond"], "--guidance-form: only with --teacher"),
        ([*STUDENT, "--teacher"], "--sigmas: of the student"),
        ([*STUDENT, "--ema"], "--ema: only for a run"),
        ([*STUDENT, "--frames", "10"], "frames: got 10; expected a multiple of 4, plus 1"),
        ([*STUDENT, "--height", "40"], "height: got 40; expected a multiple of 16"),
        ([*STUDENT, "--attention", "fast"], "attention: got 'fast'"),
        ([*STUDENT, "--config", "1.3b"], "does not fit the configuration"),
        ([*STUDENT, "--device", "abacus"], "--device: 'abacus' cannot be used"),
        ([*STUDENT, "--vae", "/nowhere"], "vae: /nowhere/config.json: no such file"),
        ([*STUDENT, "--text-encoder", "/nowhere"], "text_encoder: /nowhere/text_encoder: no such folder"),
        ([*STUDENT, "--vbench", "/nowhere.json"], "--vbench /nowhere.json"),
        ([*STUDENT, "--vbench", "/nowhere.json", "--seeds", "2"], "VBench fixes them"),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_written(pipeline, prompts, tmp_path, capsys, options, message):
    sample(pipeline, prompts, tmp_path / "out", *options, status=1)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--sigmas", "0.9,0.5"], ["--sigmas", "x"], ["--seeds", "0"], ["--solver", "ddim"]])
def test_an_ill_formed_option_is_refused_by_the_parser(pipeline, prompts, tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        sample(pipeline, prompts, tmp_path / "out", *option)
    assert option[0] in capsys.readouterr().err


def test_bad_sources_and_prompts_are_named_and_nothing_is_written(pipeline, prompts, tmp_path, capsys):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes(b"caf\xe9\n")
    (tmp_path / "file").write_text("")
    bare = tmp_path / "bare"
    shutil.copytree(pipeline / "transformer", bare)
    for source, file, message in [
        (tmp_path / "absent", prompts, "absent"),
        (pipeline, empty, "has no prompts"),
        (pipeline, latin, "line 1 is not UTF-8"),
        (pipeline, tmp_path / "no.txt", "no.txt: cannot be read"),
        (bare, prompts, "vae: not given"),
    ]:
        sample(source, file, tmp_path / "out", *STUDENT, status=1)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["sample", str(pipeline), "--out", str(tmp_path / "out"), *STUDENT]) == 1
    assert "--prompts: not given" in capsys.readouterr().err
    sample(pipeline, prompts, tmp_path / "file", *STUDENT, status=1)
    assert "is a file; give a folder" in capsys.readouterr().err
    sample(pipeline, prompts, tmp_path / "file" / "deeper", *STUDENT, status=1)
    assert "deeper" in capsys.readouterr().err


def test_a_folder_of_other_settings_or_other_files_is_not_mixed(pipeline, prompts, tmp_path, capsys):
    out = sample(pipeline, prompts, tmp_path / "out", *STUDENT, "--latents")
    before = contents(out)
    sample(pipeline, prompts, out, *SIZE, "--sigmas", "1,0.5", "--latents", status=1)
    assert "was sampled with other settings (sigmas" in capsys.readouterr().err
    assert contents(out) == before
    for file in (out / "latents").iterdir():
        file.unlink()
    sample(pipeline, prompts, out, *SIZE, "--sigmas", "1,0.5", "--latents")
    assert json.loads((out / "sampling.json").read_text())["sigmas"] == [1.0, 0.5], "nothing was there to mix with"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    sample(pipeline, prompts, tmp_path / "mine", *STUDENT, "--latents", status=1)
    assert "holds other files and no sampling.json" in capsys.readouterr().err


def test_running_out_of_memory_is_a_clear_error(pipeline, prompts, tmp_path, capsys, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(FewStep, "__call__", too_large)
    sample(pipeline, prompts, tmp_path / "out", *STUDENT, status=1)
    assert "CUDA out of memory" in capsys.readouterr().err


def test_a_full_disk_leaves_no_partial_video(pipeline, prompts, tmp_path):
    limit = (  # torch 2.8 writes a module of its own when diffusers imports it: before the limit
        "import diffusers, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)); "
        "from codmd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["sample", pipeline, "--prompts", prompts, "--out", tmp_path / "out", *STUDENT, "--latents"]
    result = subprocess.run(
        [sys.executable, "-c", limit, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["sampling.json"]


def test_a_video_that_cannot_be_read_is_not_complete(tmp_path):
    pixels = torch.rand(5, 3, 32, 48)
    write_video(tmp_path / "a.mp4", pixels, 16)
    assert video_is_complete(tmp_path / "a.mp4", 5)
    assert not video_is_complete(tmp_path / "a.mp4", 6)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:1500])
    (tmp_path / "c.mp4").write_bytes(b"")
    for name in ("b.mp4", "c.mp4", "absent.mp4"):
        assert not video_is_complete(tmp_path / name, 5)


# A run on videos of its own


def test_a_first_video_needs_no_text_encoder_and_no_vae(tmp_path, capsys):
    small = [f"out={tmp_path}", "log.tracker=none", "log.preview_every=0", "teacher.batch_size=2",
             "teacher.updates=2", "distill.batch_size=2", "distill.critic_updates=1", "updates=1"]  # fmt: skip
    assert main(["train", "textures_tiny", *small]) == 1
    assert "train that teacher first: the same command with mode=teacher" in capsys.readouterr().err
    assert main(["train", "textures_tiny", "mode=teacher", *small[:-1]]) == 0
    assert main(["train", "textures_tiny", *small]) == 0
    assert f"next: codmd sample {tmp_path} --out VIDEOS" in capsys.readouterr().err
    caption = tmp_path / "captions.txt"
    caption.write_text("chelsea zoom in\n")
    for source, options in ((tmp_path, ()), (tmp_path / "teacher", ("--teacher", "--ema", "--guidance", "1.5"))):
        out = tmp_path / source.name / "videos"
        sample(source, caption, out, *options, *(("--steps", 2) if options else ()))
        (video,) = (out / "videos").iterdir()
        assert read_video(video).shape == (8, 128, 128, 3)
        assert (out / "sheets").is_dir()
    caption.write_text("chelsea zoom\n")
    assert main(["sample", str(tmp_path), "--prompts", str(caption), "--out", str(tmp_path / "other")]) == 1
    assert "'chelsea zoom' is no caption of the run's data; did you mean chelsea zoom" in capsys.readouterr().err


def test_without_prompts_every_caption_of_the_runs_own_data_is_sampled():
    textures = Textures((8, 12, 8, 8), text_dim=4)
    args = Namespace(vbench=None, seed=3, seeds=2)
    jobs = _jobs(args, None, textures)
    assert [job.prompt for job in jobs] == textures.captions
    assert jobs[0].seeds == range(3, 5)
    with pytest.raises(ValueError, match="--prompts: not given"):
        _jobs(args, None, None)


def test_enlarging_keeps_colours_and_leaves_large_videos_alone():
    pixels = torch.rand(2, 3, 3, 16, 16)
    large = enlarged(pixels)
    assert large.shape == (2, 3, 3, 128, 128)
    torch.testing.assert_close(
        torch.nn.functional.avg_pool2d(large.flatten(0, 1), 8).mean(), pixels.mean(), atol=1e-2, rtol=0
    )
    steps = large.diff(dim=-1)[..., 4:-4]
    assert steps.abs().max() <= pixels.diff(dim=-1).abs().max() / 8 + 1e-6  # linear between centres: no blocks
    assert torch.equal(enlarged(large), large)
