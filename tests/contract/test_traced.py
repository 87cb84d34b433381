"""Traced calls: every operator passes opcheck, and compiled calls agree with eager ones, without a break."""

from __future__ import annotations

import pytest
import torch
from cases import frame_mask
from dmd_cases import mask_of
from losses import CODMD, DMD, RELATION, SHAPE, Calls, assert_same, each, every_loss
from operators import check_every_operator

SAMPLES, FRAMES = SHAPE[:2]

CASES = [
    (RELATION, {}),
    (RELATION, {"pool": (2, 3), "frame_mask": frame_mask(SAMPLES, FRAMES)}),
    (RELATION, {"pool": None, "layout": "bcfhw", "frame_weight": 0.5}),
    (RELATION, {"pool": None, "batch_weight": 0.0}),
    (DMD, {}),
    (DMD, {"convention": "longlive", "mask": mask_of("elements", torch.empty(SHAPE))}),
    (DMD, {"convention": "fastgen", "layout": "bfchw", "sample_weight": torch.linspace(0.5, 2.0, SAMPLES)}),
    (CODMD, {}),
    (CODMD, {"pool": (2, 3), "frame_mask": frame_mask(SAMPLES, FRAMES), "convention": "longlive"}),
    (CODMD, {"pool": None, "frame_mask": frame_mask(SAMPLES, FRAMES)}),
]
NAMES = [f"{loss.name}, {', '.join(options) or 'plain'}" for loss, options in CASES]
every_case = pytest.mark.parametrize(("loss", "options"), CASES, ids=NAMES)


pytestmark = pytest.mark.operator


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


@every_case
def test_every_operator_that_is_reached_passes_opcheck(loss, options, call: Calls):
    """Schemas, fake results, aliasing and autograd of the operators, forward and backward, on the call's own inputs."""
    student, arguments = loss.inputs(SHAPE)
    leaf = student.requires_grad_()

    def value():
        terms = loss.operator(leaf, backend=call.backend, **arguments, **options)
        return sum(weight * term for weight, term in zip(loss.upstream, terms, strict=True))

    with call.ambient():
        names = check_every_operator(value)
    assert any(name.endswith("_backward") for name in names)


@every_case
def test_it_compiles_without_a_break_and_agrees_with_eager(loss, options, call: Calls):
    def layers(student, **kwargs):
        return tuple(2 * term for term in loss.operator(student.tanh(), **kwargs))

    student, arguments = loss.inputs(SHAPE)
    expected = call.of(layers, student, loss.upstream, **arguments, **options)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    assert_same(call.of(compiled, student, loss.upstream, **arguments, **options), expected, 1e-6, 1e-6)


@every_loss
def test_dynamic_shapes_compile_once_and_agree_with_eager(loss, call: Calls):
    compiled = torch.compile(loss.operator, fullgraph=True, dynamic=True, backend="aot_eager")
    stance = "default"
    for shape in ((2, 4, 1, 3, 5), (3, 4, 1, 2, 5), (2, 6, 1, 7, 5)):  # no size twice, which would be taken for one
        student, arguments = loss.inputs(shape)
        with torch.compiler.set_stance(stance):
            found = call.of(compiled, student, loss.upstream, **arguments)
        assert_same(found, call(loss, student, arguments), 1e-6, 1e-6)
        stance = "fail_on_recompile"


@each(DMD)
def test_all_terms_of_dmd_compile(loss, call: Calls):
    student, arguments = loss.inputs(SHAPE)
    options = {**arguments, "return_terms": True, "return_real": True, "backend": call.backend}
    compiled = torch.compile(loss.function, fullgraph=True, backend="aot_eager")
    with call.ambient():
        terms, expected = (f(student.requires_grad_(), **options) for f in (compiled, loss.function))
    for found, wanted in zip(terms, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@every_loss
def test_it_exports(loss, call: Calls):
    class Objective(torch.nn.Module):
        def forward(self, student, real, fake):
            return loss.alone(student, real=real, fake=fake, backend=call.backend)[0]

    student, arguments = loss.inputs(SHAPE)
    tensors = student, arguments["real"], arguments["fake"]
    samples, height = torch.export.Dim("samples", min=2), torch.export.Dim("height", min=2)
    student, arguments = loss.inputs((SHAPE[0] + 2, *SHAPE[1:3], SHAPE[3] + 1, SHAPE[4]))
    larger = student, arguments["real"], arguments["fake"]
    with call.ambient():
        exported = torch.export.export(Objective(), tensors, dynamic_shapes=[{0: samples, 3: height}] * 3).module()
        for inputs in (tensors, larger):
            torch.testing.assert_close(exported(*inputs), Objective()(*inputs), rtol=1e-6, atol=0)
