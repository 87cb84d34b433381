"""Weights from files of unknown origin: exactly, safely and streamed, or an error that says what is wrong."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from codmd.models.wan.config import parameter_shapes, read_config
from codmd.models.wan.export import write_diffusers_folder
from codmd.models.wan.keys import diffusers_names, strip_prefixes
from codmd.models.wan.weights import fitting_config, open_wan

TINY = read_config("tiny")

# The original Wan code's names of one block and of everything around it.
ORIGINAL_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3.weight": "norm2.weight",
    "norm3.bias": "norm2.bias",
    "self_attn.q.weight": "attn1.to_q.weight",
    "self_attn.q.bias": "attn1.to_q.bias",
    "self_attn.k.weight": "attn1.to_k.weight",
    "self_attn.k.bias": "attn1.to_k.bias",
    "self_attn.v.weight": "attn1.to_v.weight",
    "self_attn.v.bias": "attn1.to_v.bias",
    "self_attn.o.weight": "attn1.to_out.0.weight",
    "self_attn.o.bias": "attn1.to_out.0.bias",
    "self_attn.norm_q.weight": "attn1.norm_q.weight",
    "self_attn.norm_k.weight": "attn1.norm_k.weight",
    "cross_attn.q.weight": "attn2.to_q.weight",
    "cross_attn.q.bias": "attn2.to_q.bias",
    "cross_attn.k.weight": "attn2.to_k.weight",
    "cross_attn.k.bias": "attn2.to_k.bias",
    "cross_attn.v.weight": "attn2.to_v.weight",
    "cross_attn.v.bias": "attn2.to_v.bias",
    "cross_attn.o.weight": "attn2.to_out.0.weight",
    "cross_attn.o.bias": "attn2.to_out.0.bias",
    "cross_attn.norm_q.weight": "attn2.norm_q.weight",
    "cross_attn.norm_k.weight": "attn2.norm_k.weight",
    "ffn.0.weight": "ffn.net.0.proj.weight",
    "ffn.0.bias": "ffn.net.0.proj.bias",
    "ffn.2.weight": "ffn.net.2.weight",
    "ffn.2.bias": "ffn.net.2.bias",
}
ORIGINAL = {
    "patch_embedding.weight": "patch_embedding.weight",
    "patch_embedding.bias": "patch_embedding.bias",
    **{
        f"{old}.{leaf}": f"condition_embedder.{new}.{leaf}"
        for leaf in ("weight", "bias")
        for old, new in {
            "text_embedding.0": "text_embedder.linear_1",
            "text_embedding.2": "text_embedder.linear_2",
            "time_embedding.0": "time_embedder.linear_1",
            "time_embedding.2": "time_embedder.linear_2",
            "time_projection.1": "time_proj",
        }.items()
    },
    "head.head.weight": "proj_out.weight",
    "head.head.bias": "proj_out.bias",
    "head.modulation": "scale_shift_table",
    **{f"blocks.{i}.{old}": f"blocks.{i}.{new}" for i in range(2) for old, new in ORIGINAL_BLOCK.items()},
}


def tiny_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(TINY).items()}


def original_state(prefix=""):
    state = tiny_state()
    return {prefix + old: state[new] for old, new in ORIGINAL.items()}


def read(path, **options):
    with open_wan(path, **options) as tensors:
        return {name: tensors[name].clone() for name in tensors}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Names


def test_the_original_naming_covers_every_weight():
    assert set(ORIGINAL.values()) == set(parameter_shapes(TINY))
    assert diffusers_names(ORIGINAL) == {new: old for old, new in ORIGINAL.items()}


def test_the_conversion_agrees_with_diffusers_own():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    theirs = convert_wan_transformer_to_diffusers(original_state())
    state = original_state()
    assert_equal({new: state[old] for new, old in diffusers_names(state).items()}, theirs)


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "module.model.", "model.diffusion_model.", "model._fsdp_wrapped_module.", "_orig_mod.", "module."],
)
def test_prefixes_of_wrappers_come_off(prefix):
    assert strip_prefixes(f"{prefix}blocks.0.self_attn.q.weight") == "blocks.0.self_attn.q.weight"
    inner = "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.modulation"
    assert strip_prefixes(inner) == "blocks.0.modulation"


# Reading


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("naming", [original_state, lambda prefix: {prefix + k: v for k, v in tiny_state().items()}])
def test_single_files_of_either_naming_give_the_same_weights(tmp_path, suffix, prefix, naming):
    path = tmp_path / f"weights{suffix}"
    state = naming(prefix)
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    assert_equal(read(path), tiny_state())
    assert fitting_config(path) == TINY


def test_the_released_layout_gives_its_generator_and_not_its_critic(tmp_path):
    critic = {"model." + old: torch.zeros_like(value) for old, value in original_state().items()}
    torch.save({"generator": original_state("model."), "critic": critic}, tmp_path / "released.pt")
    assert_equal(read(tmp_path / "released.pt"), tiny_state())
    assert all(value.abs().max() == 0 for value in read(tmp_path / "released.pt", network="critic").values())
    with pytest.raises(ValueError, match="has no network 'generator_ema'; it holds generator, critic"):
        read(tmp_path / "released.pt", network="generator_ema")


def test_old_torch_files_are_read_too(tmp_path):
    torch.save(original_state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_equal(read(tmp_path / "old.pt"), tiny_state())


def test_folders_in_one_file_or_in_shards_load_in_diffusers(tmp_path):
    from diffusers import WanTransformer3DModel

    state = tiny_state()
    for name, shard_bytes, files in (("one", 10**9, 1), ("shards", 150_000, None)):
        write_diffusers_folder(tmp_path / name, TINY, state, shard_bytes=shard_bytes)
        written = sorted((tmp_path / name).glob("*.safetensors"))
        assert len(written) == files if files else len(written) > 2
        model, info = WanTransformer3DModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_equal(dict(model.state_dict()), state)
        assert_equal(read(tmp_path / name), state)


def test_a_pipeline_folder_means_its_transformer(tmp_path):
    write_diffusers_folder(tmp_path / "transformer", TINY, tiny_state())
    assert_equal(read(tmp_path, config=read_config(tmp_path)), tiny_state())


def test_the_written_bytes_are_those_of_safetensors_own_reader(tmp_path):
    state = {name: value.bfloat16() if "ffn" in name else value for name, value in tiny_state().items()}
    write_diffusers_folder(tmp_path / "out", TINY, state)
    assert_equal(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), state)
    write_diffusers_folder(tmp_path / "bf16", TINY, state, dtype=torch.bfloat16)
    halved = load_file(tmp_path / "bf16" / "diffusion_pytorch_model.safetensors")
    assert_equal(halved, {name: value.bfloat16() for name, value in state.items()})


# Refusing


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "payload-ran"
    torch.save({"generator": original_state(), "extra": Payload(mark)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt: refused, because it carries code: loading it would call .*system"):
        read(tmp_path / "evil.pt")
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(tmp_path, suffix, share):
    path = tmp_path / f"cut{suffix}"
    torch.save(original_state(), path) if suffix == ".pt" else save_file(original_state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"cut{suffix}: truncated, or not a"):
        read(path)


def test_differences_are_counted_and_the_first_are_listed(tmp_path):
    state = tiny_state()
    state["blocks.0.attn1.to_q.weight"] = torch.zeros(3, 3)
    del state["proj_out.bias"], state["patch_embedding.weight"]
    state["extra.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError) as error:
        read(tmp_path / "odd.safetensors")
    message = str(error.value)
    assert "fits no shipped configuration; against the nearest, 'tiny'" in message
    assert "2 missing (patch_embedding.weight, proj_out.bias)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 of another shape (blocks.0.attn1.to_q.weight (3, 3), expected (48, 48))" in message


def test_the_wrong_configuration_is_named_with_the_right_one(tmp_path):
    save_file(tiny_state(), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="it is a Wan of the shipped configuration 'tiny'"):
        read(tmp_path / "tiny.safetensors", config=read_config("1.3b"))


def test_two_names_for_one_weight_are_refused(tmp_path):
    save_file({**tiny_state(), "model.proj_out.bias": torch.zeros(64)}, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match=r"twice.safetensors: .*proj_out.bias.* are the same weight"):
        read(tmp_path / "twice.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [({"step": 3}, "holds no tensors"), ([1, 2], "holds no tensors"), (torch.zeros(2), "holds no tensors")],
)
def test_a_file_without_a_network_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=rf"none.pt: {message}"):
        read(tmp_path / "none.pt")


def test_missing_and_unknown_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.pt: no such file"):
        read(tmp_path / "absent.pt")
    (tmp_path / "weights.gguf").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights.gguf: unknown kind of file; expected .safetensors"):
        read(tmp_path / "weights.gguf")
    with pytest.raises(FileNotFoundError, match=r"holds neither diffusion_pytorch_model.safetensors"):
        read(tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"proj_out.bias": "part-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"part-1.safetensors: missing, though .*index.json lists it"):
        read(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not a safetensors index"):
        read(tmp_path)


# Writing


def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path):
    state = tiny_state()
    state["proj_out.bias"][3] = float("nan")
    with pytest.raises(ValueError, match=r"proj_out.bias: holds NaN or infinity"):
        write_diffusers_folder(tmp_path / "out", TINY, state)
    for change, message in [
        ({"proj_out.bias": torch.zeros(2)}, "shape"),
        ({"proj_out.bias": torch.zeros(64).int()}, "dtype"),
    ]:
        with pytest.raises(ValueError, match=f"proj_out.bias: {message}"):
            write_diffusers_folder(tmp_path / "out", TINY, {**state, **change})
    del state["proj_out.bias"]
    with pytest.raises(ValueError, match=r"proj_out.bias: missing"):
        write_diffusers_folder(tmp_path / "out", TINY, state)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="exists already"):
        write_diffusers_folder(tmp_path / "out", TINY, tiny_state())
    assert [p.name for p in tmp_path.rglob("*.*")] == ["mine.txt"]


MEASURE = """
import resource, sys, torch
from codmd.models.wan.export import write_diffusers_folder
from codmd.models.wan.weights import open_wan
from codmd.models.wan.config import read_config, parameter_shapes
config = read_config(sys.argv[1])
parameter_shapes(config)
import diffusers
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
with open_wan(sys.argv[2], config) as tensors:
    write_diffusers_folder(sys.argv[3], config, tensors)
print(peak() - before)
"""


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_rewriting_a_network_needs_little_more_memory_than_its_file(tmp_path, suffix):
    config = {**TINY, "num_layers": 16, "num_attention_heads": 40, "ffn_dim": 960}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **config}))
    state = {f"model.{name}": torch.zeros(shape) for name, shape in parameter_shapes(config).items()}
    path = tmp_path / f"weights{suffix}"
    torch.save({"generator": state}, path) if suffix == ".pt" else save_file(state, path)
    size = path.stat().st_size
    assert size > 150e6
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "config.json", path, tmp_path / "out"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown = int(result.stdout)
    assert grown < 1.2 * size, f"{grown / size:.2f} of the file's size"
