"""Files from somebody else: no code in them runs, whichever file it stands in, and what is damaged is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from tiny_wan import write_pipeline
from train_cases import ALONE, QUIET, TOY, train

from codmd import cli
from codmd.distill.run.checkpoint import load, read_student, tensors_of
from codmd.distill.run.integrity import CheckpointError, sums
from codmd.models.tensor_files import open_tensors


class Payload:
    """A pickle of it calls `os.mkdir` on the file that shows that it ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.fixture
def payload(tmp_path):
    return Payload(tmp_path / "it_ran")


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path):
    yield
    assert not (tmp_path / "it_ran").exists()


def refused(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


@contextmanager
def naming(path):
    """Any error inside the block names the file."""
    try:
        yield
    except Exception as error:
        raise error if str(path) in str(error) else AssertionError(f"does not name {path}: {error!r}") from error


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


# Checkpoints of a run


def tensors():
    return {"student.weight": torch.arange(6.0).view(3, 2), "random.noise": torch.arange(9, dtype=torch.uint8)}


def seal(folder):
    """`meta.json` as its author would write it: the sums are right whatever the files hold."""
    meta = json.loads((folder / "meta.json").read_text())
    files = [file for file in folder.iterdir() if file.name != "meta.json"]
    (folder / "meta.json").write_text(json.dumps({**meta, "files": sums(files)}))


@pytest.fixture
def run(tmp_path):
    """A finished run with one checkpoint."""
    train(*TOY, QUIET, f"out={tmp_path / 'run'}", "updates=2", "checkpoint.every=2")
    return tmp_path / "run"


@pytest.fixture
def old_checkpoint(run):
    """The same checkpoint in the format before safetensors, which had a pickled index."""
    folder = run / "checkpoints" / "step_00000002"
    content = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in tensors_of(folder).items()}
    load(folder, content, ALONE)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["tensors"]
    (folder / "meta.json").write_text(json.dumps(meta))
    seal(folder)
    return folder


def test_a_checkpoint_of_today_holds_no_pickle(run):
    (folder,) = (run / "checkpoints").iterdir()
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}


def test_an_old_checkpoint_is_read_exactly_and_continued(old_checkpoint, run, capsys):
    weights = read_student(old_checkpoint)
    train(*TOY, QUIET, f"out={run}", "updates=4", "checkpoint.every=2")
    assert f"continuing from {old_checkpoint}" in capsys.readouterr().err
    train(*TOY, QUIET, f"out={run.with_name('straight')}", "updates=2", "checkpoint.every=2")
    straight = read_student(run.with_name("straight"))
    assert all(torch.equal(weights[name], weight) for name, weight in straight.items())


def plant(folder, payload):
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = payload
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    seal(folder)


COMMANDS = {
    "convert": lambda run, out: ["convert", run, out],
    "sample": lambda run, out: ["sample", run, "--out", out, "--prompts", prompts_file(out)],
    "resume": lambda run, out: ["train", *TOY, QUIET, f"out={out}", f"resume={run}"],
}


def prompts_file(out):
    path = out.with_suffix(".txt")
    path.write_text("a fox\n")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_the_index_of_an_old_checkpoint_is_refused_by_name(
    old_checkpoint, run, tmp_path, payload, capsys, command
):
    plant(old_checkpoint, payload)
    message = refused(capsys, *COMMANDS[command](run, tmp_path / "out"))
    assert str(old_checkpoint / ".metadata") in message
    assert "it would call" in message
    assert "mkdir" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_code_beside_the_shards_of_todays_checkpoint_is_refused_by_name(run, tmp_path, payload, capsys, command):
    (folder,) = (run / "checkpoints").iterdir()
    (folder / ".metadata").write_bytes(pickle.dumps(payload))
    seal(folder)
    message = refused(capsys, *COMMANDS[command](run, tmp_path / "out"))
    assert str(folder) in message
    assert ".metadata" in message


def test_an_index_that_points_out_of_its_folder_is_refused(old_checkpoint):
    index = pickle.loads((old_checkpoint / ".metadata").read_bytes())
    for entry in index.storage_data.values():
        entry.relative_path = "../../elsewhere.distcp"
    (old_checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    seal(old_checkpoint)
    with pytest.raises(CheckpointError, match=r"points to '../../elsewhere.distcp', outside its folder"):
        read_student(old_checkpoint)


def test_code_in_the_data_of_an_old_checkpoint_is_refused_by_name(old_checkpoint, payload):
    index = pickle.loads((old_checkpoint / ".metadata").read_bytes())
    evil = torch_bytes(payload)
    for entry in index.storage_data.values():
        entry.offset, entry.length = 0, len(evil)
    (old_checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    (old_checkpoint / "__0_0.distcp").write_bytes(evil)
    seal(old_checkpoint)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(old_checkpoint))} is not what its index says"):
        read_student(old_checkpoint)


def test_shards_whose_own_metadata_is_nonsense_are_refused_by_name(run):
    (folder,) = (run / "checkpoints").iterdir()
    (shard,) = folder.glob("*.safetensors")
    content = load_file(shard)
    for nonsense in ("[", "[" * 100_000, "[]", "{}", json.dumps({name: {"saved_offsets": "x"} for name in content})):
        save_file(content, shard, metadata={"DCP_SHARDING_INFO": nonsense})
        seal(folder)
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(folder))} is not what its index says"):
            read_student(folder)


def test_flipped_bytes_of_an_old_index_are_refused_by_name(old_checkpoint):
    path = old_checkpoint / ".metadata"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        seal(old_checkpoint)
        with suppress(CheckpointError), naming(path):
            tensors_of(old_checkpoint)


# Weight files


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_weight_file_is_refused_by_name(tmp_path, payload, capsys, suffix, zipped):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(torch_bytes({"generator": payload}, _use_new_zipfile_serialization=zipped))
    message = refused(capsys, "convert", "--codmd", path, tmp_path / "out")
    assert f"{path}: refused, because it carries code: loading it would call" in message
    assert "mkdir" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".npz", ".pkl"])
def test_code_in_a_file_that_should_be_something_else_is_refused_by_name(tmp_path, payload, capsys, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix in (".npy", ".npz"):
        np.save(path.with_suffix(".npy"), np.array([payload], dtype=object), allow_pickle=True)
        path.with_suffix(".npy").rename(path)
    else:
        path.write_bytes(pickle.dumps(payload))
    assert str(path) in refused(capsys, "convert", "--codmd", path, tmp_path / "out")


@pytest.mark.parametrize("zipped", [True, False])
def test_flipped_bytes_of_a_weight_file_are_an_error_that_names_it_or_harmless(tmp_path, zipped):
    state = {"generator": {f"layer.{i}.weight": torch.randn(3, i + 1) for i in range(4)}, "step": 7}
    content = torch_bytes(state, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "weights.pt"
    generator = np.random.default_rng(0)
    failures = 0
    for place in generator.choice(len(content), 400, replace=False):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        failures += 1
        with suppress(ValueError), naming(path), open_tensors(path) as file:
            for name in file:
                assert file[name].shape == file.shapes[name]
            failures -= 1
    assert failures > 40


# Text


def test_code_in_a_configuration_is_refused_by_name(tmp_path, payload, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"out: !!python/object/apply:os.mkdir ['{payload.proof}']\n")
    assert str(path) in refused(capsys, "train", path)


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoints/step_00000002/meta.json"])
def test_a_pickle_in_the_place_of_a_runs_text_is_named_and_not_run(run, payload, capsys, name):
    (run / name).write_bytes(pickle.dumps(payload))
    train(*TOY, QUIET, f"out={run}", "updates=3")
    assert str(run / name).removesuffix("/meta.json") in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.json"])
def test_a_pickle_in_the_place_of_prompts_is_refused_by_name(tmp_path, payload, capsys, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(payload))
    assert str(path) in refused(capsys, "encode", path, tmp_path / "out", "--text-encoder", tmp_path)


# Folders of a pipeline and of embeddings


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize(
    ("part", "single"),
    [("text_encoder", "pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin"), ("transformer", "x.bin")],
)
def test_code_in_a_part_of_a_pipeline_is_refused_by_name(pipeline, tmp_path, payload, capsys, part, single):
    folder = tmp_path / "pipeline"
    for file in pipeline.rglob("*"):
        target = folder / file.relative_to(pipeline)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            target.write_bytes(file.read_bytes())
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    (folder / part / single).write_bytes(torch_bytes(payload))
    arguments = ["sample", folder, "--teacher", "--steps", 1, "--out", tmp_path / "out", "--device", "cpu",
                 "--prompts", prompts_file(tmp_path / "out"), "--frames", 5, "--height", 32, "--width", 32]  # fmt: skip
    assert str(folder) in refused(capsys, *arguments)


def test_code_of_a_tokenizer_is_refused_by_name(pipeline, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "text_encoder").mkdir()
    (folder / "tokenizer" / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'it_ran')!r})\nclass T: pass\n")
    configuration = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(configuration))
    prompts = prompts_file(tmp_path / "out")
    assert str(folder) in refused(capsys, "encode", prompts, tmp_path / "out", "--text-encoder", folder)


def test_a_pickle_in_the_place_of_embeddings_is_refused_by_name(tmp_path, payload, capsys):
    shards = tmp_path / "embeddings"
    shards.mkdir()
    (shards / "00000.safetensors").write_bytes(pickle.dumps(payload))
    message = refused(capsys, "train", "wan_tiny", f"data.path={shards}", f"out={tmp_path / 'run'}")
    assert str(shards) in message
