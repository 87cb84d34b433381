"""rCM and sCM on a Wan that is sharded over two processes, with recomputed blocks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from test_consistency import RECIPE, SETTINGS
from tiny_wan import LATENT, TEXT_DIM
from torch.distributed.device_mesh import init_device_mesh
from workers import run_processes

from codmd import models
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.update.methods import consistency_trainer
from codmd.models.sharding import ShardPolicy


def networks():
    torch.manual_seed(3)
    teacher = models.build("wan", weights="random", config="tiny", compute="float32", **LATENT)
    for parameter in teacher.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    student, critic = copy.deepcopy(teacher), copy.deepcopy(teacher)
    for parameter in critic.parameters():  # one that equals the teacher has no score to give
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    for model in (student, critic):
        model.enable_gradient_checkpointing()
    return teacher.requires_grad_(False), student, critic


def trainer_of(method, parts, group, roles):
    """On these rows of two samples of data."""
    generator = torch.Generator().manual_seed(4)
    x0 = torch.randn(2, *roles[0].latent_shape, generator=generator)[parts]
    cond = torch.randn(2, 5, TEXT_DIM, generator=generator)[parts]
    recipe = DistillConfig(
        method=method, consistency=SETTINGS, sigmas=RECIPE.sigmas, batch_size=2, convention="rcm",
        relation_weight=0.0, critic_updates=1, share_rollout=False,
    )  # fmt: skip
    return consistency_trainer(*roles, recipe, 0, group, itertools.repeat((x0, cond)), itertools.repeat(cond))


def _sharded(rank, world, alone):
    for method, norm in alone.items():
        roles = networks()
        mesh = init_device_mesh("cpu", (world,))
        for model in roles:
            model.shard_blocks(mesh, ShardPolicy(param_dtype=None))
        log = trainer_of(method, slice(rank, rank + 1), dist.group.WORLD, roles).cycle()
        # Terms are sums over a process's samples, and processes are averaged.
        assert float(log.student.grad_norm) == pytest.approx(norm / world, rel=1e-4)
        assert not log.student.skipped
        assert (log.critic_step is None) == (method == "scm")


def test_two_processes_have_the_gradient_of_one():
    alone = {}
    for method in ("scm", "rcm"):
        log = trainer_of(method, slice(None), None, networks()).cycle()
        alone[method] = float(log.student.grad_norm)
    assert alone["scm"] != alone["rcm"]
    run_processes(_sharded, 2, alone)
