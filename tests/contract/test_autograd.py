"""Autograd: upstream gradients, what is kept, what is refused, and that nothing depends on the moment of a call."""

from __future__ import annotations

import pytest
import torch
from losses import CODMD, DMD, RELATION, SHAPE, Calls, assert_same, every_form, every_loss, pools, related
from torch import Tensor
from torch.overrides import TorchFunctionMode

from codmd import ops


@every_loss
def test_the_gradient_is_linear_in_the_upstream_gradients(loss, call):
    student, arguments = loss.inputs(SHAPE)
    terms = len(loss.upstream)
    for options in pools(loss):
        ones = [tuple(float(i == j) for j in range(terms)) for i in range(terms)]
        parts = [call(loss, student, arguments, one, **options).gradient for one in ones]
        found = call(loss, student, arguments, loss.upstream, **options).gradient
        summed = sum(weight * part.double() for weight, part in zip(loss.upstream, parts, strict=True))
        scale = sum(abs(weight) * part.norm() for weight, part in zip(loss.upstream, parts, strict=True))
        assert (found - summed).norm() < 1e-6 * scale
        eightfold = call(loss, student, arguments, (-8.0, *ones[0][1:]), **options).gradient
        assert torch.equal(eightfold, -8 * parts[0])


@related
def test_the_total_is_differentiated_as_the_sum_of_its_terms(loss, call):
    student, arguments = loss.inputs(SHAPE)
    weights = {"batch_weight": 0.4, "frame_weight": 1.7}
    found = call(loss, student, arguments, loss.total, **weights)
    by_terms = (0.0, 0.4, 1.7) if loss is RELATION else (0.0, 1.0, 0.04, 0.17)
    assert_same(found, call(loss, student, arguments, by_terms, **weights), 0, 1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_repeat_bit_for_bit(dtype, loss, call):
    student, arguments = loss.inputs(SHAPE, dtype)
    for options in pools(loss):
        first = call(loss, student, arguments, **options)
        for _ in range(3):
            assert_same(call(loss, student, arguments, **options), first)


@every_loss
def test_calls_in_turn_leave_nothing_to_each_other(loss, call):
    """Buffers of one size serve the next only when every element of them is written again."""
    inputs = [
        loss.inputs(shape, seed=seed) for seed, shape in enumerate([SHAPE, (2, 5, 3, 5, 7), SHAPE, (1, 2, 1, 3, 2)])
    ]
    first = [call(loss, *one) for one in inputs]
    for one, expected in reversed(list(zip(inputs, first, strict=True))):
        assert_same(call(loss, *one), expected)


@pytest.mark.operator
@every_loss
def test_two_graphs_may_be_alive_at_once_and_accumulate(loss, call: Calls):
    student, arguments = loss.inputs(SHAPE)
    other, others = loss.inputs(SHAPE, seed=1)
    expected = [call.of(loss.alone, student, (1.0,), **arguments), call.of(loss.alone, other, (1.0,), **others)]
    leaf, other_leaf = student.clone().requires_grad_(), other.clone().requires_grad_()
    with call.ambient():
        (one,), (two,) = (
            loss.alone(leaf, backend=call.backend, **arguments), loss.alone(other_leaf, backend=call.backend, **others)
        )  # fmt: skip
        one.backward(retain_graph=True)
        two.backward()
        one.backward()
    assert torch.equal(leaf.grad, 2 * expected[0].gradient)
    assert torch.equal(other_leaf.grad, expected[1].gradient)


@pytest.mark.operator
@every_form
def test_the_value_needs_no_gradient(loss, call: Calls):
    student, arguments = loss.inputs(SHAPE)
    for options in pools(loss):
        expected = call(loss, student, arguments, **options).terms
        with call.ambient():
            for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
                with mode():
                    terms = loss.operator(student, backend=call.backend, **arguments, **options)
                    assert torch.equal(torch.stack(terms), expected)
                    assert not any(term.requires_grad for term in terms)


@pytest.mark.operator
@every_form
def test_latents_made_in_inference_mode_have_the_same_value(loss, call: Calls):
    expected = call(loss, *loss.inputs(SHAPE)).terms
    with torch.inference_mode():
        student, arguments = loss.inputs(SHAPE)
        with call.ambient():
            assert torch.equal(torch.stack(loss.operator(student, backend=call.backend, **arguments)), expected)


@pytest.mark.operator
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype, loss, call: Calls):
    student, arguments = loss.inputs(SHAPE, dtype)
    for options in pools(loss):
        expected = call(loss, student, arguments, **options)
        for to in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", to):
                assert_same(call(loss, student, arguments, **options), expected)


@pytest.mark.operator
@every_loss
def test_checkpointing_changes_nothing(loss, call: Calls):
    student, arguments = loss.inputs(SHAPE)

    def again(leaf: Tensor, **options) -> tuple[Tensor]:
        return (torch.utils.checkpoint.checkpoint(lambda x: loss.alone(x, **options)[0], leaf, use_reentrant=False),)

    expected = call.of(loss.alone, student, (1.0,), **arguments)
    assert_same(call.of(again, student, (1.0,), **arguments), expected)


@pytest.mark.operator
@every_loss
def test_differentiating_twice_raises(loss, call: Calls):
    student, arguments = loss.inputs(SHAPE)
    for options in pools(loss):
        leaf = student.clone().requires_grad_()
        with call.ambient():
            (value,) = loss.alone(leaf, backend=call.backend, **arguments, **options)
            (gradient,) = torch.autograd.grad(value.square(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match=r"once_differentiable|twice"):
                gradient.sum().backward()


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


@every_loss
def test_differentiating_a_traced_call_twice_raises(loss):
    student, arguments = loss.inputs(SHAPE)
    leaf = student.requires_grad_()
    with Watching():
        (value,) = loss.alone(leaf, backend="reference", **arguments)
        (gradient,) = torch.autograd.grad(value.square(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()


@pytest.mark.operator
@every_loss
def test_the_student_alone_receives_a_gradient(loss, call: Calls):
    student, arguments = loss.inputs(SHAPE)
    for name in [n for n, v in arguments.items() if isinstance(v, Tensor)]:
        changed = {**arguments, name: arguments[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{name} requires a gradient"):
            call(loss, student, changed)
        with torch.no_grad():
            loss.alone(student, backend=call.backend, **changed)


@every_loss
def test_nothing_the_size_of_a_latent_is_kept_but_the_inputs(loss, call: Calls):
    student, arguments = loss.inputs((2, 3, 2, 32, 32))
    known = {v.untyped_storage().data_ptr() for v in (student, *arguments.values()) if isinstance(v, Tensor)}
    for options in pools(loss)[:2]:
        kept = []

        def pack(tensor: Tensor, kept=kept) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                kept.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss.alone(student.detach().requires_grad_(), backend=call.backend, **arguments, **options)
        assert sum(kept) < 0.1 * student.nbytes


def test_a_relation_keeps_no_latent_at_all(call: Calls):
    student, arguments = RELATION.inputs((2, 3, 2, 32, 32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        RELATION.alone(student.requires_grad_(), backend=call.backend, **arguments)
    assert sum(kept) <= 2 * 3 * 2 + 2 * 2


@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo"])
def test_the_terms_of_dmd_report_magnitude_norms_and_the_guided_real(name, call: Calls):
    student, arguments = DMD.inputs((2, 6, 2, 4, 6), torch.bfloat16)
    options = {**arguments, "convention": name, "backend": call.backend, "return_terms": True}
    with call.ambient():
        terms = ops.dmd_loss(student, **options, return_real=True)
        assert ops.dmd_loss(student, **options).real is None
    assert terms.real.dtype is student.dtype
    assert [t.requires_grad for t in terms] == [False] * 4
    codmd = call(CODMD, student, {**arguments, "convention": name}, relation_weight=0.5)
    assert codmd.terms[1] == terms.loss
    real, uncond, scale = arguments["real"].float(), arguments["real_uncond"].float(), arguments["guidance"]
    guided = (uncond if name == "fastvideo" else real) + scale * (real - uncond)
    torch.testing.assert_close(terms.real.float(), guided, rtol=1e-2, atol=3e-2)
    shape = {"self_forcing": (2, -1), "longlive": (2, 2, -1), "fastvideo": (1, -1)}[name]
    norms = (student.float() - guided).abs().reshape(shape).mean(-1)
    torch.testing.assert_close(terms.norm, norms, rtol=1e-5, atol=0)
