"""Parts that other tools' files hold: read, or refused for what they are, and none dropped in silence."""

from __future__ import annotations

import json
import shutil

import imageio.v2 as imageio
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import TINY, original_state, tiny_state
from tiny_wan import PROMPTS, TEXT_DIM, write_pipeline, write_text_encoder, write_ti2v_pipeline

from codmd import cli, models
from codmd.models.tensor_files import INDEX
from codmd.models.wan.text import WanPromptEncoder
from codmd.sample.video import read_video

SIZE = ["--frames", "5", "--height", "32", "--width", "32"]


def status(*arguments):
    return cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    assert status(*arguments) == 1
    return capsys.readouterr().err


def everywhere(source, tmp_path):
    """The commands that read weights."""
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n")
    return {
        "convert": ["convert", "--codmd", source, tmp_path / "converted"],
        "sample": ["sample", source, "--sigmas", "1", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out",
                   "--latents", "--device", "cpu", "--compute", "float32", *SIZE],
        "train": ["train", "wan_tiny", f"model.weights={source}", "model.config=''", "data.kind=none", "data.path=''",
                  f"out={tmp_path / 'run'}", "--dry-run"],
    }  # fmt: skip


# Two experts


@pytest.mark.parametrize("command", ["convert", "sample", "train"])
@pytest.mark.parametrize("named", ["transformer", "transformer_2"])
def test_one_of_two_experts_is_not_taken_for_all_levels(tmp_path, capsys, command, named):
    folder = write_pipeline(tmp_path / "pipeline")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    message = refused(capsys, *everywhere(folder / named, tmp_path)[command])
    assert f"{folder}: holds two experts, transformer for high noise and transformer_2 for low" in message


# Sizes of another VAE


def test_the_size_of_a_video_comes_from_the_models_own_vae(tmp_path):
    """As Wan2.2-TI2V-5B: 48 latent channels, 16 pixels a cell, 24 frames a second."""
    folder = write_ti2v_pipeline(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n")
    command = ["sample", folder, "--sigmas", "1", "--prompts", tmp_path / "prompts.txt", "--device", "cpu",
               "--frames", 5, "--height", 64, "--width", 96]  # fmt: skip
    assert status(*command, "--out", tmp_path / "out") == 0
    (video,) = (tmp_path / "out" / "videos").iterdir()
    assert read_video(video).shape == (5, 64, 96, 3)
    assert imageio.get_reader(video).get_meta_data()["fps"] == 24
    assert status(*command, "--out", tmp_path / "latents", "--latents") == 0
    (latents,) = (tmp_path / "latents" / "latents").iterdir()
    assert load_file(latents)["latents"].shape == (2, 48, 4, 6)


def test_latents_that_no_published_vae_decodes_keep_their_size(tmp_path):
    """As those of textures, which are pixels rearranged."""
    (tmp_path / "network.json").write_text(
        json.dumps({**TINY, "_class_name": "WanTransformer3DModel", "in_channels": 12, "out_channels": 12})
    )
    options = models.read_options("wan", weights="random", config=str(tmp_path / "network.json"))
    assert options.for_video(None, None, None) == options
    with pytest.raises(ValueError, match="vae: not given, and no published one has latents of 12 channels"):
        options.for_video(5, None, None)


def test_a_vae_of_other_latents_is_refused(tmp_path, capsys):
    folder = write_pipeline(tmp_path / "pipeline")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "z_dim": 48}))
    message = refused(capsys, *everywhere(folder, tmp_path)["sample"])
    assert "has latents of 48 channels; the network has 16" in message


# Files that are no network


LORAS = {
    "kohya's names": ["lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.alpha"],
    "PEFT's names": ["base_model.model.blocks.0.attn1.to_q.lora_A.weight"],
    "diffusers' names": ["transformer.blocks.0.attn1.to_q.lora_A.weight"],
    "LyCORIS": ["diffusion_model.blocks.0.self_attn.q.lokr_w1"],
}


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("command", ["convert", "sample", "train"])
def test_a_lora_is_named_with_its_kind(tmp_path, capsys, kind, command):
    path = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(2, 2) for name in LORAS[kind]}, path)
    message = refused(capsys, *everywhere(path, tmp_path)[command])
    assert f"{path}: is a LoRA ({kind}), not a network" in message


@pytest.mark.parametrize("scale", ["blocks.0.attn1.to_q.scale_weight", "scaled_fp8", "proj_out.weight_scale_inv"])
@pytest.mark.parametrize("command", ["convert", "sample"])
def test_scaled_8_bit_weights_are_refused_as_such(tmp_path, capsys, scale, command):
    path = tmp_path / "fp8.safetensors"
    save_file(
        {name: value.to(torch.float8_e4m3fn) for name, value in tiny_state().items()} | {scale: torch.ones(1)}, path
    )
    message = refused(capsys, *everywhere(path, tmp_path)[command])
    assert f"{path}: holds scaled 8-bit weights (as {scale!r} shows); expected bfloat16, float16 or float32" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_sample_and_convert_read_plain_8_bit_weights_exactly_alike(tmp_path, dtype):
    folder = write_pipeline(tmp_path / "pipeline")
    path = tmp_path / "fp8.safetensors"
    small = {
        name: (value / 8).to(dtype) for name, value in load_file(next((folder / "transformer").glob("*.s*"))).items()
    }
    save_file(small, path)
    assert status(*everywhere(path, tmp_path)["convert"]) == 0
    written = load_file(tmp_path / "converted" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name].float(), value.float()) for name, value in small.items())

    videos = []
    for source in (path, tmp_path / "converted"):
        out = tmp_path / f"of_{source.name}"
        command = everywhere(source, tmp_path)["sample"]
        command[command.index(tmp_path / "out")] = out
        assert status(*command, "--text-encoder", folder) == 0
        (latents,) = (out / "latents").iterdir()
        videos.append(load_file(latents)["latents"])
    assert torch.equal(*videos)


# Files that hold a network somewhere


@pytest.mark.parametrize(
    "content",
    [
        lambda state: {"generator": state, "step": torch.tensor(7)},
        lambda state: {"step": torch.tensor(7), "model": {"ema": torch.tensor(1.0), "state_dict": state}},
        lambda state: {"ema": state},
        lambda state: {"ema": state, "optimizer": {"lr": 1.0}},
        lambda state: {f"net.{name}": value for name, value in state.items()},
    ],
)
def test_a_network_is_found_whatever_stands_beside_it(tmp_path, content):
    torch.save(content(original_state()), tmp_path / "file.pt")
    assert status(*everywhere(tmp_path / "file.pt", tmp_path)["convert"]) == 0
    written = load_file(tmp_path / "converted" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in tiny_state().items())


@pytest.fixture
def sharded(tmp_path):
    """A network in two files and their index, without a config.json."""
    state, folder = tiny_state(), tmp_path / "sharded"
    folder.mkdir()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder / INDEX


def test_the_path_of_an_index_is_read_as_its_shards(sharded, tmp_path):
    assert status(*everywhere(sharded, tmp_path)["convert"]) == 0
    written = load_file(tmp_path / "converted" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in tiny_state().items())


def test_an_index_lists_files_beside_it_alone(sharded, tmp_path, capsys):
    sharded.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    message = refused(capsys, *everywhere(sharded, tmp_path)["convert"])
    assert f"{sharded}: lists '../a.safetensors'; expected files beside it" in message


# Prompts


def test_a_prompt_that_is_cut_is_named_with_its_number_and_length(tmp_path, capsys):
    folder, prompts = tmp_path / "pipeline", tmp_path / "prompts.txt"
    write_text_encoder(folder)
    prompts.write_text(f"{PROMPTS[0]}\n{'fox ' * 600}\n")
    assert status("encode", prompts, tmp_path / "out", "--text-encoder", folder, "--device", "cpu") == 0
    printed = capsys.readouterr().err
    assert "prompt 2: 601 tokens, of which the first 512 are read" in printed
    assert "prompt 1:" not in printed


def test_a_prompt_that_is_cut_elsewhere_is_a_warning_that_quotes_it(tmp_path):
    write_text_encoder(tmp_path)
    encoder = WanPromptEncoder.load(tmp_path, "cpu", torch.float32)
    with pytest.warns(UserWarning, match="a prompt has 601 tokens, of which the first 512 are read: 'fox fox"):
        assert encoder(["fox " * 600]).shape == (1, 512, TEXT_DIM)
