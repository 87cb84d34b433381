"""Identity by content: other weights, embeddings or prompts under the same name are noticed, and refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_wan import PROMPTS, write_pipeline
from train_cases import QUIET, TOY, train

from codmd import cli
from codmd.distill.data.prompts import Embeddings, Prompts
from codmd.models.fingerprint import fingerprint
from codmd.models.tensor_files import open_tensors
from codmd.models.toy import ToyConfig, ToyDenoiser

BOTH = r"fingerprint [0-9a-f]{8}, then [0-9a-f]{8}"


def write_toy(path, seed):
    torch.manual_seed(seed)
    ToyDenoiser(ToyConfig(frames=4, channels=4, width=16, blocks=1)).save(path)


def refused(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert re.search(BOTH, message), message
    return message


@pytest.mark.parametrize("lora", [[], ["lora.rank=2"]])
def test_another_teacher_in_the_same_file_is_refused_on_resume(tmp_path, capsys, lora):
    teacher, run = tmp_path / "toy.safetensors", tmp_path / "run"
    write_toy(teacher, 0)
    command = ["train", *TOY, QUIET, f"model.weights={teacher}", f"out={run}", *lora]
    train(*command[1:], "updates=1")
    train(*command[1:], "updates=2")
    write_toy(teacher, 1)
    assert f"resume: teacher: {teacher} holds other content" in refused(capsys, *command, "updates=3")


def test_adapters_refuse_another_base_wherever_it_lies_and_a_whole_network_takes_it(tmp_path, capsys):
    first, second = (tmp_path / f"{seed}.safetensors" for seed in range(2))
    for seed, path in enumerate((first, second)):
        write_toy(path, seed)
    for name, lora in (("whole", []), ("adapters", ["lora.rank=2"])):
        command = ["train", *TOY, QUIET, f"out={tmp_path / name}", *lora]
        train(*command[1:], f"model.weights={first}", "updates=1")
        if not lora:
            train(*command[1:], f"model.weights={second}", "updates=2")
            assert "changed since: model.weights" in capsys.readouterr().err
        else:
            assert "adapters a run of their own" in refused(capsys, *command, f"model.weights={second}", "updates=2")


@pytest.mark.parametrize("command", ["convert", "sample"])
def test_adapters_are_merged_into_no_other_base(tmp_path, capsys, command):
    base, run, out = tmp_path / "toy.safetensors", tmp_path / "run", tmp_path / "out.safetensors"
    write_toy(base, 0)
    train(*TOY, QUIET, f"model.weights={base}", f"out={run}", "lora.rank=2", "updates=1")
    (tmp_path / "prompts.txt").write_text("a fox\n")
    prompts = tmp_path / "prompts.txt"
    arguments = {"convert": [run, out], "sample": [run, "--out", out, "--prompts", prompts, "--latents"]}[command]
    write_toy(base, 1)
    assert f"{base}: is not the base that the adapters of" in refused(capsys, command, *arguments)
    write_toy(base, 0)
    if command == "convert":
        assert cli.main(["convert", str(run), str(out)]) == 0


def test_the_base_of_adapters_is_the_frozen_network_not_the_students_weights(tmp_path):
    """`teacher_model` may name other weights than `model`; the adapters stand on those."""
    base, other = tmp_path / "base.safetensors", tmp_path / "other.safetensors"
    write_toy(base, 0)
    write_toy(other, 1)
    train(*TOY, QUIET, f"model.weights={other}", f"teacher_model.weights={base}", f"out={tmp_path / 'run'}",
          "lora.rank=2", "updates=1", "distill.student_lr=1e-30")  # fmt: skip
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    written, expected = (ToyDenoiser.load(path).state_dict() for path in (tmp_path / "out.safetensors", base))
    assert all(torch.allclose(written[name], value) for name, value in expected.items())


# Embeddings and prompts


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "embeddings"
    (folder / "negative").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(3, 2, 32, generator=generator)
    save_file({"embedding": embedding}, folder / "0.safetensors", metadata={"prompts": json.dumps(PROMPTS)})
    save_file({"embedding": embedding[:1] + 1}, folder / "negative" / "embedding.safetensors")
    return folder


def change(path, row=0, metadata=None):
    content = load_file(path)
    content["embedding"][row] += 1
    save_file(content, path, metadata=metadata)


@pytest.mark.parametrize("changed", ["data", "null_embedding"])
def test_other_embeddings_in_the_same_folder_are_refused_on_resume(shards, tmp_path, capsys, changed):
    command = ["train", "wan_tiny", f"data.path={shards}", f"model.null_embedding={shards}", "model.frames=2",
               "model.height=4", "model.width=4", f"out={tmp_path / 'run'}", "distill.critic_updates=1",
               QUIET]  # fmt: skip
    train(*command[1:], "updates=1")
    train(*command[1:], "updates=2")
    if changed == "data":
        change(shards / "0.safetensors", metadata={"prompts": json.dumps(PROMPTS)})
    else:
        change(shards / "negative" / "embedding.safetensors")
    assert f"resume: {changed}: {shards} holds other content" in refused(capsys, *command, "updates=3")


def test_prompts_are_told_apart_by_words_and_order(tmp_path):
    found = set()
    for number, text in enumerate(("a\nb\n", "b\na\n", "a\nc\n")):
        (tmp_path / f"{number}.txt").write_text(text)
        found.add(Prompts(tmp_path / f"{number}.txt").fingerprint())
    assert len(found) == 3


def test_a_prompt_with_another_embedding_is_not_mixed_into_a_folder_and_new_prompts_are(shards, tmp_path, capsys):
    pipeline, out = write_pipeline(tmp_path / "pipeline"), tmp_path / "out"
    command = ["sample", pipeline, "--sigmas", "1", "--frames", 5, "--height", 32, "--width", 32, "--latents",
               "--device", "cpu", "--out", out, "--prompts", shards]  # fmt: skip
    metadata = {"prompts": json.dumps([*PROMPTS[:2], "a new one"])}
    assert cli.main([str(argument) for argument in command]) == 0
    change(shards / "0.safetensors", 2, metadata)
    assert cli.main([str(argument) for argument in command]) == 0
    assert json.loads((out / "sampling.json").read_text())["prompts"] == {p: p for p in (*PROMPTS, "a new one")}
    change(shards / "0.safetensors", 1, metadata)
    assert cli.main([str(argument) for argument in command]) == 1
    message = capsys.readouterr().err
    assert "was sampled with other settings" in message
    assert f"embeddings.{PROMPTS[1]}" in message


# The fingerprint itself


def test_a_fingerprint_tells_names_shapes_dtypes_and_numbers_apart(tmp_path):
    weight = torch.randn(64, 48)
    others = [
        {"w": weight},
        {"v": weight},
        {"w": weight.view(48, 64)},
        {"w": weight.to(torch.float16)},
        {"w": weight, "b": torch.zeros(0)},
        {"w": weight.index_fill(0, torch.tensor([0]), 1.0)},
        {"w": weight.index_fill(0, torch.tensor([63]), 1.0)},
        {"w": weight + 1e-6},
    ]
    assert len({fingerprint(tensors) for tensors in others}) == len(others)
    save_file({"b": torch.tensor(3), "w": weight}, tmp_path / "file.safetensors")
    with open_tensors(tmp_path / "file.safetensors") as lazy:
        assert fingerprint(lazy) == fingerprint({"w": weight.clone(), "b": torch.tensor(3)})


def test_embeddings_have_a_fingerprint_a_prompt(shards):
    found = Embeddings(shards).fingerprints()
    assert [prompt for prompt, _ in found] == PROMPTS
    assert len({digest for _, digest in found}) == 3
