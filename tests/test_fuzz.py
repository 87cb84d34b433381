"""Every parser over files with random damage: an error of the documented kind that names the file, or a result."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from train_cases import RECORD

from codmd.distill.config.run_config import read_config
from codmd.distill.data.prompt_files import read_prompts
from codmd.distill.data.prompts import Embeddings
from codmd.distill.run.integrity import CheckpointError, read_meta
from codmd.distill.run.log import read_log
from codmd.models.embeddings import read_embedding
from codmd.models.tensor_files import open_tensors
from codmd.models.toy import ToyConfig, ToyDenoiser

ROUNDS = 150
PIECES = (
    b"\0",
    b"\xff",
    b"\n",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b":",
    b"null",
    b"true",
    b"1e999",
    b"-1",
    b"\\ud800",
    b",",
)


def damaged(content: bytes, dice: random.Random) -> bytes:
    """One to three random edits: a flipped bit, a cut, a piece put in, a stretch doubled or dropped."""
    for _ in range(dice.randint(1, 3)):
        place, end = sorted(dice.randint(0, len(content)) for _ in range(2))
        edit = dice.randrange(5)
        if edit == 0 and place < len(content):
            content = content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]
        elif edit == 1:
            content = content[:place]
        elif edit == 2:
            content = content[:place] + dice.choice(PIECES) + content[place:]
        elif edit == 3:
            content = content[:end] + content[place:end] + content[end:]
        else:
            content = content[:place] + content[end:]
    return content


def read_all(path):
    with open_tensors(path) as file:
        for name in file:
            assert file[name].shape == file.shapes[name]


def read_mark(path):
    return read_meta(path.parent)


def meta_text():
    meta = {**RECORD, "step": 4, "files": {"a": [1, 2]}, "tensors": {"w": ["float32", [2, 3]]}, "position": 3}
    return json.dumps({**meta, "nonfinite": {"student": [0, 0]}, "identity": {"data": ["x", "y"]}})


LOG = "".join(json.dumps({"update": update, "loss": 0.5}) + "\n" for update in range(5))
YAML = "out: runs/x\nmodel:\n  name: toy\n  weights: random\ndistill:\n  sigmas: [1.0, 0.5]\n  betas: [0.0, 0.9]\n"

# name: (file, content, reader, what it may raise)
PARSERS = {
    "prompts": ("p.txt", "a fox\ntwo boats\n", read_prompts, ValueError),
    "prompts as JSON": ("p.json", json.dumps(["a", {"prompt": "b"}]), read_prompts, ValueError),
    "prompts as lines of JSON": ("p.jsonl", '"a"\n{"prompt": "b"}\n', read_prompts, ValueError),
    "prompts as a table": ("p.csv", 'prompt,seed\n"a, b",1\nc,2\n', read_prompts, ValueError),
    "log": ("log.jsonl", LOG, read_log, ()),
    "mark of a checkpoint": ("step_00000004/meta.json", meta_text(), read_mark, CheckpointError),
    "configuration": ("run.yaml", YAML, lambda path: read_config(str(path)), ValueError),
    "weights": ("w.safetensors", None, read_all, ValueError),
    "weights as a PyTorch file": ("w.pt", None, read_all, ValueError),
    "an old PyTorch file": ("w.pth", None, read_all, ValueError),
    "the toy's weights": ("toy.safetensors", None, ToyDenoiser.load, ValueError),
    "an embedding": ("e.safetensors", None, read_embedding, ValueError),
    "shards of embeddings": ("folder/0.safetensors", None, lambda path: Embeddings(path.parent), ValueError),
}


def write(name, path):
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.zeros(3, dtype=torch.bfloat16)}
    if name == "weights":
        save_file(tensors, path)
    elif path.suffix in (".pt", ".pth"):
        torch.save({"generator": tensors}, path, _use_new_zipfile_serialization=path.suffix == ".pt")
    elif name == "the toy's weights":
        ToyDenoiser(ToyConfig(frames=2, channels=1, width=2, blocks=1, frequencies=1)).save(path)
    else:
        save_file({"embedding": torch.zeros(1, 2, 3)}, path, metadata={"prompts": '["a"]'})


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_of_damaged_files_raises_what_it_documents_and_names_the_file(tmp_path, name):
    file, content, reader, allowed = PARSERS[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if content is None:
        write(name, path)
    else:
        path.write_text(content)
    whole, refused = path.read_bytes(), []
    reader(path)

    @settings(max_examples=ROUNDS, deadline=None, derandomize=True, database=None)
    @given(st.randoms(use_true_random=False))
    def holds(dice):
        path.write_bytes(damaged(whole, dice))
        try:
            reader(path)
        except allowed as error:
            refused.append(error)
            if str(tmp_path) not in str(error) and name != "configuration":  # which names the key
                raise AssertionError(f"does not name {path}: {error!r}") from error

    holds()
    assert len(refused) > ROUNDS // 10 or not allowed
