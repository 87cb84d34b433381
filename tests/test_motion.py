"""Motion features of the frame relation: their equations, every backend against float64, masks, edges and traces."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, POOLS, frame_mask, latents, loss_and_gradient, relative_error

from codmd import ops, reference
from codmd.ops.backends import cpp

KINDS = ("difference", "centred")
MASK = torch.tensor([[True, True, True, False, True], [True, True, True, True, True]])
BACKENDS = [
    "reference",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(cpp.load_error), reason=str(cpp.load_error))),
]


def moving(shape=(2, 5, 4, 7, 9), dtype=torch.float32, layout="bfchw", seed=0):
    """Latents of which every frame is one still picture plus a tenth of it that moves."""
    student, real, fake = latents(shape, dtype, layout, seed=seed)
    frames = 1 if layout == "bfchw" else 2
    still = torch.randn(shape, generator=torch.Generator().manual_seed(9))[:, :1].to(dtype)
    still = still if layout == "bfchw" else still.transpose(1, 2)
    assert still.shape[frames] == 1
    real = still + 0.3 * real
    return (still + 0.3 * student.detach()).requires_grad_(), real, (real + 0.05 * (fake - real)).detach()


def truth(student, real, fake, **options):
    return loss_and_gradient(reference.relation_loss, *(v.detach().double() for v in (student, real, fake)), **options)


def found(backend, student, real, fake, **options):
    return loss_and_gradient(ops.relation_loss, student, real, fake, backend=backend, return_terms=True, **options)


def test_a_difference_row_and_a_centred_row_are_what_their_names_say():
    features = torch.randn(2, 4, 3, dtype=torch.float64)
    valid = torch.tensor([[True, True, False, True], [True, True, True, True]])
    difference, both = reference.motion_features(features, "difference", valid)
    assert both.tolist() == [[True, False, False], [True, True, True]]
    torch.testing.assert_close(difference[1, 2], features[1, 3] - features[1, 2])
    centred, rows = reference.motion_features(features, "centred", valid)
    assert torch.equal(rows, valid)
    torch.testing.assert_close(centred[0, 3], features[0, 3] - features[0, [0, 1, 3]].mean(0))
    assert not centred[0, 2].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adjoint_is_the_transpose(kind, masked):
    features = torch.randn(3, 5, 4, dtype=torch.float64)
    valid = frame_mask(3, 5) if masked else None
    moved, _ = reference.motion_features(features, kind, valid)
    weights = torch.randn_like(moved)
    back = reference.motion_adjoint(weights, kind, valid)
    assert float((moved * weights).sum()) == pytest.approx(float((features * back).sum()), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_and_gradient_match_float64(backend, layout, pool, kind):
    for dtype in (torch.float32, torch.bfloat16):
        case = moving(dtype=dtype, layout=layout)
        options = {"layout": layout, "pool": pool, "relation_features": kind, "frame_mask": MASK}
        expected, expected_grad = truth(*case, **options)
        usual, usual_grad = loss_and_gradient(reference.relation_loss, *case, **options)
        terms, grad = found(backend, *case, **options)
        for got, plain, true in ((terms, usual, expected), (grad, usual_grad, expected_grad)):
            assert relative_error(got, true) <= 2 * relative_error(plain, true) + 1e-5, (dtype, got, true)
        assert expected[1] > 0
        assert expected[2] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_critic_close_to_the_teacher_leaves_digits(backend, kind):
    """fake - real is pooled as it is: pooling both and subtracting would leave three digits here."""
    student, real, fake = moving()
    fake = real + 1e-4 * (fake - real)
    expected, expected_grad = truth(student, real, fake, batch_weight=0.0, relation_features=kind)
    terms, grad = found(backend, student, real, fake, batch_weight=0.0, relation_features=kind)
    assert relative_error(terms, expected) < 2e-5
    assert relative_error(grad, expected_grad) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_stands_still_changes_nothing(kind):
    """The level relation of the same latents does change."""
    student, real, fake = (v.detach().double() for v in moving())
    still = torch.randn_like(student[:, :1])
    shifted = student + still, real + still, fake + still
    options = {"batch_weight": 0.0, "relation_features": kind, "backend": "reference"}
    assert ops.relation_loss(*shifted, **options).item() == pytest.approx(
        ops.relation_loss(student, real, fake, **options).item(), rel=1e-9
    )
    options["relation_features"] = "level"
    level = ops.relation_loss(*shifted, **options), ops.relation_loss(student, real, fake, **options)
    assert level[0].item() != pytest.approx(level[1].item(), rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_codmd_loss_is_the_sum_of_both_losses(kind):
    student, real, fake = moving()
    options = {"batch_weight": 0.5, "frame_weight": 2.0}
    joint = ops.codmd_loss(
        student, real=real, fake=fake, relation_weight=0.3, relation_features=kind, return_terms=True, **options
    )
    relation = ops.relation_loss(student, real, fake, relation_features=kind, return_terms=True, **options)
    torch.testing.assert_close(joint.frame, relation.frame)
    torch.testing.assert_close(joint.batch, relation.batch)
    torch.testing.assert_close(joint.total, ops.dmd_loss(student, real=real, fake=fake) + 0.3 * relation.total)
    torch.testing.assert_close(relation.total, 0.5 * relation.batch + 2.0 * relation.frame)
    level = ops.relation_loss(student, real, fake, return_terms=True, **options)
    torch.testing.assert_close(relation.batch, level.batch)
    assert abs(relation.frame - level.frame) > 0.1 * level.frame


@pytest.mark.parametrize("pool", ["mean", None])
@pytest.mark.parametrize(("kind", "frames"), [("difference", 2), ("difference", 1), ("centred", 1)])
def test_too_few_rows_give_exactly_zero(kind, frames, pool):
    student, real, fake = moving((2, frames, 4, 3, 3))
    loss = ops.relation_loss(student, real, fake, batch_weight=0.0, relation_features=kind, pool=pool)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("pool", ["mean", None])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager_and_differentiating_twice_raises(kind, pool):
    student, real, fake = moving()

    def call(x):
        return ops.relation_loss(x, real, fake, relation_features=kind, pool=pool, frame_weight=2.0)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (eager,) = torch.autograd.grad(call(student), student)
    (traced,) = torch.autograd.grad(compiled(student), student)
    torch.testing.assert_close(traced, eager)
    (first,) = torch.autograd.grad(call(student), student, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_another_word_is_refused():
    student, real, fake = moving()
    with pytest.raises(ValueError, match="relation_features='motion' is not known; allowed: level, difference"):
        ops.relation_loss(student, real, fake, relation_features="motion")
    with pytest.raises(ValueError, match="relation_features"):
        ops.codmd_loss(student, real=real, fake=fake, relation_features="motion")
