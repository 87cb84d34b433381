"""`torch.compile` in fresh processes: the first call compiled, real code from Inductor, and numbers on a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fresh import in_fresh_process
from interpreted import INTERPRETED
from losses import CODMD, DMD, LOSSES, RELATION, assert_same, evaluate

from codmd import conventions
from codmd.conventions import NAMED, Convention

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a process of compiled calls needs no interpreter")

SHAPE = (2, 4, 3, 5, 6)
CHANGED = replace(conventions.self_forcing, coefficient=0.3, guard="add", eps=1e-3)
EMULATED = replace(conventions.rcm, arithmetic="emulate")
GIVEN: dict[str, str | Convention] = {**{name: name for name in NAMED}, "a replaced one": CHANGED, "emulated": EMULATED}
STEPS = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5]


def compiled_first(number: int, options: dict[str, Any], how: dict[str, Any], made: bool = False) -> None:
    """Terms and gradient of a call compiled in a process that has called nothing yet are those of the eager call.

    ``made``: a replaced convention, made in the compiled function.
    """
    torch.set_num_threads(1)
    loss = LOSSES[number]
    student, arguments = loss.inputs(SHAPE)

    def layers(x: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        if made:
            rule = conventions.resolve(kwargs["convention"])
            rounding = replace(rule.rounding, target="float32")
            kwargs["convention"] = replace(rule, coefficient=0.3, rounding=rounding)
        return tuple(2 * term for term in loss.operator(x.tanh(), **kwargs))

    compiled = torch.compile(layers, fullgraph=True, **how)
    for seed in range(2):
        student, arguments = loss.inputs(SHAPE, seed=seed)
        found = evaluate(compiled, student, loss.upstream, **arguments, **options)
        assert_same(found, evaluate(layers, student, loss.upstream, **arguments, **options), 1e-6, 1e-6)


def compiled_in_turn(convention: str | Convention, calls: list[tuple[int, bool]]) -> None:
    for number, made in calls:
        compiled_first(number, {"convention": convention, "layout": "bfchw"}, {"backend": "eager"}, made)


@pytest.mark.parametrize("name", GIVEN)
def test_the_first_call_may_be_compiled_under_every_convention(name, request):
    """Both losses, given the convention and given one made of it in compiled code: the four in processes of their own.

    Without ``--every`` one loss of either, in one process; which comes first takes turns over the conventions.
    """
    calls = [(LOSSES.index(loss), made) for made in (False, True) for loss in (DMD, CODMD)]
    turn = list(GIVEN).index(name) % 4
    processes = [[call] for call in calls]
    if not request.config.getoption("--every"):
        processes = [[calls[turn], calls[3 - turn]]]
    for process in processes:
        in_fresh_process(compiled_in_turn, GIVEN[name], process)


def test_a_number_of_a_convention_made_in_compiled_code_may_vary():
    """PyTorch makes a float that varied a symbol, and a convention's is a constant of the graph."""
    student, arguments = DMD.inputs(SHAPE)

    def loss(x: torch.Tensor, given: Convention, eps: float, **kwargs: Any) -> torch.Tensor:
        rule = replace(given, guard="clamp", eps=eps)
        return DMD.alone(x, convention=rule, layout="bfchw", **kwargs)[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for name, eps in (("self_forcing", 0.5), ("self_forcing", 2.0), ("rcm", 3.0), ("lightx2v_pdmd", 3.0)):
        given = conventions.resolve(name), eps
        torch.testing.assert_close(compiled(student, *given, **arguments), loss(student, *given, **arguments))


@pytest.mark.parametrize("pool", ["mean", (2, 3), None], ids=str)
def test_the_first_call_may_be_a_compiled_relation(pool):
    in_fresh_process(compiled_first, LOSSES.index(RELATION), {"pool": pool}, {"backend": "eager"})


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (RELATION, {}),
        (RELATION, {"pool": None}),
        (DMD, {}),
        (DMD, {"convention": CHANGED}),
        (CODMD, {}),
        (CODMD, {"convention": "longlive", "pool": (2, 3)}),
    ],
    ids=lambda value: getattr(value, "name", None) or ", ".join(value) or "plain",
)
def test_the_first_call_may_go_through_inductor(loss, options):
    in_fresh_process(compiled_first, LOSSES.index(loss), options, {})


def some(cases: list[Any], others: list[Any]) -> list[Any]:
    """``cases``, and under ``--every`` the ``others``."""
    return [*cases, *(pytest.param(*other, marks=pytest.mark.every) for other in others)]


CAPTURED, DYNAMIC = {"mode": "reduce-overhead"}, {"dynamic": True}


@pytest.mark.parametrize(
    ("how", "loss"),
    some(
        [(DYNAMIC, RELATION), (CAPTURED, DMD), (DYNAMIC, CODMD)],
        [(CAPTURED, RELATION), (DYNAMIC, DMD), (CAPTURED, CODMD)],
    ),
    ids=lambda value: getattr(value, "name", None) or str(*value),
)
def test_the_first_call_may_be_compiled_in_every_mode(how, loss):
    in_fresh_process(compiled_first, LOSSES.index(loss), {}, how)


def scheduled(number: int, values: Callable[[float], dict[str, Any]]) -> None:
    """Ten values of a number compile to two graphs at most and give what eager calls do."""
    torch.set_num_threads(1)
    loss = LOSSES[number]
    student, arguments = loss.inputs(SHAPE)
    compiled = torch.compile(loss.operator, fullgraph=True)
    for step in STEPS:
        given = {**arguments, **values(step)}
        with torch._dynamo.config.patch(recompile_limit=2):
            found = evaluate(compiled, student, loss.upstream, **given)
        assert_same(found, evaluate(loss.operator, student, loss.upstream, **given), 1e-6, 1e-6)


def floats(name: str, step: float) -> dict[str, Any]:
    return {name: step}


def weights(step: float) -> dict[str, Any]:
    return {"sample_weight": torch.tensor([step, 1.0])}


SCHEDULES = some(
    [(RELATION, "temperature"), (DMD, "fake_guidance"), (DMD, "sample_weight"), (CODMD, "relation_weight")],
    [
        *((RELATION, name) for name in ("batch_weight", "frame_weight")),
        (DMD, "guidance"),
        *((CODMD, name) for name in ("temperature", "frame_weight", "guidance")),
    ],
)


@pytest.mark.parametrize(("loss", "name"), SCHEDULES, ids=lambda value: getattr(value, "name", value))
def test_a_schedule_compiles_to_two_graphs_at_most(loss, name):
    values = weights if name == "sample_weight" else partial(floats, name)
    in_fresh_process(scheduled, LOSSES.index(loss), values)
