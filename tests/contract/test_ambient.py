"""Ambient states: one shape a claim under each, in processes of their own; ``--every`` runs all claims under all."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from ambient import STATES
from cases import DTYPES
from fresh import in_fresh_process
from interpreted import INTERPRETED
from losses import CODMD, DECOUPLED, DMD, FORMS, RELATION, SHAPE, Calls, assert_same
from torch import Tensor
from torch.autograd import forward_ad

from codmd import backends

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter knows nothing of PyTorch's state")

OPTIONS = {
    "relation_loss": [
        {},
        {"pool": (2, 3)},
        {"pool": None},
        {"batch_weight": 0.0},
        {"temperature": 0.03},
        {"relation_features": "difference"},
        {"relation_features": "centred", "pool": None},
    ],
    "dmd_loss": [{}, {"convention": "longlive"}, {"convention": "fastgen", "layout": "bfchw"}, {"convention": "rcm"}],
    "codmd_loss": [{}, {"pool": (2, 3)}, {"pool": None}, {"convention": "fastvideo"}],
}


def compare(form: str, backend: str, state: str) -> None:
    """Every result under ``state`` is that of the plain state, bit for bit; thrice, as memory breaks late."""
    torch.set_num_threads(1)
    loss = FORMS[form]
    for dtype in DTYPES:
        for options in OPTIONS[loss.name]:
            student, arguments = loss.inputs(SHAPE, dtype, layout="bcfhw" if "rcm" in options.values() else "bfchw")
            if "pool" in options:
                options = {**options, "frame_mask": torch.arange(SHAPE[0] * SHAPE[1]).view(SHAPE[:2]) % 4 > 0}
            expected = Calls(backend)(loss, student, arguments, **options)
            for _ in range(3):
                found = Calls(backend, state)(loss, student, arguments, **options)
                assert found.terms.dtype is expected.terms.dtype
                many = state == "three threads"
                assert_same(found, expected, 1e-6 if many else 0, (1e-6 if dtype is torch.float32 else 2**-8) * many)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("state", [name for name in STATES if name != "plain"])
@pytest.mark.parametrize("form", FORMS)
def test_an_ambient_state_changes_nothing(form, state, backend):
    if backends.load(backend)[0] is None:
        pytest.skip(f"{backend}: {backends.load(backend)[1]}")
    in_fresh_process(compare, form, backend, state)


def crash() -> None:
    os.abort()


def test_a_crash_in_a_process_of_its_own_is_a_failed_test():
    with pytest.raises(Exception, match="terminated abruptly"):
        in_fresh_process(crash)


def relation_matrices(state: str) -> None:
    from codmd import ops

    student, _ = RELATION.inputs(SHAPE, torch.bfloat16)
    for axis in ("frame", "batch"):
        expected = ops.relation_matrix(student, axis=axis, pool=(2, 3))
        with STATES[state]():
            found = ops.relation_matrix(student, axis=axis, pool=(2, 3))
        assert torch.equal(found, expected)
        assert found.dtype is torch.float32


@pytest.mark.parametrize("state", [name for name in STATES if name != "plain"])
def test_an_ambient_state_changes_no_relation_matrix(state):
    in_fresh_process(relation_matrices, state)


def terms(state: str) -> None:
    from codmd import ops

    student, arguments = DMD.inputs(SHAPE, torch.bfloat16)
    for convention in ("self_forcing", "longlive"):
        options = {**arguments, "convention": convention, "return_terms": True, "return_real": True}
        expected = ops.dmd_loss(student, **options)
        with STATES[state]():
            found = ops.dmd_loss(student, **options)
        assert all(map(torch.equal, found, expected))
    for inputs in (CODMD.inputs, DECOUPLED.inputs):
        student, arguments = inputs(SHAPE, torch.bfloat16)
        codmd = ops.codmd_loss(student, **arguments)
        with STATES[state]():
            assert torch.equal(CODMD.alone(student, **arguments)[0], codmd)


@pytest.mark.parametrize("state", [name for name in STATES if name != "plain"])
def test_an_ambient_state_changes_no_reported_term(state):
    in_fresh_process(terms, state)


def other_operators(state: str) -> None:
    from codmd import compat, ops

    def dual(q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        with forward_ad.dual_level(), torch.no_grad():
            return tuple(forward_ad.unpack_dual(ops.attention(forward_ad.make_dual(q, q_dot), k, v)))

    def motion(*tensors: Tensor) -> tuple[Tensor, ...]:
        latents = (tensor[..., None] for tensor in tensors[:3])
        return ops.relation_loss(*latents, relation_features="difference", return_terms=True)

    def published(*tensors: Tensor) -> tuple[Tensor, ...]:
        total, log = compat.compute_copula_aware_loss(*(tensor[..., None] for tensor in tensors[:3]))
        return total, *log.values()

    exact = {} if state == "three threads" else {"rtol": 0, "atol": 0}
    # What autocast does to attention itself is PyTorch's to say: test_attention.py.
    functions = [ops.attention_jvp, motion, published, *([dual] if state != "autocast" else [])]
    for dtype in DTYPES:
        tensors = torch.randn(6, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
        for function in functions:
            expected = function(*tensors)
            # In inference mode PyTorch has no forward-mode differentiation.
            for mode in (nullcontext, *([] if function is dual else [torch.inference_mode])):
                with STATES[state](), mode():
                    found = function(*tensors)
                for value, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(value, other, **exact)


@pytest.mark.parametrize("state", STATES)
def test_an_ambient_state_changes_no_other_operator(state):
    in_fresh_process(other_operators, state)
