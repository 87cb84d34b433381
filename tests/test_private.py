"""Private interfaces of PyTorch and Triton, and what serves without them give the same answers."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from plan_cases import wan
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from codmd import ops, private
from codmd.distill.plan.footprint import footprint, token_splits

PRIVATE = (
    "_are_functorch_transforms_active",
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_get_function_stack_at",
    "_storage_Use_Count",
)
CUDA = "_cuda_getCurrentRawStream", "_cuda_getDevice"
"""Absent where PyTorch is built for CPUs."""


@pytest.fixture
def without_private_interfaces(monkeypatch):
    """``codmd.private`` as a release of PyTorch without them would import it."""
    with monkeypatch.context() as lacking:
        for name in PRIVATE:
            lacking.delattr(torch._C, name)
        for name in CUDA:
            lacking.delattr(torch._C, name, raising=False)
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


def test_a_release_without_them_asks_the_public_functions_for_stream_and_device(
    without_private_interfaces, monkeypatch
):
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", {3: stream}.get)
    assert private.current_stream(3) == 7
    assert private.current_device is torch.cuda.current_device


def test_a_private_stream_and_device_come_first(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 10 + index, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3, raising=False)
    importlib.reload(private)
    assert (private.current_stream(1), private.current_device()) == (11, 3)
    monkeypatch.undo()
    importlib.reload(private)


def test_modes_transforms_and_dual_levels_are_seen():
    assert not private.modes_active()
    with TorchDispatchMode():
        assert private.modes_active()
    with torch.device("meta"):
        assert not private.modes_active()
        with TorchFunctionMode():
            assert private.modes_active()
    with TorchFunctionMode():
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


@pytest.mark.parametrize("lacking", [False, True])
def test_averages_move_alike_in_one_launch_and_one_by_one(lacking, monkeypatch):
    if lacking:
        monkeypatch.setattr(private, "_lerp_all", None)
    values, ends = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.full((3,), 5.0)]
    private.lerp_all(values, ends, 0.25)
    assert [value.tolist() for value in values] == [[0.25] * 2, [2.0] * 3]


def test_fake_tensors_have_no_memory_and_a_release_without_them_has_real_ones(monkeypatch):
    with private.fake_tensors():
        assert torch.empty(1 << 20, 1 << 20).data_ptr() == 0
    monkeypatch.setitem(sys.modules, "torch._subclasses.fake_tensor", None)
    with private.fake_tensors():
        assert torch.zeros(2).tolist() == [0, 0]


def test_processes_without_numbers_are_joined_and_a_release_without_them_plans_for_one(monkeypatch, tmp_path):
    with private.one_of(4) as joined:
        assert joined
        assert dist.get_world_size() == 4
    assert not dist.is_initialized()
    assert token_splits(wan(tmp_path, 2)) == [1, 2, 4]
    monkeypatch.setitem(sys.modules, "torch.testing._internal.distributed.fake_pg", None)
    assert token_splits(wan(tmp_path, 2)) == [1]
    with pytest.raises(ValueError, match="cannot plan for it"):
        footprint(wan(tmp_path, 2), 1, 1, context=2)


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


class Compiled:
    """A ``CompiledKernel`` of Triton whose launches are written down; ``missing`` attributes of it and its launcher."""

    def __init__(self, scratch: int = 0, missing: str = ""):
        self.calls: list[tuple] = []
        self.function, self.packed_metadata = "function", "metadata"
        self.run = Runner(self.calls, scratch)
        if missing:
            delattr(self if hasattr(self, missing) else self.run, missing)

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.calls.append(("public", grid, stream, arguments))


class Runner:
    def __init__(self, calls, scratch):
        self.calls = calls
        self.global_scratch_size, self.profile_scratch_size, self.gsan_enabled = 0, scratch, False
        self.launch_cooperative_grid, self.launch_pdl = False, True
        self.arg_annotations, self.kernel_signature = "annotations", "signature"
        self.launch = lambda *values: calls.append(("launch", *values))

    def __call__(self, *values):
        self.calls.append(("run", *values))


RUN = "run", 5, 1, 1, 9, "function", "metadata", None, None, None, "a", "b"
LAUNCHES = {
    "3.9": (
        {}, (3, 9),
        ("launch", 5, 1, 1, 9, "function", False, True, "metadata", *[None] * 5, "annotations", "signature",
         ("a", "b")),
    ),
    "scratch": ({"scratch": 64}, (3, 9), RUN),
    "a sanitizer that is not known": ({"missing": "gsan_enabled"}, (3, 9), RUN),
    "another release": ({}, (3, 8), RUN),
    "no metadata": ({"missing": "packed_metadata"}, (3, 9), ("public", (5, 1, 1), 9, ("a", "b"))),
}  # fmt: skip


@pytest.mark.parametrize("case", LAUNCHES)
def test_a_launch_takes_the_way_that_its_release_has(case):
    made, version, expected = LAUNCHES[case]
    compiled = Compiled(**made)
    private.launch_of(compiled, (5, 1, 1), version)(9, ("a", "b"))
    assert compiled.calls == [expected]


@pytest.mark.parametrize("chains", [True, False])
def test_hooks_of_a_profiler_are_seen(chains):
    enter, leave = (SimpleNamespace(calls=[]), SimpleNamespace(calls=[])) if chains else (None, None)
    knobs = SimpleNamespace(launch_enter_hook=enter, launch_exit_hook=leave)
    hooked = private.hooked_of(knobs)
    assert not hooked()
    if chains:
        leave.calls.append(print)
        assert hooked()
        leave.calls.clear()
    knobs.launch_enter_hook = print
    assert hooked()
    assert private.hooked_of(SimpleNamespace())()
