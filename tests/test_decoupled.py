"""The decoupled loss: matching at one noise level, guidance at another, on every backend (arXiv 2511.22677)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import frame_mask, relative_error
from dmd_cases import BACKENDS, mask_of, run, scores

from codmd import conventions, ops, reference
from codmd.conventions import NAMED

SHAPES = [(2, 7, 3, 5, 9), (1, 1, 1, 1, 1), (3, 4, 2, 8, 41)]
FUSABLE = sorted(name for name, rule in NAMED.items() if not rule.unfusable and not rule.undecouplable)


def decoupled(shape=SHAPES[0], dtype=torch.float32, layout="bfchw", seed=0):
    """The student, and real, fake and the second level's two predictions."""
    student, arguments = scores(shape, dtype, layout, seed=seed)
    second, others = scores(shape, dtype, layout, seed=seed + 1)
    real, fake = arguments["real"], arguments["fake"]
    return student, {
        "real": real, "fake": fake, "augment_real": second, "augment_uncond": second + others["fake"] - others["real"],
    }  # fmt: skip


def assert_as_good_as_torch(student, arguments, backend, upstream=1.0, **options):
    value, gradient = run(ops.dmd_loss, student, arguments, upstream, backend=backend, **options)
    yard = run(reference.dmd_loss, student, arguments, upstream, **options)
    wide = {name: tensor.double() for name, tensor in arguments.items()}
    true = run(reference.dmd_loss, student.double(), wide, upstream, **options)
    assert gradient.stride() == student.stride()
    for found, same_dtype, expected in zip((value, gradient), yard, true, strict=True):
        assert relative_error(found, expected) <= 2 * relative_error(same_dtype, expected) + 5e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUSABLE)
def test_every_fusable_convention(name, backend):
    layout = "bfchw" if NAMED[name].layout == "bchw" else NAMED[name].layout
    student, arguments = decoupled(layout=layout)
    assert_as_good_as_torch(student, arguments, backend, 1.7, convention=name, layout=layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_and_size(shape, dtype, backend):
    assert_as_good_as_torch(*decoupled(shape, dtype), backend, -3.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["elements", "frames", "one", "empty"])
def test_masks_and_sample_weights(kind, backend):
    student, arguments = decoupled()
    mask, weight = mask_of(kind, student), torch.tensor([0.5, 2.0])
    assert_as_good_as_torch(student, arguments, backend, mask=mask, sample_weight=weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_guidance_it_is_the_plain_loss(backend):
    student, arguments = decoupled()
    plain = {name: arguments[name] for name in ("real", "fake")}
    found = run(ops.dmd_loss, student, arguments, guidance=0.0, backend=backend)
    for ours, expected in zip(found, run(ops.dmd_loss, student, plain, backend=backend), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
def test_the_relation_takes_the_matching_level_alone(pool, backend):
    student, arguments = decoupled()
    options = {"temperature": 0.2, "pool": pool, "frame_mask": frame_mask(2, 7)}
    leaf = student.clone().requires_grad_()
    terms = ops.codmd_loss(leaf, **arguments, **options, backend=backend, return_terms=True)
    terms.total.backward()
    again = student.clone().requires_grad_()
    relation = ops.relation_loss(again, arguments["real"], arguments["fake"], **options, backend=backend)
    total = ops.dmd_loss(again, **arguments, backend=backend) + 0.1 * relation
    total.backward()
    torch.testing.assert_close(terms.total, total, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_terms_are_those_of_the_first_level(backend):
    student, arguments = decoupled()
    terms = ops.dmd_loss(student.requires_grad_(), **arguments, backend=backend, return_terms=True)
    assert terms.norm.shape == (2,)
    norm = (student.detach() - arguments["real"]).abs().mean((1, 2, 3, 4))
    torch.testing.assert_close(terms.norm, norm, rtol=1e-6, atol=0)


def test_it_compiles_without_a_graph_break():
    student, arguments = decoupled()
    compiled = torch.compile(lambda x: ops.dmd_loss(x, **arguments), fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled, student, {}), run(ops.dmd_loss, student, arguments), strict=True):
        torch.testing.assert_close(found, expected)


WRONG = [
    ({"augment_uncond": None}, "augment_uncond is missing"),
    ({"augment_real": None}, "augment_real is missing"),
    ({"real_uncond": torch.zeros(SHAPES[0])}, "real_uncond does not go with augment_real"),
    ({"augment_real": torch.zeros(1, 7, 3, 5, 9)}, "augment_real must have the shape of student"),
    ({"convention": "tdm", "layout": "bfchw"}, "augment_real does not go with this convention"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_argument_is_named(change, message):
    student, arguments = decoupled()
    with pytest.raises(ValueError, match=message):
        ops.dmd_loss(student, **{**arguments, **change})


def test_it_runs_step_by_step_too():
    student, arguments = decoupled()
    convention = replace(conventions.self_forcing, arithmetic="float64")
    value, gradient = run(ops.dmd_loss, student, arguments, convention=convention)
    wide = {name: tensor.double() for name, tensor in arguments.items()}
    expected = run(reference.dmd_loss, student.double(), wide)
    assert relative_error(value, expected[0]) < 1e-12
    assert relative_error(gradient, expected[1]) < 1e-6
