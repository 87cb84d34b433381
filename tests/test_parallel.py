"""Several processes do what one does: the same losses, and checkpoints that any number of them continues."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from process_runs import LOSSES, assert_same_curve, assert_same_student, curve, torchrun, write_embeddings
from train_cases import train
from workers import run_processes

from codmd.distill.config.sections import ParallelSettings
from codmd.distill.config.typed import ConfigError
from codmd.distill.run.parallel import processes
from codmd.distill.update.optimizer import GuardedAdamW, NonFiniteRun

TOY = ["toy", "model.frames=4", "model.channels=4", "model.width=32", "model.blocks=2", "distill.batch_size=8",
       "distill.student_lr=1e-3", "distill.critic_lr=1e-3", "distill.grad_clip=0.5", "distill.ema_decay=0.9",
       "distill.critic_updates=2", "log.every=1", "log.tracker=none"]  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The curve and the student of one process, six updates."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(*TOY, f"out={folder}", "updates=6", "checkpoint.every=4")
    return folder


def test_two_processes_have_the_losses_of_one_and_one_continues_their_checkpoint(one, tmp_path, capsys):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*TOY, f"out={tmp_path}", "updates=4", "checkpoint.every=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([*launcher, "-m", "codmd", "train", *options], env=environment, check=True)
    assert len(list((tmp_path / "checkpoints" / "step_00000004").glob("*.safetensors"))) == 2
    train(*TOY, f"out={tmp_path}", "updates=6")
    assert "saved by 2 processes, continued by 1" in capsys.readouterr().err
    assert_same_curve(curve(tmp_path), curve(one))
    assert_same_student(tmp_path, one)
    assert_same_student(tmp_path, one, ema=True)


def test_a_hybrid_mesh_has_the_losses_of_one_and_continues_its_checkpoint(one, tmp_path):
    train(*TOY, f"out={tmp_path}", "updates=2")
    printed = torchrun(tmp_path, 4, *TOY, "updates=6", "parallel.shard_size=2")  # two copies of two shards
    assert "saved by 1 processes, continued by 4" in printed
    assert printed.count("6/6 [") == 1, "the first process alone has a bar"
    assert_same_curve(curve(tmp_path), curve(one))
    assert_same_student(tmp_path, one)


def test_two_processes_relate_a_whole_accumulated_batch_as_one_does(tmp_path):
    common = [*TOY, "updates=3", "distill.relation_accumulate=true", "distill.relation_weight=2"]
    train(*common, f"out={tmp_path / 'one'}", "distill.micro_batch=4")
    torchrun(tmp_path / "two", 2, *common, "distill.micro_batch=2")
    assert_same_curve(curve(tmp_path / "two"), curve(tmp_path / "one"))
    apart = ["distill.relation_accumulate=false", "distill.micro_batch=4"]
    train(*common, f"out={tmp_path / 'apart'}", *apart)
    first, other = (curve(tmp_path / name)[2][LOSSES.index("relation_batch")] for name in ("one", "apart"))
    assert first != pytest.approx(other, rel=1e-3), "a relation of 8 samples is not the mean of two of 4"


def test_two_processes_train_a_sharded_wan_as_one_does_with_guidance_and_adapters(tmp_path):
    shards = write_embeddings(tmp_path / "embeddings")
    common = ["wan_tiny", f"data.path={shards}", "model.frames=2", "model.height=4", "model.width=4", "updates=2",
              "distill.critic_updates=2", "log.tracker=none"]  # fmt: skip
    for name, options in (("whole", []), ("lora", ["lora.rank=2", "lora.alpha=2"])):
        train(*common, *options, f"out={tmp_path / name}_one")
        torchrun(tmp_path / f"{name}_two", 2, *common, *options)
        assert_same_curve(curve(tmp_path / f"{name}_two"), curve(tmp_path / f"{name}_one"))


def disagree(rank, _world):
    """One process's loss is NaN, its gradients are not."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = GuardedAdamW("student", {"w": weight}, 0.1, (0.9, 0.99), 0.0, None, 2, dist.group.WORLD)
    for update in range(2):
        weight.grad = torch.ones(2)
        loss = torch.tensor(math.nan if rank == 1 else 1.0)
        if update == 0:
            assert optimizer.step(loss).skipped
        else:
            with pytest.raises(NonFiniteRun, match="2 updates of the student in a row"):
                optimizer.step(loss)
    assert torch.equal(weight, torch.ones(2))


def test_what_is_not_finite_on_one_process_is_skipped_on_all():
    run_processes(disagree, 2)


def test_a_shard_size_that_does_not_divide_the_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with (
        pytest.raises(ConfigError, match=r"parallel.shard_size: 3 does not divide 4 processes"),
        processes(ParallelSettings(shard_size=3)),
    ):
        pass


@pytest.mark.parametrize("threads", [1, 3, None])
def test_a_run_has_the_threads_that_its_settings_name_and_gives_them_back(threads):
    before = torch.get_num_threads()
    with processes(ParallelSettings(threads=threads)):
        assert torch.get_num_threads() == (threads or before)
    assert torch.get_num_threads() == before


def test_one_process_agrees_with_itself():
    with processes(ParallelSettings()) as team:
        assert (team.rank, team.size, team.group, team.mesh) == (0, 1, None, None)
        assert torch.equal(team.mean(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
        assert (team.share("x"), team.gather("x")) == ("x", ["x"])


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_gradients_are_reduced_in_float32_whatever_computes(monkeypatch, compute):
    given = []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda _, **options: given.append(options["mp_policy"]))
    with processes(ParallelSettings(compute=compute)) as team:
        team.policy(ParallelSettings(compute=compute)).shard(torch.nn.Linear(1, 1), SimpleNamespace(device_type="cuda"))
    assert [policy.reduce_dtype for policy in given] == [torch.float32]
    assert given[0].param_dtype is (torch.bfloat16 if compute == "bfloat16" else None)
