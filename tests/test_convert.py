"""`codmd convert`: checkpoints and released files become folders that diffusers loads, or nothing at all."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict

import pytest
import tiny_wan
import torch
from safetensors.torch import load_file, save_file
from test_weights import TINY, Payload, assert_equal, original_state, tiny_state
from tiny_wan import LATENT
from train_cases import QUIET, RECORD, TOY, train

from codmd import models
from codmd.cli import main
from codmd.distill.config.run_config import RunConfig
from codmd.distill.config.sections import ModelSettings
from codmd.distill.run.checkpoint import CheckpointStore, read_student
from codmd.distill.run.parallel import Processes
from codmd.models.lora import LoraOptions, LoraRoles
from codmd.models.toy import ToyConfig, ToyDenoiser
from codmd.models.wan.options import WanOptions

ALONE = Processes(0, 1, torch.device("cpu"), None, None)


def write_run(folder, weights="random", lora=None, model=None, step=7):
    """A run's folder with one checkpoint: student of `tiny_state(1)`, average of `tiny_state(2)`."""
    model = model or ModelSettings("wan", WanOptions(weights=str(weights), config="tiny", **LATENT))
    config = RunConfig(out=str(folder), model=model, lora=lora)
    tensors = {}
    if lora is None:
        for role, seed in (("student", 1), ("ema", 2), ("critic", 3)):
            tensors |= {f"{role}.transformer.{name}": value for name, value in tiny_state(seed).items()}
    else:
        roles = adapted(weights, lora)
        tensors = {f"student.{name}": value for name, value in roles.student.state_dict().items()}
    store = CheckpointStore(folder / "checkpoints", ALONE, 3, print)
    return store.save(step, tensors, {**RECORD, "config": config.as_mapping()})


def adapted(weights, lora):
    roles = LoraRoles(models.build("wan", weights=str(weights), compute="float32", **LATENT), lora)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in roles.student.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return roles


def loaded(folder):
    from diffusers import WanTransformer3DModel

    model, info = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return dict(model.state_dict())


@pytest.mark.parametrize(("options", "seed"), [([], 1), (["--ema"], 2)])
@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_a_checkpoint_becomes_a_folder_that_diffusers_loads(tmp_path, capsys, options, seed, named):
    checkpoint = write_run(tmp_path / "run")
    source = checkpoint if named == "checkpoint" else tmp_path / "run"
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    assert_equal(loaded(tmp_path / "out"), tiny_state(seed))
    assert "from_pretrained" in capsys.readouterr().out


@pytest.mark.parametrize("lora", [[], ["lora.rank=2"]])
def test_any_model_of_the_registry_is_written_as_its_own_save_does(tmp_path, capsys, lora):
    teacher = ToyDenoiser(ToyConfig(frames=4, channels=4, width=16, blocks=1))
    teacher.save(tmp_path / "toy.safetensors")
    train(*TOY, QUIET, f"model.weights={tmp_path / 'toy.safetensors'}", f"out={tmp_path / 'run'}", "updates=2", *lora)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    assert "ToyDenoiser.load" in capsys.readouterr().out
    written = ToyDenoiser.load(tmp_path / "out.safetensors")
    weights = dict(written.state_dict())
    assert any(not torch.equal(weights[name], value) for name, value in teacher.state_dict().items())
    if not lora:
        assert_equal(weights, read_student(tmp_path / "run"))


def test_the_adapters_of_a_checkpoint_are_merged_into_their_base(tmp_path):
    tiny_wan.write_transformer(tmp_path)
    lora = LoraOptions(rank=4, alpha=8)
    write_run(tmp_path / "run", tmp_path, lora)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    expected = adapted(tmp_path, lora).merged_state_dict("student")
    found = loaded(tmp_path / "out")
    for name, value in expected.items():
        torch.testing.assert_close(found[name.removeprefix("transformer.")], value, rtol=1e-6, atol=1e-7)


def lora_run(tmp_path):
    tiny_wan.write_transformer(tmp_path)
    lora = LoraOptions(rank=4, alpha=10)
    write_run(tmp_path / "run", tmp_path, lora)
    return lora


def test_the_adapter_alone_gives_diffusers_pipeline_the_outputs_of_the_merged_network(tmp_path, capsys):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    lora_run(tmp_path)
    for options, out in (([], "merged"), (["--adapter"], "adapter")):
        assert main(["convert", str(tmp_path / "run"), str(tmp_path / out), *options]) == 0
    assert "load it with WanPipeline.load_lora_weights" in capsys.readouterr().out

    merged, base = (WanTransformer3DModel.from_pretrained(tmp_path / name) for name in ("merged", "transformer"))
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(1, 16, 3, 4, 6, generator=generator), torch.tensor([700.0]))
    text = torch.randn(1, 5, tiny_wan.TEXT_DIM, generator=generator)

    def output(transformer):
        with torch.no_grad():
            return transformer(*inputs, text, return_dict=False)[0]

    plain = output(base)
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=base
    )
    pipeline.load_lora_weights(tmp_path / "adapter")
    assert not torch.allclose(output(merged), plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(output(base), output(merged), rtol=1e-4, atol=1e-5)


def test_an_adapter_is_written_in_another_dtype_and_only_where_there_is_one(tmp_path, capsys):
    lora_run(tmp_path)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter", "--dtype", "bfloat16"]) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}

    write_run(tmp_path / "whole")
    message = refused(capsys, tmp_path, tmp_path / "whole", tmp_path / "other", "--adapter")
    assert "was trained without lora; it has no adapter" in message
    assert "--adapter: only for a training checkpoint" in refused(
        capsys, tmp_path, "--codmd", path, tmp_path / "other", "--adapter"
    )
    train(*TOY, QUIET, f"out={tmp_path / 'toy'}", "updates=1", "lora.rank=2")
    message = refused(capsys, tmp_path, tmp_path / "toy", tmp_path / "other", "--adapter")
    assert "ToyDenoiser has no form for adapters alone" in message


def test_the_released_file_becomes_a_folder_that_diffusers_loads(tmp_path):
    torch.save({"generator": original_state("model."), "critic": {}}, tmp_path / "released.pt")
    assert main(["convert", "--codmd", str(tmp_path / "released.pt"), str(tmp_path / "out")]) == 0
    assert_equal(loaded(tmp_path / "out"), tiny_state())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in TINY} == TINY


def test_plain_wan_files_and_folders_convert_in_another_dtype(tmp_path):
    save_file(original_state(), tmp_path / "wan.safetensors")
    out = tmp_path / "out"
    assert main(["convert", "--codmd", str(tmp_path / "wan.safetensors"), str(out), "--dtype", "bfloat16"]) == 0
    written = load_file(out / "diffusion_pytorch_model.safetensors")
    assert_equal(written, {name: value.bfloat16() for name, value in tiny_state().items()})
    assert main(["convert", "--codmd", str(out), str(tmp_path / "again"), "--dtype", "float32"]) == 0
    assert_equal(loaded(tmp_path / "again"), {name: value.float() for name, value in written.items()})


def test_another_network_of_the_file_can_be_named(tmp_path):
    torch.save({"generator": original_state(), "generator_ema": tiny_state(5)}, tmp_path / "file.pt")
    command = ["convert", "--codmd", str(tmp_path / "file.pt"), str(tmp_path / "out"), "--network", "generator_ema"]
    assert main(command) == 0
    assert_equal(loaded(tmp_path / "out"), tiny_state(5))


def refused(capsys, tmp_path, *arguments):
    """The message of a conversion that must fail and leave nothing."""
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", *map(str, arguments)]) == 1
    assert sorted(tmp_path.rglob("*")) == before
    return capsys.readouterr().err


def test_bad_sources_are_refused_and_leave_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    torch.save({"generator": Payload(tmp_path / "payload-ran")}, tmp_path / "evil.pt")
    assert "evil.pt: refused, because it carries code" in refused(
        capsys, tmp_path, "--codmd", tmp_path / "evil.pt", out
    )
    (tmp_path / "cut.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:100])
    assert "cut.pt: truncated" in refused(capsys, tmp_path, "--codmd", tmp_path / "cut.pt", out)
    assert "absent.pt: no such file" in refused(capsys, tmp_path, "--codmd", tmp_path / "absent.pt", out)
    assert "absent: no such run" in refused(capsys, tmp_path, tmp_path / "absent", out)
    save_file(tiny_state(), tmp_path / "tiny.safetensors")
    message = refused(capsys, tmp_path, "--codmd", tmp_path / "tiny.safetensors", out, "--config", "14b")
    assert "does not fit the configuration" in message
    assert "shipped configuration 'tiny'" in message
    message = refused(capsys, tmp_path, "--codmd", tmp_path / "tiny.safetensors", out, "--config", "15b")
    assert "15b is no file; expected one of 1.3b, 14b, i2v_14b, ti2v_5b, tiny" in message
    (tmp_path / "nothing").mkdir()
    assert "nothing" in refused(capsys, tmp_path, tmp_path / "nothing", out)


def test_options_of_the_other_kind_of_source_are_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert "--config: only with --codmd" in refused(capsys, tmp_path, tmp_path, out, "--config", "tiny")
    assert "--network: only with --codmd" in refused(capsys, tmp_path, tmp_path, out, "--network", "critic")
    assert "--ema: only for a training checkpoint" in refused(capsys, tmp_path, "--codmd", tmp_path, out, "--ema")


def test_a_damaged_checkpoint_or_one_without_an_average_is_refused(tmp_path, capsys):
    checkpoint = write_run(tmp_path / "run")
    other = write_run(
        tmp_path / "other", "random", None, ModelSettings("toy", models.options_class("toy")(weights="random"))
    )
    assert "not the weights of a network of ToyConfig" in refused(capsys, tmp_path, other, tmp_path / "out")
    (shard,) = checkpoint.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "step_00000007" in refused(capsys, tmp_path, checkpoint, tmp_path / "out")
    meta = checkpoint / "meta.json"
    meta.write_text("{")
    assert "meta.json is damaged" in refused(capsys, tmp_path, checkpoint, tmp_path / "out")


def test_an_occupied_or_unwritable_place_is_refused(tmp_path, capsys):
    save_file(tiny_state(), tmp_path / "tiny.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    source = tmp_path / "tiny.safetensors"
    assert "exists already; give a new or empty folder" in refused(
        capsys, tmp_path, "--codmd", source, tmp_path / "out"
    )
    assert "mine" in refused(capsys, tmp_path, "--codmd", source, tmp_path / "out" / "mine" / "deeper")


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path):
    save_file(tiny_state(), tmp_path / "tiny.safetensors")

    def limit_files():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = subprocess.run(
        [sys.executable, "-m", "codmd", "convert", "--codmd", tmp_path / "tiny.safetensors", tmp_path / "out"],
        capture_output=True, text=True, preexec_fn=limit_files, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert os.strerror(27) in result.stderr, "EFBIG stands for every failure of a write"
    assert "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_options_survive_the_checkpoint():
    options = WanOptions(weights="x", **LATENT)
    assert WanOptions(**json.loads(json.dumps(asdict(options)))) == options
