"""Private interfaces of PyTorch and what serves without them give the same answers."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from codmd import ops, private

PRIVATE = (
    "_are_functorch_transforms_active",
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_storage_Use_Count",
)


@pytest.fixture
def without_private_interfaces(monkeypatch):
    """``codmd.private`` as a release of PyTorch without them would import it."""
    with monkeypatch.context() as lacking:
        for name in PRIVATE:
            lacking.delattr(torch._C, name)
        importlib.reload(private)
    yield
    importlib.reload(private)


def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, real, fake = (torch.randn(2, 3, 4, 5, 6, generator=generator) for _ in range(3))
    loss = ops.codmd_loss(student.requires_grad_(), real=real, fake=fake)
    loss.backward()
    return loss.detach(), student.grad


def test_a_release_without_them_gives_the_same_loss(without_private_interfaces):
    assert private.storage_owners is None
    assert private.modes_active()
    fallback = loss_and_gradient()
    importlib.reload(private)
    for found, expected in zip(fallback, loss_and_gradient(), strict=True):
        torch.testing.assert_close(found, expected)


def test_modes_transforms_and_dual_levels_are_seen():
    assert not private.modes_active()
    with TorchDispatchMode():
        assert private.modes_active()
    assert not private.transforms_active()
    assert torch.func.vmap(lambda x: x + int(private.transforms_active()))(torch.zeros(2)).tolist() == [1, 1]
    assert not private.dual_level_active()
    with forward_ad.dual_level():
        assert private.dual_level_active()


@pytest.mark.parametrize("lacking", [False, True])
def test_a_group_is_found_by_its_name(lacking, monkeypatch, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        if lacking:
            monkeypatch.setattr(private, "_resolve_group", None)
        assert private.group_of_name(private.name_of_group(group)) is group
    finally:
        dist.destroy_process_group()


def test_base_apply_is_apply():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    private.base_apply(Double)(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
