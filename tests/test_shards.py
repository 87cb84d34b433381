"""Shards of a checkpoint: saved by two processes, read exactly by one, two and three."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from train_cases import ALONE, RECORD
from workers import run_processes

from codmd.distill.run.checkpoint import CheckpointStore, load, tensors_of
from codmd.distill.run.integrity import CheckpointError, read_meta
from codmd.distill.run.parallel import Processes

SHAPES = {"rows": (7, 3), "one_row": (1, 4), "columns": (2, 5, 3)}


def whole(zeros=False):
    """What a run keeps: weights, moments, a step of no dimension, a generator's bytes; the same on every process."""
    generator = torch.Generator().manual_seed(0)
    content = {f"student.{name}": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    content |= {f"student_optimizer.{name}.exp_avg": value.to(torch.bfloat16) for name, value in content.items()}
    content |= {"student_optimizer.step": torch.tensor(41.0), "random.noise": generator.get_state()}
    return {name: torch.zeros_like(value) for name, value in content.items()} if zeros else content


def laid_out(content, mesh):
    """Weights and moments sharded by their first dimension, the rest alike on every process."""
    return {
        name: distribute_tensor(value, mesh, [Shard(0) if value.dim() > 1 else Replicate()])
        if name.startswith("student") and value.dim() > 0
        else value
        for name, value in content.items()
    }


def team(world):
    mesh = init_device_mesh("cpu", (world,))
    return Processes(dist.get_rank(), world, torch.device("cpu"), dist.group.WORLD, mesh), mesh


def save_by(rank, world, folder):
    processes, mesh = team(world)
    store = CheckpointStore(Path(folder), processes, 1, pytest.fail)
    own = {f"random.rank_{rank:05d}.cpu": torch.full((4,), rank, dtype=torch.uint8)}
    store.save(1, {**laid_out(whole(), mesh), **own}, RECORD)


def load_by(rank, world, path):
    processes, mesh = team(world)
    found = laid_out(whole(zeros=True), mesh)
    load(Path(path), found, processes)
    for name, value in whole().items():
        full = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
        assert torch.equal(full, value), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_processes(save_by, 2, str(folder))
    return folder / "step_00000001"


def test_two_processes_write_a_file_each_and_one_index(saved):
    assert sorted(file.name for file in saved.iterdir()) == [
        "meta.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
    ]
    shapes = {name: (tuple(entry.shape), entry.dtype) for name, entry in tensors_of(saved).items()}
    expected = {name: (tuple(value.shape), value.dtype) for name, value in whole().items()}
    assert shapes == expected | {f"random.rank_{rank:05d}.cpu": ((4,), torch.uint8) for rank in range(2)}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_reads_them_exactly(saved, world):
    run_processes(load_by, world, str(saved))


def test_a_process_alone_reads_what_each_of_them_kept_for_itself(saved):
    own = {f"random.rank_{rank:05d}.cpu": torch.zeros(4, dtype=torch.uint8) for rank in range(2)}
    load(saved, own, ALONE)
    assert [value.tolist() for value in own.values()] == [[0] * 4, [1] * 4]


def test_a_shard_that_is_not_there_is_missed_though_the_others_are_whole(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard-00002.*: No such file"):
        CheckpointStore(tmp_path, ALONE, 1, pytest.fail).verify(tmp_path)
    with pytest.raises(CheckpointError, match="is not what its index says"):
        load(tmp_path, whole(zeros=True), ALONE)


def test_a_value_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path):
    store = CheckpointStore(tmp_path, ALONE, 1, pytest.fail)
    store.save(1, whole(), RECORD)
    with pytest.raises(TypeError, match=r"student.lr: got float; a checkpoint holds tensors alone"):
        store.save(2, {**whole(), "student.lr": 0.1}, RECORD)
    assert read_meta(store.newest())["step"] == 1
