"""Configuration files: packaged ones, overrides, and a refusal by full name of everything that cannot be meant."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from codmd import cli
from codmd.distill.config.run_config import PACKAGED, differences, find_config, read_config
from codmd.distill.config.typed import ConfigError, convert, structured
from codmd.models.tensor_files import save_tensors

TIMES = (math.atan(80), 1.5, 1.4, 1.0)
"""Of rCM's four steps."""
GIVEN = ["model.weights=w", "data.path=p", "model.null_embedding=n"]
PACKAGED_NAMES = [
    "textures_tiny", "toy", "wan2.1_i2v_14b_480p", "wan2.2_t2v_a14b", "wan2.2_ti2v_5b", "wan2.2_ti2v_5b_image",
    "wan_1.3b", "wan_1.3b_rcm", "wan_14b", "wan_14b_rcm", "wan_tiny",
]  # fmt: skip


def packaged(name, *overrides):
    given = {"toy": [], "textures_tiny": [], "wan_tiny": ["data.path=p"]}.get(name, GIVEN)
    return read_config(name, [*given, *(["data.embeddings=e"] if name.endswith("rcm") else []), *overrides])


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    return str(path)


def test_every_packaged_configuration_is_listed_and_readable():
    assert (
        sorted(e.name.removesuffix(".yaml") for e in PACKAGED.iterdir() if e.name.endswith(".yaml")) == PACKAGED_NAMES
    )
    for name in PACKAGED_NAMES:
        assert packaged(name).model.name in ("toy", "wan")


def test_the_recipes_of_both_wan_sizes_are_the_published_ones():
    small, large = packaged("wan_1.3b"), packaged("wan_14b")
    for config in (small, large):
        recipe, model = config.distill, config.model.options
        assert (model.frames, model.height, model.width) == (21, 60, 104)
        assert (recipe.guidance, recipe.critic_updates, recipe.grad_clip) == (3.5, 5, 10.0)
        assert (recipe.betas, recipe.sigma_range) == ((0.9, 0.999), (0.02, 0.98))
        assert (recipe.relation_weight, recipe.temperature) == (0.1, 0.1)
    assert small.distill.sigmas == (1.0, 0.9, 0.757, 0.522)
    assert large.distill.sigmas == (1.0, 0.937, 0.833, 0.624)
    assert (small.distill.shift, large.distill.shift) == (8.0, 5.0)
    assert (small.distill.batch_size, large.distill.batch_size) == (128, 32)
    assert (small.distill.student_lr, small.distill.critic_lr) == (2e-6, 4e-7)
    assert (large.distill.student_lr, large.distill.critic_lr) == (4e-6, 8e-7)
    assert (small.distill.batch_weight, large.distill.batch_weight) == (0.0, 1.0)


def test_the_recipes_of_rcm_are_the_published_ones():
    small, large = packaged("wan_1.3b_rcm").distill, packaged("wan_14b_rcm").distill
    for recipe in (small, large):
        assert (recipe.method, recipe.convention, recipe.guidance, recipe.shift) == ("rcm", "rcm", 5.0, 5.0)
        assert (recipe.betas, recipe.weight_decay, recipe.grad_clip) == ((0.0, 0.999), 0.01, None)
        assert (recipe.ema_width, recipe.consistency.log_std, recipe.consistency.tangent) == (0.1, 1.6, "jvp")
        assert recipe.sigmas == pytest.approx([math.tan(t) / (1 + math.tan(t)) for t in TIMES], abs=1e-5)
    assert (small.student_lr, small.critic_lr, small.critic_updates) == (2e-6, 4e-7, 4)
    assert (large.student_lr, large.critic_lr, large.critic_updates) == (1e-6, 1e-7, 9)
    assert (small.consistency.log_mean, small.consistency.warmup) == (0.7, 1000)
    assert (large.consistency.log_mean, large.consistency.warmup) == (1.5, 0)


def test_overrides_are_typed_and_reach_every_section():
    config = packaged("toy", "seed=7", "distill.sigmas=[1.0,0.4]", "distill.micro_batch=8", "model.width=32",
                      "distill.grad_clip=1", "log.tracker=none", "distill.student_lr=3e-5")  # fmt: skip
    assert (config.seed, config.distill.sigmas, config.distill.micro_batch) == (7, (1.0, 0.4), 8)
    assert (config.model.options.width, config.distill.grad_clip, config.log.tracker) == (32, 1.0, "none")
    assert isinstance(config.distill.grad_clip, float)
    assert config.distill.student_lr == 3e-5


def test_null_unsets_an_optional_value():
    assert packaged("wan_1.3b", "distill.grad_clip=null").distill.grad_clip is None


@pytest.mark.parametrize("length", range(1, 9))
def test_a_step_list_has_any_length_from_one_to_eight(length):
    sigmas = [1 - i / 10 for i in range(length)]
    assert packaged("toy", f"distill.sigmas={sigmas}").distill.sigmas == tuple(sigmas)


def test_values_may_refer_to_others_and_to_packaged_files():
    config = packaged("textures_tiny", "out=elsewhere")
    assert config.model.options.weights == "elsewhere/teacher/model"
    assert json.loads(Path(config.model.options.config).read_text())["in_channels"] == 12


def test_the_options_of_the_teacher_differ_where_the_configuration_says_so():
    config = packaged("wan_1.3b")
    teacher = config.model.changed(config.teacher_model, "teacher_model").options
    assert (config.model.options.storage, teacher.storage) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "sed: unknown; did you mean seed?"),
        ("guidance=3", "guidance: unknown; did you mean distill.guidance?"),
        ("batch_size=3", "batch_size: unknown; did you mean distill.batch_size or teacher.batch_size?"),
        ("distill.batch_sise=3", "distill.batch_sise: unknown; did you mean distill.batch_size?"),
        ("model.widht=3", "model.widht: unknown; did you mean model.width?"),
        ("distill.xyzzy=3", "distill.xyzzy: unknown; expected one of sigmas"),
        ("model.name=toi", "model.name: got 'toi'; did you mean toy?"),
        ("distill.batch_size=3.5", "distill.batch_size: got 3.5; expected an integer"),
        ("distill.batch_size=true", "distill.batch_size: got True; expected an integer"),
        ("distill.student_lr=fast", "distill.student_lr: got 'fast'; expected a number"),
        ("distill.sigmas=1.0", "distill.sigmas: got 1.0; expected a list"),
        ("distill.sigmas=[1.0,x]", r"distill.sigmas\[1\]: got 'x'; expected a number"),
        ("distill.betas=[0.9]", "distill.betas: got 1 values; expected 2"),
        ("distill=3", "distill: got 3; expected a section with keys"),
        ("model=3", "model.name: not given; expected one of toy, wan"),
        ("mode=teacher", "mode: a teacher learns from videos"),
        ("teacher_model.storage=int8", "teacher_model.storage: unknown"),
        ("data.kind=prompts", "data.path: got ''; data of kind 'prompts' needs one"),
        ("parallel={offload_teacher: true}\nlora={rank: 2}", "parallel.offload_teacher: with lora the teacher is"),
        ("=3", "override: got '=3'; expected key=value"),
        ("seed", "override: got 'seed'; expected key=value"),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_meant_is_refused_by_its_full_name(override, message):
    with pytest.raises(ConfigError, match=message):
        packaged("toy", *override.split("\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: x\n", "model: not given, and it has no default"),
        ("model: {name: toy, weights: random}\n", "out: not given"),
        ("out: x\nmodel: {weights: random}\n", "model.name: not given; expected one of toy, wan"),
        ("out: x\nmodel: {name: toy}\n", "model.weights: not given"),
        (
            "out: x\nmodel:\n  name: toy\n  weights: ???\n",
            "model.weights: not given; add model.weights=... to the command",
        ),
        ("out: ${nowhere}\nmodel: {name: toy, weights: random}\n", "nowhere"),
        ("out: [x\n", "run.yaml"),
        ("- a\n- b\n", "run.yaml: holds a list"),
    ],
)
def test_a_file_that_is_incomplete_or_no_configuration_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, text))


def test_an_unknown_file_names_the_nearest_packaged_configuration():
    with pytest.raises(ConfigError, match=r"wan1.3b: no such file, nor a packaged .*; did you mean wan_1.3b"):
        find_config("wan1.3b")


def test_a_file_beside_wins_over_a_packaged_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").write_text("out: mine\nmodel: {name: toy, weights: random}\n")
    assert read_config("toy").out == "mine"


def test_a_configuration_survives_being_written_and_read_again(tmp_path):
    for name in PACKAGED_NAMES:
        config = packaged(name)
        plain = json.loads(json.dumps(config.as_mapping()))
        assert read_config(write(tmp_path, yaml.safe_dump(plain))) == config


def test_differences_name_every_changed_leaf():
    before, now = packaged("toy").as_mapping(), packaged("toy", "seed=3", "distill.shift=5").as_mapping()
    assert differences(before, now) == ["seed: 0 -> 3", "distill.shift: 3.0 -> 5.0"]
    assert differences(json.loads(json.dumps(before)), before) == []


def test_optional_literal_and_nested_types_convert():
    assert convert(tuple[float, ...], [1, 2.5], "x") == (1.0, 2.5)
    assert convert(int | None, None, "x") is None
    with pytest.raises(ConfigError, match="x: got None; expected an integer"):
        convert(int, None, "x")
    with pytest.raises(ConfigError, match="configuration: got 3; expected a section"):
        structured(type(packaged("toy").log), 3)


# Dry runs


def test_a_dry_run_describes_the_run_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "toy", "distill.micro_batch=16", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "200 updates of 64 samples, 1 x 16 x 4" in printed
    assert "430,128 weights" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy", "model.weights=lost.safetensors"], "model.weights: lost.safetensors does not exist"),
        (["toy", "distill.micro_batch=7"], "micro_batch: 7 does not divide a process's share of 64 samples"),
        (["toy", "out=/dev/null/run"], "out: /dev/null/run cannot be made"),
        (["toy", "log.preview_prompts=[a cat]"], "log.preview_prompts: the model is unconditional"),
        (["textures_tiny", "mode=teacher", "model.height=9"], "height: got 9; expected a multiple of the patch, 2"),
        (["textures_tiny", "mode=teacher", "data.zoom=16"], "data.zoom: at 16 a photograph is 19 pixels wide"),
        (["textures_tiny", "mode=teacher", "model.config=tiny"], "textures have 12 latent channels; the model has 16"),
        (["textures_tiny", "mode=teacher", "log.preview_prompts=[chelsea pan]"], "'chelsea pan' is not in the data"),
        (["wan_tiny", "data.path=nowhere"], "data.path: nowhere has no safetensors shards"),
        (["wan_tiny", "data.kind=prompts", "data.path=nowhere"], "nowhere: cannot be read"),
        (["wan_tiny", "data.kind=none", "data.path=''"], "cond: got None"),
        (
            ["toy", "parallel.offload_teacher=true"],
            "parallel.offload_teacher: only a network sharded over several GPUs",
        ),
        (["nothing"], "no such file, nor a packaged configuration"),
    ],
)
def test_a_dry_run_finds_what_would_stop_the_run(arguments, message, capsys):
    assert cli.main(["train", *arguments, "--dry-run"]) == 1
    assert message in capsys.readouterr().err


def test_a_dry_run_counts_the_processes_that_torchrun_would_start(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert cli.main(["train", "toy", "--dry-run"]) == 1
    assert "batch_size: 64 does not divide among 6 processes" in capsys.readouterr().err
    assert cli.main(["train", "toy", "distill.batch_size=12", "parallel.shard_size=4", "--dry-run"]) == 1
    assert "parallel.shard_size: 4 does not divide 6 processes" in capsys.readouterr().err


def test_every_problem_of_a_configuration_is_listed_at_once(capsys):
    wrong = ["distill.shift=-1", "distill.sigmas=[2]", "distill.convention=x", "parallel.reshard=3", "sed=3"]
    assert cli.main(["train", "wan_1.3b", "model.weights=lost", *wrong]) == 1
    head, *problems = capsys.readouterr().err.splitlines()
    assert head == "codmd train: error: 7 problems:"
    assert [re.split("[:=]", problem)[0].strip() for problem in problems] == [
        "data.path", "model.null_embedding", "distill.sigmas", "distill.convention", "distill.shift",
        "parallel.reshard", "sed",
    ]  # fmt: skip


def test_a_dry_run_lists_every_problem_of_files_and_sizes_at_once(capsys):
    wrong = ["model.vae=gone", "data.path=nowhere", "distill.batch_size=12", "out=/dev/null/x"]
    assert cli.main(["train", "wan_1.3b", *wrong, "--dry-run"]) == 1
    printed = capsys.readouterr().err
    for problem in (
        "6 problems:",
        "model.weights: not given; add model.weights=... to the command",
        "model.null_embedding: not given",
        "batch_size: 12 does not divide among 8 processes",
        "model.vae: gone does not exist",
        "out: /dev/null/x cannot be made",
        "data.path: nowhere has no safetensors shards",
    ):
        assert problem in printed


def test_a_dry_run_on_one_process_stands_for_as_many_as_share_the_weights(tmp_path, capsys):
    save_tensors(tmp_path / "0.safetensors", {"embedding": torch.zeros(3, 2, 32)}, {"prompts": '["a", "b", "c"]'})
    options = ["wan_tiny", f"data.path={tmp_path}", "parallel.shard_size=4", "distill.batch_size=8"]
    assert cli.main(["train", *options, f"out={tmp_path / 'run'}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "20 updates of 8 samples, 4 x 2 x 1" in printed
    assert "checked for 4 processes" in printed
    assert cli.main(["train", *options, f"out={tmp_path / 'run'}"]) == 1
    assert "parallel.shard_size: 4 does not divide 1 processes" in capsys.readouterr().err
