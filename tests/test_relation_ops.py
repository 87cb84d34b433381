"""codmd.ops.relation_loss on every backend of this machine: values, gradients, and the rules of an operator."""

import itertools

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    POOLS,
    frame_mask,
    latents,
    loss_and_gradient,
    relative_error,
    same_dtype_errors,
    truth,
)
from operators import check_every_operator

from codmd import backends, ops

CPU_BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(backends.load(name)[0] is None, reason=f"{name}: {backends.load(name)[1]}"),
    )
    for name in ("reference", "cpp")
]
on_every_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)

# one sample and one frame, prime sizes, more frames than a vector register, a single pixel, Wan's 21 frames
SHAPES = [(1, 1, 1, 1, 1), (1, 5, 3, 4, 4), (3, 1, 3, 7, 13), (2, 21, 16, 6, 10), (2, 3, 2, 1, 41), (4, 2, 5, 41, 3)]


def terms_of(student, real, fake, **kwargs):
    return ops.relation_loss(student, real, fake, return_terms=True, **kwargs)


def assert_as_accurate_as_pytorch(student, real, fake, backend, upstream=(1.0, 0.5, -0.25), **kwargs):
    """Errors of the terms and the gradient against float64 at most twice those of the same-dtype PyTorch path."""
    exact, exact_gradient = truth(student, real, fake, upstream, **kwargs)
    yardstick = same_dtype_errors(student, real, fake, exact, exact_gradient, upstream, **kwargs)
    got, gradient = loss_and_gradient(terms_of, student, real, fake, upstream=upstream, backend=backend, **kwargs)
    assert gradient.dtype is student.dtype
    assert gradient.shape == student.shape
    errors = [relative_error(a, b) for a, b in zip(got, exact, strict=True)]
    errors.append(relative_error(gradient, exact_gradient))
    for error, limit in zip(errors, yardstick, strict=True):
        assert error <= 2 * limit + 1e-6, (errors, yardstick)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(shape, dtype, backend):
    for layout, pool in itertools.product(LAYOUTS, ("mean", None, (min(2, shape[3]), min(3, shape[4])))):
        assert_as_accurate_as_pytorch(*latents(shape, dtype, layout), backend, layout=layout, pool=pool)


@on_every_backend
@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("perturbation", [1e-4, 1e-2, 1.0])
def test_error_holds_over_temperatures_and_perturbations(temperature, perturbation, backend):
    for pool in POOLS:
        inputs = latents(perturbation=perturbation)
        assert_as_accurate_as_pytorch(*inputs, backend, pool=pool, temperature=temperature)


@on_every_backend
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_holds_under_a_frame_mask(layout, pool, backend):
    inputs = latents((4, 5, 3, 7, 6), layout=layout)
    assert_as_accurate_as_pytorch(*inputs, backend, layout=layout, pool=pool, frame_mask=frame_mask(4, 5))
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    terms, gradient = loss_and_gradient(
        terms_of, *inputs, backend=backend, layout=layout, pool=pool, frame_mask=nothing
    )
    assert terms.abs().max() == 0
    assert gradient.abs().max() == 0


@on_every_backend
@pytest.mark.parametrize("batch_weight, frame_weight", [(0, 0), (1, 0), (0, 1), (0.3, 2.0)])
def test_error_holds_for_any_weights_zero_included(batch_weight, frame_weight, backend):
    for upstream in ((1.0, 0.0, 0.0), (-2.5, 0.0, 3.0), (0.0, 1.5, 0.0)):
        assert_as_accurate_as_pytorch(
            *latents(), backend, upstream, batch_weight=batch_weight, frame_weight=frame_weight
        )


@on_every_backend
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_any_strides_give_the_contiguous_result(pool, backend):
    shape = (2, 4, 3, 6, 8)
    plain = [v.detach() for v in latents(shape)]
    expected = loss_and_gradient(terms_of, *plain, backend=backend, pool=pool)

    def strided(v):
        wide = v.new_full((2, 8, 3, 7, 16), torch.nan)
        wide[:, ::2, :, :6, 1::2] = v
        return wide[:, ::2, :, :6, 1::2]

    def channels_last(v):
        return v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)

    def pixels_transposed(v):
        return v.mT.contiguous().mT

    for view in (strided, channels_last, pixels_transposed):
        for terms, gradient in (
            loss_and_gradient(terms_of, *map(view, plain), backend=backend, pool=pool),
            loss_and_gradient(terms_of, plain[0], view(plain[1]), view(plain[2]), backend=backend, pool=pool),
        ):
            torch.testing.assert_close(terms, expected[0], rtol=1e-5, atol=0)
            assert relative_error(gradient, expected[1]) < 3e-6


@on_every_backend
def test_expanded_scores_are_read_in_place(backend):
    student, real, _ = latents((3, 4, 2, 5, 5))
    shared = real[:1].expand_as(real)
    fake = (real[:1] * 1.1 + 0.05).expand_as(real)
    assert_as_accurate_as_pytorch(student, shared, fake, backend)


@on_every_backend
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_the_result_repeats_bit_for_bit(pool, backend):
    inputs = latents((3, 7, 4, 9, 11), torch.bfloat16)
    first = loss_and_gradient(terms_of, *inputs, backend=backend, pool=pool)
    for _ in range(3):
        again = loss_and_gradient(terms_of, *inputs, backend=backend, pool=pool)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@on_every_backend
@pytest.mark.parametrize("pool", ["mean", None], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_non_finite_input_reaches_the_loss(which, value, pool, backend):
    inputs = [v.detach().clone() for v in latents()]
    inputs[which][1, 2, 1, 3, 3] = value
    terms, _ = loss_and_gradient(terms_of, *inputs, backend=backend, pool=pool)
    assert not torch.isfinite(terms).any()


@on_every_backend
def test_zero_vectors_follow_the_reference(backend):
    inputs = [v.detach().clone() for v in latents()]
    inputs[1][0, 1] = 0
    inputs[2][0, 2] = 0
    assert_as_accurate_as_pytorch(*inputs, backend)
    inputs[0][1, 1] = 0
    exact, _ = truth(*inputs)
    got, gradient = loss_and_gradient(terms_of, *inputs, backend=backend)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
    assert torch.isfinite(gradient).all()


@on_every_backend
def test_autocast_does_not_change_the_result(backend):
    inputs = latents(dtype=torch.float32)
    expected = loss_and_gradient(terms_of, *inputs, backend=backend, pool=None)
    with torch.autocast("cpu", torch.bfloat16):
        terms, gradient = loss_and_gradient(terms_of, *inputs, backend=backend, pool=None)
        assert ops.relation_matrix(inputs[0]).dtype is torch.float32
    assert torch.equal(terms, expected[0])
    assert torch.equal(gradient, expected[1])


@on_every_backend
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_passes(pool, masked, backend):
    inputs = latents((3, 4, 2, 5, 6))
    options = {"pool": pool, "frame_mask": frame_mask(3, 4) if masked else None, "frame_weight": 0.5}
    name = "codmd::whole_relation_loss" if pool is None else "codmd::relation_loss"
    checked = check_every_operator(lambda: ops.relation_loss(*inputs, **options, backend=backend))
    assert checked == [name, f"{name}_backward"]


@on_every_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break_and_agrees_with_eager(dynamic, backend):
    def objective(latent, real, fake):
        terms = ops.relation_loss(latent.tanh(), real, fake, backend=backend, return_terms=True)
        return 2 * terms.total + terms.frame

    compiled = torch.compile(objective, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 5, 3, 4, 6), (3, 4, 3, 4, 6)):
        results = []
        for function in (objective, compiled):
            student, real, fake = latents(shape)
            loss = function(student, real, fake)
            loss.backward()
            results.append((loss.detach(), student.grad))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


@on_every_backend
def test_differentiating_twice_raises(backend):
    student, real, fake = latents()
    (gradient,) = torch.autograd.grad(
        ops.relation_loss(student, real, fake, backend=backend), student, create_graph=True
    )
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
    weight = torch.ones((), requires_grad=True)
    loss = weight * ops.relation_loss(student, real, fake, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|twice"):
        gradient.sum().backward()


@on_every_backend
def test_nothing_larger_than_features_is_saved_for_backward(backend):
    student, real, fake = latents((2, 5, 4, 16, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = ops.relation_loss(student, real, fake, backend=backend)
    saved += [tensor.numel() for tensor in loss.grad_fn.found if tensor is not None]
    assert 2 * 5 * 4 <= sum(saved) <= 2 * 5 * 4 + 2 * 4 + 3
    loss.backward()
    assert student.grad is not None


@on_every_backend
def test_the_gradient_keeps_the_students_memory_format(backend):
    student, real, fake = latents()
    permuted = student.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    ops.relation_loss(permuted, real, fake, backend=backend).backward()
    assert permuted.grad.stride() == permuted.stride()
    expanded = student.detach()[:1].expand_as(student).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.relation_loss(expanded, real, fake, backend=backend), expanded)
    assert gradient.is_contiguous()


def test_the_student_alone_receives_a_gradient():
    student, real, fake = latents()
    for name, index in (("real", 1), ("fake", 2)):
        inputs = [student, real, fake]
        inputs[index] = inputs[index].clone().requires_grad_()
        with pytest.raises(ValueError, match=f"{name} requires a gradient"):
            ops.relation_loss(*inputs)
        with torch.no_grad():
            ops.relation_loss(*inputs)


def test_double_precision_runs_on_the_reference():
    student, real, fake = (v.detach().double() for v in latents())
    loss = ops.relation_loss(student.requires_grad_(), real, fake)
    assert loss.dtype is torch.float64
    torch.testing.assert_close(loss.detach(), truth(student, real, fake)[0][0], rtol=1e-12, atol=0)


def test_thousands_of_rows_and_extreme_aspect_ratios():
    assert_as_accurate_as_pytorch(*latents((1, 127, 2, 1, 1271)), "auto")
    assert_as_accurate_as_pytorch(*latents((41, 2, 3, 5, 1)), "auto")


@pytest.mark.parametrize("axis", ["frame", "batch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relation_matrix_holds_cosines(axis, layout):
    student, _, _ = latents(layout=layout)
    matrix = ops.relation_matrix(student, axis, layout=layout)
    means = (student if layout == "bfchw" else student.transpose(1, 2)).mean((3, 4))
    vectors = means if axis == "frame" else means.mean(1)
    expected = torch.nn.functional.cosine_similarity(vectors[..., :, None, :], vectors[..., None, :, :], dim=-1)
    torch.testing.assert_close(matrix, expected)
    assert torch.autograd.grad(matrix.square().sum(), student)[0].abs().max() > 0
    compiled = torch.compile(ops.relation_matrix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, axis, layout=layout), matrix)
