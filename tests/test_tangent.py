"""Velocity and tangent of a network in one pass, whole or sharded, against ``torch.func.jvp``."""

from __future__ import annotations

import pytest
import torch
from cases import relative_error
from tiny_wan import LATENT, TEXT_DIM
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from workers import run_processes

from codmd import models
from codmd.distill.update.tangent import velocity_jvp
from codmd.models.lora import LoraOptions, LoraRoles
from codmd.models.sharding import ShardPolicy

BOUND = 1e-6


def network(**options):
    torch.manual_seed(3)
    given = {"weights": "random", "config": "tiny", "compute": "float32", **LATENT, **options}
    model = models.build("wan", **given)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(model):
    generator = torch.Generator().manual_seed(4)
    shape = (2, *model.latent_shape)
    x_t, x_dot = (torch.randn(shape, generator=generator) for _ in range(2))
    sigma, sigma_dot = torch.tensor([0.3, 0.9]), torch.tensor([0.2, -0.5])
    return x_t, sigma, x_dot, sigma_dot, torch.randn(2, 5, TEXT_DIM, generator=generator)


@pytest.fixture(scope="module")
def exact():
    return expected(network())


def expected(model):
    """By ``torch.func.jvp``, with PyTorch's differentiable attention and diffusers' own processors."""
    x_t, sigma, x_dot, sigma_dot, cond = inputs(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda x, s: model(x, s, cond), (x_t, sigma), (x_dot, sigma_dot))


def assert_agrees(model, exact):
    processors = dict(model.transformer.attn_processors)
    for found, true in zip(velocity_jvp(model, *inputs(model)), exact, strict=True):
        assert not found.requires_grad
        assert relative_error(found, true) < BOUND
    after = model.transformer.attn_processors
    assert all(after[name] is processor for name, processor in processors.items())


def test_wan_gives_velocity_and_tangent_of_the_transform(exact):
    model = network()
    assert exact[1].norm() > 0.1 * exact[0].norm()
    assert_agrees(model, exact)
    model.enable_gradient_checkpointing()
    assert_agrees(model, exact)
    x_t, sigma, _, _, cond = inputs(model)
    model(x_t, sigma, cond).square().mean().backward()  # an ordinary step afterwards


def test_an_adapter_s_student_has_a_tangent(exact):
    base = network()
    roles = LoraRoles(base, LoraOptions(rank=2))
    roles.initialise()
    with torch.no_grad():
        for factor in roles.student.trainable_parameters():
            factor.normal_(std=0.1)
    true = expected(roles.student)
    assert relative_error(true[1], exact[1]) > 0.01
    for found, value in zip(velocity_jvp(roles.student, *inputs(base)), true, strict=True):
        assert relative_error(found, value) < BOUND


def test_the_tangent_agrees_with_central_differences():
    model = network()
    x_t, sigma, x_dot, sigma_dot, cond = inputs(model)
    _, tangent = velocity_jvp(model, x_t, sigma, x_dot, sigma_dot, cond)
    h = 3e-4  # 0.15 of a timestep, whose embedding has a wave length of 6
    with torch.no_grad():
        ahead, behind = (model(x_t + s * x_dot, sigma + s * sigma_dot, cond) for s in (h, -h))
    assert relative_error((ahead - behind) / (2 * h), tangent) < 0.02


def test_bfloat16_is_as_close_as_its_own_output(exact):
    half = network(compute="bfloat16")
    found = velocity_jvp(half, *inputs(half))
    errors = [relative_error(value, true) for value, true in zip(found, exact, strict=True)]
    assert 1e-4 < errors[1] < 3 * errors[0]


def test_processors_are_restored_after_an_error():
    model = network()
    before = dict(model.transformer.attn_processors)
    with pytest.raises(RuntimeError, match="stop"), model.tangents():
        raise RuntimeError("stop")
    assert all(model.transformer.attn_processors[name] is one for name, one in before.items())


def _sharded(rank, world, exact):
    model = network()
    model.shard_blocks(init_device_mesh("cpu", (world,)), ShardPolicy(param_dtype=None))
    assert_agrees(model, exact)
    x_t, sigma, _, _, cond = inputs(model)
    model(x_t, sigma, cond).square().mean().backward()
    assert_agrees(model, exact)


@pytest.mark.parametrize("world", [1, 2])
def test_a_sharded_network_gives_the_same(world, exact):
    run_processes(_sharded, world, exact)
