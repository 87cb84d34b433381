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


def compiled_first(number: int, options: dict[str, Any], how: dict[str, Any]) -> None:
    """Terms and gradient of a call compiled in a process that has called nothing yet are those of the eager call."""
    torch.set_num_threads(1)
    loss = LOSSES[number]
    student, arguments = loss.inputs(SHAPE)

    def layers(x: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(2 * term for term in loss.operator(x.tanh(), **kwargs))

    compiled = torch.compile(layers, fullgraph=True, **how)
    for seed in range(2):
        student, arguments = loss.inputs(SHAPE, seed=seed)
        found = evaluate(compiled, student, loss.upstream, **arguments, **options)
        assert_same(found, evaluate(layers, student, loss.upstream, **arguments, **options), 1e-6, 1e-6)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("loss", [DMD, CODMD], ids=lambda loss: loss.name)
def test_the_first_call_may_be_compiled_under_every_convention(loss, name):
    options = {"convention": GIVEN[name], "layout": "bfchw"}
    in_fresh_process(compiled_first, LOSSES.index(loss), options, {"backend": "eager"})


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


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("how", [{"mode": "reduce-overhead"}, {"dynamic": True}], ids=["reduce-overhead", "dynamic"])
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


SCHEDULES = [(RELATION, name) for name in ("temperature", "batch_weight", "frame_weight")]
SCHEDULES += [(DMD, name) for name in ("guidance", "fake_guidance", "sample_weight")]
SCHEDULES += [(CODMD, name) for name in ("temperature", "relation_weight", "frame_weight", "guidance")]


@pytest.mark.parametrize(("loss", "name"), SCHEDULES, ids=lambda value: getattr(value, "name", value))
def test_a_schedule_compiles_to_two_graphs_at_most(loss, name):
    values = weights if name == "sample_weight" else partial(floats, name)
    in_fresh_process(scheduled, LOSSES.index(loss), values)
