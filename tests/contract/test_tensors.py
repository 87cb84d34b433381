"""Tensors that are not plain memory: right values, or a TypeError that names the argument and says what to call."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from dmd_cases import mask_of
from fresh import in_fresh_process
from interpreted import INTERPRETED
from losses import CODMD, DECOUPLED, LOSSES, RELATION, Calls, Found, Loss, assert_same, every_loss
from torch import Tensor

from codmd import backends, ops, reference
from codmd.ops.contract import Attention

pytestmark = pytest.mark.skipif(INTERPRETED, reason="what is refused never reaches a kernel")

SHAPE = (2, 4, 3, 5, 6)


class Kind(NamedTuple):
    """A way to hold the values of a plain tensor, and what the refusal must say."""

    make: Callable[[Tensor], Tensor]
    advice: str
    plain: Callable[[Tensor], Tensor] = lambda tensor: tensor
    axes: int = 1
    """The fewest that it can have."""


def distributed(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


ANY_CALL = r"\w+\("
KINDS = {
    "lazily negated": Kind(lambda v: torch.complex(v, -v).conj().imag, r"resolve_neg\(\)"),
    "zero of forward AD": Kind(lambda v: torch._efficientzerotensor(v.shape), "plain memory", torch.zeros_like),
    "dual": Kind(lambda v: forward_ad.make_dual(v, torch.ones_like(v)), ANY_CALL),
    "distributed": Kind(distributed, r"full_tensor\(\)"),
    "sparse": Kind(lambda v: v.to_sparse(), r"to_dense\(\)"),
    "mkldnn": Kind(lambda v: v.to_mkldnn(), r"to_dense\(\)"),
    "nested": Kind(lambda v: torch.nested.nested_tensor(list(v)), ANY_CALL),
    "jagged": Kind(lambda v: torch.nested.nested_tensor(list(v), layout=torch.jagged), ANY_CALL, axes=2),
    "quantised": Kind(quantised, r"dequantize\(\)"),
    "functional": Kind(torch._to_functional_tensor, "plain memory"),
    "view of a zero": Kind(lambda v: torch._efficientzerotensor((2, *v.shape))[1], "plain memory", torch.zeros_like),
    "view of a functional": Kind(lambda v: torch._to_functional_tensor(torch.stack([v, v])[1]), "plain memory"),
}
MASKS = ("sparse", "distributed")
"""Kinds that booleans have too."""


def every_tensor(loss: Loss) -> tuple[Tensor, dict[str, Any]]:
    """The student and every other argument that is a tensor."""
    if loss is RELATION:
        student, arguments = loss.inputs(SHAPE)
    else:
        student, arguments = loss.inputs(SHAPE, flow=True)
        arguments |= {"prediction": "flow", "sample_weight": torch.tensor([0.5, 2.0])}
        arguments["mask"] = mask_of("elements", student)
    if loss in (RELATION, CODMD):
        arguments["frame_mask"] = torch.arange(8).view(2, 4) % 4 > 0
    return student, arguments


def level(kind_name: str) -> AbstractContextManager:
    """Under a dual level every tensor is looked at; outside, the few attributes that tell a plain one."""
    return forward_ad.dual_level() if kind_name == "dual" else nullcontext()


def right_or_refused(number: int, backend: str, kind_name: str) -> None:
    torch.set_num_threads(1)
    loss, call, kind = LOSSES[number], Calls(backend), KINDS[kind_name]
    student, arguments = every_tensor(loss)
    tensors = {n: v for n, v in {"student": student, **arguments}.items() if isinstance(v, Tensor)}
    tensors = {n: v for n, v in tensors.items() if v.ndim >= kind.axes}
    for name in [n for n, v in tensors.items() if v.is_floating_point() or kind_name in MASKS]:
        others = {n: v for n, v in arguments.items() if n != name}
        refusal = ""
        with level(kind_name):
            try:
                found = call_with(call, loss, student, others, name, kind.make(tensors[name]))
            except TypeError as error:
                refusal = str(error)
        if refusal:
            assert re.search(rf"\b{name}\b.*{kind.advice}", refusal), refusal
        else:
            assert_same(found, call_with(call, loss, student, others, name, kind.plain(tensors[name])), 1e-6, 1e-6)


def call_with(call: Calls, loss: Loss, student: Tensor, others: dict[str, Any], name: str, value: Tensor) -> Found:
    return call(loss, value, others) if name == "student" else call(loss, student, {**others, name: value})


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", KINDS)
@every_loss
def test_a_tensor_that_is_no_plain_memory_is_right_or_refused(loss, kind, backend):
    if backends.load(backend)[0] is None:
        pytest.skip(f"{backend}: {backends.load(backend)[1]}")
    in_fresh_process(right_or_refused, LOSSES.index(loss), backend, kind)


def motion(student: Tensor, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
    return ops.relation_loss(student, real, fake, relation_features="centred", return_terms=True)


def decoupled(student: Tensor, **arguments: Any) -> tuple[Tensor]:
    return (ops.dmd_loss(student, **arguments),)


def matrix(latents: Tensor) -> tuple[Tensor]:
    return (ops.relation_matrix(latents),)


def other_operators() -> list[tuple[Callable[..., tuple[Tensor, ...]], dict[str, Any]]]:
    student, arguments = RELATION.inputs(SHAPE)
    leveled, levels = DECOUPLED.inputs(SHAPE)
    operands = torch.randn(6, 2, 3, 5, 8).unbind()  # views, all but the first with an offset
    return [
        (motion, {"student": student, **arguments}), (decoupled, {"student": leveled, **levels}),
        (matrix, {"latents": student}), (ops.attention_jvp, dict(zip(Attention._fields, operands, strict=True))),
    ]  # fmt: skip


def others_right_or_refused(kind_name: str) -> None:
    torch.set_num_threads(1)
    kind = KINDS[kind_name]
    for function, arguments in other_operators():
        for name in [name for name, value in arguments.items() if isinstance(value, Tensor)]:
            refusal = ""
            with level(kind_name):
                try:
                    found = function(**{**arguments, name: kind.make(arguments[name])})
                except TypeError as error:
                    refusal = str(error)
            if refusal:
                assert re.search(rf"\b{name}\b.*{kind.advice}", refusal), refusal
            else:
                expected = function(**{**arguments, name: kind.plain(arguments[name])})
                for value, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(value, other)


@pytest.mark.parametrize("kind", KINDS)
def test_so_it_is_in_every_other_operator(kind):
    in_fresh_process(others_right_or_refused, kind)


@every_loss
def test_parameters_are_tensors(loss, call: Calls):
    student, arguments = loss.inputs(SHAPE)
    fixed = {n: torch.nn.Parameter(v, False) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    assert_same(call(loss, torch.nn.Parameter(student), fixed), call(loss, student, arguments))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(x[None]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("terms", [False, True], ids=["total", "terms"])
@every_loss
def test_transforms_of_functions_are_refused_in_our_own_words(loss, terms, transform):
    student, arguments = loss.inputs(SHAPE)

    def value(x: Tensor) -> Tensor:
        return (loss.operator if terms else loss.alone)(x, **arguments)[-1]

    with pytest.raises(TypeError, match=r"do not support torch\.func transforms"):
        transform(value, student)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_the_other_operators_are_refused_or_right(transform):
    """Attention's are those of its forward mode; it has no backward pass."""
    *losses, (attention, operands) = other_operators()
    for function, arguments in losses:
        first = next(iter(arguments))
        with pytest.raises(TypeError, match=r"do not support torch\.func transforms"):
            transform(lambda x, f=function, given=arguments, n=first: f(**{**given, n: x})[-1].sum(), arguments[first])
    q, others = operands["q"], {name: value for name, value in operands.items() if name != "q"}
    expected = transform(lambda x: reference.attention_jvp(x, **others)[1].sum(), q)
    refusal = ""
    try:
        found = transform(lambda x: attention(x, **others)[1].sum(), q)
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if refusal:
        assert re.match("q (must be .* got a dual number|requires a gradient)", refusal), refusal
    else:
        torch.testing.assert_close(found, expected)
