"""`codmd train` on several gloo processes, and what its runs are compared by."""

from __future__ import annotations

import json

import torch
from fresh import Command
from safetensors.torch import save_file

from codmd.distill.run.checkpoint import read_student
from codmd.distill.run.log import read_log

LOSSES = ("loss", "dmd", "relation_batch", "relation_frame", "critic", "student_grad_norm", "critic_grad_norm")


def torchrun(folder, count, *arguments):
    """The command on `count` gloo processes under torchrun's agent, its run in `folder`; returns what they printed."""
    command = Command(folder.with_name(f"{folder.name}.txt"), "train", *arguments, f"out={folder}", processes=count)
    assert command.finish() == 0, command.text()[-4000:]
    return command.text()


def curve(folder):
    return {line["update"]: [line[name] for name in LOSSES] for line in read_log(folder / "log.jsonl")}


def assert_same_curve(actual, expected):
    assert list(actual) == list(expected)
    torch.testing.assert_close(
        torch.tensor(list(actual.values())), torch.tensor(list(expected.values())), rtol=1e-5, atol=1e-5
    )


def assert_same_student(folder, other, ema=False):
    actual, expected = read_student(folder, ema), read_student(other, ema)
    assert set(actual) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-4, atol=1e-5)


def write_embeddings(folder):
    """Seven prompts in two files, as `codmd encode` writes them; returns the folder."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(exist_ok=True)
    for shard, rows in enumerate((3, 4)):
        embedding = torch.randn(rows, 1, 32, generator=generator)
        prompts = json.dumps([f"prompt {shard} {row}" for row in range(rows)])
        save_file({"embedding": embedding}, folder / f"{shard}.safetensors", metadata={"prompts": prompts})
    return folder
