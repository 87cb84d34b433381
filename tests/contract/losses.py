"""The three losses in one form: inputs, the operator on a backend, the reference, and how accurate is accurate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from ambient import STATES
from cases import POOLS, latents, relative_error
from codmd_cases import by_reference
from dmd_cases import scores
from interpreted import INTERPRETED
from rounding import assert_close_to_truth
from torch import Tensor

from codmd import ops, reference

SHAPE = (2, 3, 2, 3, 4) if INTERPRETED else (3, 5, 3, 4, 6)
"""Whatever has no shape of its own to show. The interpreter takes 25 ms for every program of a launch."""


@dataclass(frozen=True)
class Loss:
    """One operator and its reference, both of (student, **arguments); the reference returns the terms, total first."""

    function: Callable[..., Any]
    reference: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[..., tuple[Tensor, dict[str, Any]]]
    """(student, arguments) of (shape, dtype, layout, perturbation, seed); the tensors that a call must have."""
    upstream: tuple[float, ...]
    """Weights of the terms, other than one, in the sum that is differentiated."""
    rounding: tuple[float, float]
    """What float32 may add to the relative errors of terms and gradient, beside twice PyTorch's."""

    @property
    def name(self) -> str:
        return self.function.__name__

    def operator(self, student: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """The terms that have a gradient."""
        terms = self.function(student, return_terms=True, **options)
        return terms[: len(self.upstream)]

    def alone(self, student: Tensor, **options: Any) -> tuple[Tensor]:
        """The total, which calls that ask for no terms find on a path of their own."""
        return (self.function(student, **options),)

    @property
    def total(self) -> tuple[float, ...]:
        return (1.0, *[0.0] * (len(self.upstream) - 1))


def relation_inputs(*args, **kwargs) -> tuple[Tensor, dict[str, Any]]:
    student, real, fake = latents(*args, **kwargs)
    return student.detach(), {"real": real, "fake": fake}


def dmd_inputs(*args, **kwargs) -> tuple[Tensor, dict[str, Any]]:
    student, arguments = scores(*args, **kwargs)
    return student, {**arguments, "guidance": 4.5, "fake_guidance": 1.2}


RELATION = Loss(
    ops.relation_loss,
    reference.relation_loss,
    relation_inputs,
    (0.7, 0.3, -0.2),
    (1e-6, 1e-6),
)
DMD = Loss(
    ops.dmd_loss,
    lambda student, **options: (reference.dmd_loss(student, **options),),
    dmd_inputs,
    (-1.7,),
    (5e-7, 5e-7),
)
CODMD = Loss(
    ops.codmd_loss,
    by_reference,
    dmd_inputs,
    (0.5, -2.0, 0.7, 3.0),
    (2e-5, 5e-6),
)
LOSSES = (RELATION, DMD, CODMD)


def decoupled_inputs(*args, **kwargs) -> tuple[Tensor, dict[str, Any]]:
    """Those of DMD at one noise level, and the guidance of a second."""
    (student, arguments), (second, others) = (dmd_inputs(*args, seed=seed, **kwargs) for seed in (0, 1))
    uncond = second + others["fake"] - others["real"]
    return student, {**arguments, "real_uncond": None, "augment_real": second, "augment_uncond": uncond}


DECOUPLED = replace(DMD, inputs=decoupled_inputs)
FORMS = {**{loss.name: loss for loss in LOSSES}, "decoupled": DECOUPLED}


def each(*losses: Loss) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", losses, ids=lambda loss: loss.name)


every_form = pytest.mark.parametrize("loss", FORMS.values(), ids=FORMS)
every_loss, related, distributional = each(*LOSSES), each(RELATION, CODMD), each(DMD, CODMD)


def pools(loss: Loss) -> list[dict[str, Any]]:
    """Options of a call with each way of pooling; the most of one way alone for the interpreter."""
    if loss in (DMD, DECOUPLED):
        return [{}]
    if INTERPRETED:
        return [{"pool": None if loss is RELATION else (2, 3)}]
    return [{"pool": pool} for pool in POOLS]


NUMBERS = [(loss, name) for loss in (RELATION, CODMD) for name in ("temperature", "batch_weight", "frame_weight")]
NUMBERS += [(loss, name) for loss in (DMD, CODMD) for name in ("guidance", "fake_guidance")]
NUMBERS += [(CODMD, "relation_weight")]
every_number = pytest.mark.parametrize(("loss", "name"), NUMBERS, ids=lambda value: getattr(value, "name", value))


class Found(NamedTuple):
    """Terms ``[T]`` and the gradient of their weighted sum."""

    terms: Tensor
    gradient: Tensor


def evaluate(function, student: Tensor, upstream: tuple[float, ...], **options) -> Found:
    leaf = student.detach().requires_grad_(student.is_floating_point())
    terms = function(leaf, **options)
    loss = sum(weight * term for weight, term in zip(upstream, terms, strict=True) if weight)
    gradient = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)
    return Found(torch.stack([term.detach() for term in terms]), gradient)


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with every floating tensor in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


class Calls(NamedTuple):
    """One backend in one ambient state: where every claim calls its operators."""

    backend: str
    state: str = "plain"

    def ambient(self) -> AbstractContextManager:
        return STATES[self.state]()

    def __call__(self, loss: Loss, student: Tensor, arguments: dict, upstream=None, **options) -> Found:
        """Terms of the operator and their gradient."""
        return self.of(loss.operator, student, upstream or loss.upstream, **arguments, **options)

    def of(self, function: Callable[..., tuple[Tensor, ...]], student: Tensor, upstream, **options) -> Found:
        """The same of any function that takes a backend."""
        with self.ambient():
            return evaluate(function, student, upstream, backend=self.backend, **options)

    def assert_accurate(self, loss: Loss, student: Tensor, arguments: dict, upstream=None, **options) -> Found:
        """Errors of terms and gradient against float64 at most twice those of PyTorch in the same dtype.

        The interpreter truncates where hardware rounds to bfloat16: twice the error of a gradient, 2⁻⁷ of one element.
        """
        upstream, options = upstream or loss.upstream, {**arguments, **options}
        found = self(loss, student, options, upstream)
        assert found.gradient.dtype is student.dtype
        assert found.gradient.shape == student.shape
        truncated = self.backend == "triton" and student.dtype is torch.bfloat16
        factor = 4 if truncated else 2
        if loss is RELATION:
            assert_close_to_truth(found, student, upstream=upstream, factor=factor, **options)
            return found
        exact = evaluate(loss.reference, student.double(), upstream, **widened(options))
        usual = evaluate(loss.reference, student, upstream, **options)
        for term, (value, other, true) in enumerate(zip(found.terms, usual.terms, exact.terms, strict=True)):
            error, allowed = relative_error(value, true), 2 * relative_error(other, true) + loss.rounding[0]
            assert error <= allowed, f"term {term}: {float(value):.6g} for {float(true):.6g}"
        error, usual_error = (relative_error(one.gradient, exact.gradient) for one in (found, usual))
        allowed = max(factor * usual_error + loss.rounding[1], 2**-7 * truncated)
        by_sample = (found.gradient.double() - exact.gradient).flatten(1).norm(dim=1).tolist()
        assert error <= allowed, f"gradient: relative error {error:.2g}, allowed {allowed:.2g}; by sample {by_sample}"
        return found


def assert_same(found: Found, expected: Found, terms: float = 0.0, gradient: float = 0.0) -> None:
    """Within relative errors; bit for bit at 0."""
    for value, other, limit in zip(found, expected, (terms, gradient), strict=True):
        assert relative_error(value, other) <= limit if limit else torch.equal(value, other)
