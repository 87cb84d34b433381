"""``dmd_loss`` as an operator: upstream gradients, repetition, compilation, autocast, and its errors."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from dmd_cases import mask_of, run, scores

from codmd import conventions, ops
from codmd.conventions import NAMED
from codmd.ops import emulation


@pytest.mark.parametrize("arithmetic", ["float64", "emulate"])
def test_a_second_differentiation_raises(arithmetic):
    student, arguments = scores()
    leaf = student.requires_grad_()
    loss = ops.dmd_loss(leaf, **arguments, convention=replace(conventions.self_forcing, arithmetic=arithmetic))
    (gradient,) = torch.autograd.grad(loss.square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("arithmetic", ["float64", "emulate"])
def test_autocast_changes_nothing(arithmetic):
    student, arguments = scores()
    convention = replace(conventions.self_forcing, arithmetic=arithmetic)
    outside = run(ops.dmd_loss, student, arguments, convention=convention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(ops.dmd_loss, student, arguments, convention=convention)
    assert torch.equal(outside[0], inside[0])
    assert torch.equal(outside[1], inside[1])


@pytest.mark.parametrize("arithmetic", ["float64", "emulate"])
@pytest.mark.parametrize("name", ["self_forcing", "longlive"])
def test_it_compiles_without_a_graph_break(name, arithmetic):
    convention = replace(NAMED[name], arithmetic=arithmetic)
    student, arguments = scores(dtype=torch.bfloat16, flow=True)
    mask = mask_of("elements", student)

    def loss(x):
        return 2 * ops.dmd_loss(x, **arguments, convention=convention, prediction="flow", mask=mask)

    eager = run(loss, student, {})
    compiled = run(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, {})
    torch.testing.assert_close(compiled[0], eager[0])
    torch.testing.assert_close(compiled[1], eager[1])


WRONG = [
    ({"student": 1.0}, TypeError, "student must be a torch.Tensor, got float"),
    ({"student": torch.zeros(2, 3, 4, 5)}, ValueError, "student must have 5 axes for layout='bfchw'"),
    (
        {"student": torch.zeros(2, 3, 4, 5, 6).long()},
        TypeError,
        "student must be float32, bfloat16, float16 or float64",
    ),
    ({"layout": "bchw"}, ValueError, "student must have 4 axes for layout='bchw'"),
    ({"layout": "bhwc"}, ValueError, "layout='bhwc' is not known; allowed: bfchw, bcfhw, bchw"),
    ({"fake": None}, TypeError, "fake must be a torch.Tensor, got NoneType"),
    ({"real": None}, TypeError, "real must be a torch.Tensor, got NoneType"),
    ({"real": torch.zeros(1)}, ValueError, "real must have the shape of student"),
    ({"fake": torch.zeros(2, 3, 4, 5, 6).half()}, TypeError, "fake must have the dtype of student"),
    ({"real_uncond": torch.zeros(3)}, ValueError, "real_uncond must have the shape of student"),
    ({"fake_uncond": "none"}, TypeError, "fake_uncond must be a torch.Tensor, got str"),
    (
        {"fake": torch.zeros(2, 3, 4, 5, 6, requires_grad=True)},
        ValueError,
        "fake requires a gradient, but only student",
    ),
    ({"fake": torch.zeros(2, 3, 4, 5, 6, device="meta")}, ValueError, "fake must be on the device of student"),
    ({"guidance": "high"}, TypeError, "guidance must be a Python number or a 0-dim tensor, got str"),
    ({"guidance": float("nan")}, ValueError, "guidance must be finite, got nan"),
    ({"fake_guidance": float("inf")}, ValueError, "fake_guidance must be finite, got inf"),
    ({"convention": "wan"}, ValueError, "convention='wan' is not known; known: causvid"),
    ({"convention": None}, TypeError, "convention must be a name or"),
    ({"mask": [True]}, TypeError, "mask must be a boolean torch.Tensor, got list"),
    (
        {"mask": torch.ones(2, 1, 1, 1, 1)},
        TypeError,
        "mask must be torch.bool (True selects an element), got torch.float32",
    ),
    ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask must broadcast to the shape of student"),
    (
        {"mask": torch.ones(1, 2, 3, 4, 5, 6, dtype=torch.bool)},
        ValueError,
        "mask must broadcast to the shape of student",
    ),
    ({"mask": torch.ones(6, dtype=torch.bool, device="meta")}, ValueError, "mask must be on the device of student cpu"),
    ({"sample_weight": 2.0}, TypeError, "sample_weight must be a torch.Tensor, got float"),
    ({"sample_weight": torch.ones(3)}, ValueError, "sample_weight must have shape (batch,) = (2,), got (3,)"),
    (
        {"sample_weight": torch.ones(2).int()},
        TypeError,
        "sample_weight must be a floating-point tensor, got torch.int32",
    ),
    ({"sample_weight": torch.ones(2, device="meta")}, ValueError, "sample_weight must be on the device of student cpu"),
    ({"sample_weight": torch.ones(2, requires_grad=True)}, ValueError, "sample_weight requires a gradient"),
    ({"prediction": "v"}, ValueError, "prediction='v' is not known; allowed: x0, flow"),
    ({"prediction": "flow"}, TypeError, 'noisy must be a torch.Tensor with prediction="flow", got NoneType'),
    ({"sigma": torch.ones(2)}, ValueError, 'sigma is used with prediction="flow" alone'),
    ({"noisy": torch.zeros(2, 3, 4, 5, 6)}, ValueError, 'noisy is used with prediction="flow" alone'),
    (
        {"prediction": "flow", "noisy": torch.zeros(2, 3, 4, 5, 6), "sigma": torch.ones(2, 4)},
        ValueError,
        "sigma must have shape (batch,) = (2,) or (batch, frames) = (2, 3), got (2, 4)",
    ),
    (
        {"prediction": "flow", "noisy": torch.zeros(2, 3, 4, 5, 6), "sigma": torch.ones(2).int()},
        TypeError,
        "sigma must be a floating-point tensor, got torch.int32",
    ),
    ({"backend": "gpu"}, ValueError, "backend='gpu' is not known; allowed: auto, triton, cuda, cpp, reference"),
    (
        {"backend": "cpp", "convention": replace(conventions.rcm, arithmetic="emulate"), "layout": "bfchw"},
        ValueError,
        "backend='cpp' cannot serve this convention: arithmetic='emulate' is computed step by step",
    ),
]


def test_the_guided_real_is_one_of_the_terms():
    student, arguments = scores()
    with pytest.raises(ValueError, match="return_real=True needs return_terms=True"):
        ops.dmd_loss(student, **arguments, return_real=True)


@pytest.mark.parametrize("operator", [ops.dmd_loss, ops.codmd_loss])
@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_a_wrong_argument_is_named_with_what_came_and_what_is_allowed(change, kind, message, operator):
    arguments = {name: torch.zeros(2, 3, 4, 5, 6) for name in ("student", "fake", "real")}
    with pytest.raises(kind) as error:
        operator(**{**arguments, **change})
    assert message in str(error.value)


def test_a_convention_that_runs_step_by_step_says_so_once(caplog):
    emulation._log_once.cache_clear()
    student, arguments = scores((1, 2, 2, 2, 2))
    with caplog.at_level(logging.INFO, logger="codmd"):
        for _ in range(2):
            ops.dmd_loss(student, **arguments, convention=replace(conventions.rcm, arithmetic="float64"))
    assert caplog.text.count("arithmetic='float64' is computed step by step") == 1
