"""Every option of a run has an error that names it, and the command line takes its words in any order."""

from __future__ import annotations

import dataclasses
import re
from typing import get_args, get_type_hints

import pytest

from codmd import cli, models, train_command
from codmd.distill.config.run_config import RunConfig, read_config
from codmd.distill.config.typed import ConfigError
from codmd.models.lora import LoraOptions

WRONG = {
    "out": ("''", "got ''; expected the run's folder"),
    "mode": ("distil", "got 'distil'; expected one of distill, teacher"),
    "seed": ("-1", "got -1; expected at least 0"),
    "updates": ("0", "got 0; expected at least 1"),
    "resume": ("3", "got 3; expected text"),
    "teacher_model": ("bfloat16", "got 'bfloat16'; expected a section with keys"),
    "lora.rank": ("0", "got 0; expected at least 1"),
    "lora.alpha": ("0", "got 0; expected at least 1"),
    "lora.targets": ("to_q", "got 'to_q'; expected a list"),
    "distill.method": ("cm", "got 'cm'; expected one of dmd, rcm, scm"),
    "distill.consistency.log_mean": (".nan", "got nan; expected a finite number"),
    "distill.consistency.log_std": ("0", "got 0.0; expected a finite number above 0"),
    "distill.consistency.warmup": ("-1", "got -1; expected at least 0"),
    "distill.consistency.tangent": ("exact", "got 'exact'; expected one of jvp, difference"),
    "distill.transition": ("heun", "got 'heun'; expected one of renoise, euler"),
    "distill.expert": ("both", "got 'both'; expected one of high, low"),
    "distill.boundary": ("1.5", "got 1.5; expected a noise level in (0, 1)"),
    "distill.sigmas": ("[1.0,0.5,0.5]", "expected levels that fall strictly and stay above 0"),
    "distill.shift": ("0", "got 0.0; expected a finite number above 0"),
    "distill.sigma_range": ("[0.5,0.5]", "got (0.5, 0.5)"),
    "distill.batch_size": ("0", "got 0; expected at least 1"),
    "distill.micro_batch": ("0", "got 0; expected at least 1"),
    "distill.relation_accumulate": ("1", "got 1; expected true or false"),
    "distill.critic_updates": ("0", "got 0; expected at least 1"),
    "distill.share_rollout": ("1", "got 1; expected true or false"),
    "distill.student_lr": ("-1", "got -1.0; expected a finite number above 0"),
    "distill.critic_lr": (".inf", "got inf; expected a finite number above 0"),
    "distill.betas": ("[0.9,1.0]", "got (0.9, 1.0); expected numbers in [0, 1)"),
    "distill.weight_decay": ("-0.1", "got -0.1; expected a finite number >= 0"),
    "distill.grad_clip": ("0", "got 0.0; expected a finite number above 0"),
    "distill.ema_decay": ("1", "expected a number in [0, 1)"),
    "distill.ema_width": ("0.3", "got 0.3; expected a number above 0 and below 0.25"),
    "distill.max_nonfinite": ("0", "got 0; expected at least 1"),
    "distill.guidance": (".nan", "got nan; expected a finite number, or none"),
    "distill.batch_guidance": ("2", "got 2; expected true or false"),
    "distill.convention": ("rmc", "convention='rmc' is not known"),
    "distill.relation_weight": (".nan", "got nan; expected a finite number >= 0"),
    "distill.relation_warmup": ("-1", "got -1; expected at least 0"),
    "distill.temperature": ("0", "got 0.0; expected a finite number above 0"),
    "distill.batch_weight": ("-1", "got -1.0; expected a finite number >= 0"),
    "distill.frame_weight": ("-1", "got -1.0; expected a finite number >= 0"),
    "distill.relation_features": ("motion", "got 'motion'; expected one of level, difference, centred, both"),
    "distill.decoupled": ("true", "without guidance there is nothing to decouple"),
    "distill.critic_mixing": ("1", "expected a number in [0, 1)"),
    "distill.diversity_weight": ("-1", "got -1.0; expected a finite number >= 0"),
    "distill.diversity_steps": ("[5,5]", "got (5, 5); expected 0 < k < n"),
    "teacher.updates": ("0", "got 0; expected at least 1"),
    "teacher.weights": ("3", "got 3; expected text"),
    "teacher.batch_size": ("0", "got 0; expected at least 1"),
    "teacher.micro_batch": ("0", "got 0; expected at least 1"),
    "teacher.shift": ("0", "got 0.0; expected a finite number above 0"),
    "teacher.lr": ("0", "got 0.0; expected a finite number above 0"),
    "teacher.warmup": ("-1", "got -1; expected at least 0"),
    "teacher.betas": ("[0.9]", "got 1 values; expected 2"),
    "teacher.weight_decay": ("-1", "got -1.0; expected a finite number >= 0"),
    "teacher.grad_clip": ("-1", "got -1.0; expected a finite number above 0"),
    "teacher.ema_decay": ("1.5", "expected a number in [0, 1)"),
    "teacher.max_nonfinite": ("0", "got 0; expected at least 1"),
    "teacher.drop_condition": ("2", "got 2.0; expected a share from 0 to 1"),
    "data.kind": ("videos", "got 'videos'; expected one of none, prompts, embeddings, latents, textures"),
    "data.path": ("prompts.txt", "got 'prompts.txt'; data of kind 'none' has none"),
    "data.embeddings": ("e", "got 'e'"),
    "data.zoom": ("0", "got 0.0; expected a finite number above 0"),
    "parallel.shard_size": ("0", "got 0; expected at least 1"),
    "parallel.context": ("0", "got 0; expected at least 1"),
    "parallel.compute": ("float16", "got 'float16'; expected one of bfloat16, float32"),
    "parallel.reshard": ("always", "got 'always'; expected true or false"),
    "parallel.offload_teacher": ("2", "got 2; expected true or false"),
    "parallel.timeout_minutes": ("0", "got 0.0; expected a finite number above 0"),
    "parallel.threads": ("0", "got 0; expected at least 1"),
    "checkpoint.every": ("0", "got 0; expected at least 1"),
    "checkpoint.keep_last": ("0", "got 0; expected at least 1"),
    "watch.every": ("-1", "got -1; expected at least 0"),
    "watch.band": ("[1.0,2.0]", "got (1.0, 2.0); expected a number in (0, 1) and a finite one above 1"),
    "watch.stop_on": ("stop", "got 'stop'; expected one of nothing, end, rollback"),
    "log.every": ("0", "got 0; expected at least 1"),
    "log.preview_every": ("-1", "got -1; expected at least 0"),
    "log.preview_prompts": ("a cat", "got 'a cat'; expected a list"),
    "log.preview_samples": ("0", "got 0; expected at least 1"),
    "log.fps": ("0", "got 0; expected at least 1"),
    "log.tracker": ("maybe", "got 'maybe'; expected one of tensorboard, wandb, mlflow, none"),
    "log.peak_tflops": ("0", "got 0.0; expected a finite number above 0"),
}
WRONG_OF_MODEL = {
    "toy": {
        **dict.fromkeys(("frames", "channels", "width", "blocks"), ("0", "got 0; expected a positive integer")),
        "frequencies": ("1.5", "got 1.5; expected an integer"),
        "weights": ("''", "not given; expected the path of a ToyDenoiser file"),
    },
    "wan": {
        "weights": ("''", "not given; expected a diffusers folder, a weight file"),
        "entry": ("3", "got 3; expected text"),
        "expert": ("both", "got 'both'; expected one of '', high, low"),
        "config": ("''", "not given; random weights need one of 1.3b, 14b, i2v_14b, ti2v_5b, tiny"),
        **dict.fromkeys(("frames", "height", "width"), ("0", "got 0; expected a positive number of latent cells")),
        "compute": ("float16", "got 'float16'; expected one of bfloat16, float32"),
        "storage": ("int8", "got 'int8'; expected one of float32, bfloat16"),
        "attention": ("3", "got 3; expected text"),
        "gradient_checkpointing": ("1", "got 1; expected true or false"),
        "compile": ("1", "got 1; expected true or false"),
        "text_encoder": ("3", "got 3; expected text"),
        "null_embedding": ("3", "got 3; expected text"),
        "negative_prompt": ("3", "got 3; expected text"),
        "vae": ("3", "got 3; expected text"),
        "image_encoder": ("3", "got 3; expected text"),
        "from_image": ("3", "got 3; expected true or false"),
    },
}


def options(kind, where=""):
    """Dotted names of all options of a dataclass but those of the model."""
    for field, annotation in get_type_hints(kind).items():
        section = next((a for a in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(a)), None)
        if field == "model":
            continue
        if section is None:
            yield f"{where}{field}"
        else:
            yield from options(section, f"{where}{field}.")


def test_no_option_is_without_a_wrong_value():
    assert set(options(RunConfig)) == set(WRONG)
    assert {f.name for f in dataclasses.fields(LoraOptions)} <= {name.removeprefix("lora.") for name in WRONG}
    assert set(models.REGISTRY) == set(WRONG_OF_MODEL)
    for name, wrong in WRONG_OF_MODEL.items():
        assert {field.name for field in dataclasses.fields(models.options_class(name))} == set(wrong)


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_value_is_refused_with_the_name_of_its_option_and_what_is_allowed(option):
    value, message = WRONG[option]
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_config("toy", [f"{option}={value}"])
    assert str(error.value).startswith(option)


@pytest.mark.parametrize(
    ("model", "option"), [(model, option) for model, wrong in WRONG_OF_MODEL.items() for option in wrong]
)
def test_a_wrong_value_of_a_model_is_refused_with_the_name_of_its_option(model, option):
    value, message = WRONG_OF_MODEL[model][option]
    source, given = ("toy", []) if model == "toy" else ("wan_tiny", ["data.path=p"])
    with pytest.raises(ConfigError, match=re.escape(f"model.{option}: {message}")):
        read_config(source, [*given, f"model.{option}={value}"])


# The command line


@pytest.mark.parametrize(
    "line",
    [
        "toy seed=3 distill.micro_batch=16 --dry-run",
        "toy seed=3 --dry-run distill.micro_batch=16",
        "--dry-run toy seed=3 distill.micro_batch=16",
        "seed=3 --dry-run toy distill.micro_batch=16",
        "seed=3 distill.micro_batch=16 toy --dry-run",
        "seed=3 distill.micro_batch=16 --dry-run toy",
    ],
)
def test_configuration_overrides_and_options_stand_in_any_order(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = []
    monkeypatch.setattr(
        "codmd.distill.config.run_config.read_config", lambda *a, **k: read.append(read_config(*a, **k)) or read[0]
    )
    assert cli.main(["train", *line.split()]) == 0
    assert (read[0].seed, read[0].distill.micro_batch) == (3, 16)
    assert "200 updates of 64 samples, 1 x 16 x 4" in capsys.readouterr().out


def test_the_last_of_two_overrides_counts_whatever_stands_between():
    args = cli.build_parser().parse_args(["train", "toy", "seed=1", "--plan", "seed=2"])
    assert args.plan
    assert (args.config, args.overrides) == ("toy", ["seed=1", "seed=2"])
    assert read_config(args.config, args.overrides).seed == 2


def test_a_file_may_be_called_like_an_override(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.yaml").write_text("out: x\nmodel: {name: toy, weights: random}\n")
    assert train_command.config_first(["seed=3", "lr=1.yaml", "toy=4"]) == ("lr=1.yaml", ["seed=3", "toy=4"])


def status_of(line):
    try:
        return cli.main(line)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("--dry-run", 2, "the following arguments are required: CONFIG"),
        ("out=x --dry-run", 1, "out=x: no such file, nor a packaged configuration; expected one of textures_tiny"),
        ("toy --dry-run seed", 1, "override: got 'seed'; expected key=value"),
        ("toy --dry-run sed=1", 1, "sed: unknown; did you mean seed?"),
        ("toy --dryrun seed=1", 2, "no such option: --dryrun; did you mean --dry-run?"),
        ("toy --dry-run seed=1 --plan", 2, "argument --plan: not allowed with argument --dry-run"),
        ("toy --dry-run=yes seed=1", 2, "argument --dry-run: ignored explicit argument 'yes'"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused(line, status, message, capsys):
    assert status_of(["train", *line.split()]) == status
    assert message in capsys.readouterr().err
