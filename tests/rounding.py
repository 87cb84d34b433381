"""What one float32 rounding of each intermediate does to the relation loss.

PyTorch's float32 path is one draw of its rounding errors, and may lie far below what float32 can promise: where the
two samples of a batch nearly agree, rounding the features once moves the batch term by 1.7e-4 of itself while PyTorch
happens to be 1.1e-5 off. A kernel that rounds as often is another draw, so errors are compared with the larger of both.
"""

from __future__ import annotations

from importlib import import_module
from unittest.mock import patch

import torch
from cases import loss_and_gradient, same_dtype_errors, truth
from torch import Tensor

from codmd import reference

equations = import_module("codmd.reference.relation")  # the package exports a function of this name

EPS = 2.0**-24
"""Half the distance of neighbouring float32 numbers, relative."""

TINY = torch.finfo(torch.float32).tiny


def response(student: Tensor, real: Tensor, fake: Tensor, draws: int = 64, **kwargs) -> tuple[Tensor, float]:
    """(largest change of each of the three terms, of the gradient's norm) over random signs of the roundings.

    The float64 reference, with what its equations name rounded once: the features φ and ψ of student, real and
    difference, the unit vectors u, r̂ and their change e, log q and x, by EPS of themselves; S and Δ, by EPS of the
    products that they are sums of; a feature whose pixels (frames) cancel, by EPS of a partial sum, the root of their
    summed squares over their number.
    """
    signs = torch.Generator().manual_seed(0)

    def rounded(value: Tensor, size: Tensor | None = None) -> Tensor:
        sign = (torch.randint(0, 2, value.shape, generator=signs) * 2 - 1).to(value.device)
        size = (value if size is None else size).detach()
        return value + EPS * sign * torch.where(size.isfinite(), size, 0)  # log q is -inf in masked columns

    def features(exact):
        def function(source, *args):
            value = exact(source, *args)
            partial = (exact(source.detach().square(), *args) * value.numel() / source.numel()).sqrt()
            return rounded(value, torch.maximum(value.abs(), partial))

        return function

    def score_difference(exact, change):
        def function(real, difference):
            size = change(real, difference)[1].norm(dim=-1)
            return rounded(exact(real, difference), size[..., :, None] + size[..., None, :])

        return function

    def each(exact):
        return lambda *args: tuple(map(rounded, exact(*args)))

    roundings = {
        "frame_features": features(equations.frame_features),
        "batch_features": features(equations.batch_features),
        "unit_vectors": lambda *args, exact=equations.unit_vectors: rounded(exact(*args)),
        "unit_difference": each(equations.unit_difference),
        "relation": lambda *args, exact=equations.relation: rounded(exact(*args), torch.ones(()).to(args[0])),
        "score_difference_relation": score_difference(equations.score_difference_relation, equations.unit_difference),
        "student_log_probability": lambda *args, exact=equations.student_log_probability: rounded(exact(*args)),
        "expm1_minus": lambda x, exact=equations.expm1_minus: exact(rounded(x)),
    }
    exact_terms, exact_gradient = truth(student, real, fake, **kwargs)
    wide = [v.detach().double() for v in (student, real, fake)]
    terms, gradient = torch.zeros_like(exact_terms), 0.0
    with patch.multiple(equations, **roundings):
        for _ in range(draws):
            found = loss_and_gradient(reference.relation_loss, *wide, **kwargs)
            terms = torch.maximum(terms, (found[0] - exact_terms).abs())
            gradient = max(gradient, float((found[1] - exact_gradient).norm()))
    return terms, gradient


def assert_close_to_truth(
    found: tuple[Tensor, Tensor], student: Tensor, real: Tensor, fake: Tensor, factor: float = 2, **kwargs
) -> None:
    """(terms, gradient) against float64: errors of at most twice those of PyTorch in the same dtype plus 1e-6, or else
    of at most twice what one rounding of each intermediate can do. The gradient's may be ``factor`` times PyTorch's."""
    inputs, upstream = (student, real, fake), kwargs.pop("upstream", (1.0, 0.0, 0.0))
    exact_terms, exact_gradient = truth(*inputs, upstream, **kwargs)
    sizes = [*exact_terms.abs().tolist(), float(exact_gradient.norm())]

    terms, gradient = found
    errors = [*(terms.double() - exact_terms).abs().tolist(), float((gradient.double() - exact_gradient).norm())]
    usual = same_dtype_errors(*inputs, exact_terms, exact_gradient, upstream, **kwargs)
    rows = zip((2, 2, 2, factor), usual, sizes, strict=True)
    limits = [(many * other + 1e-6) * (size or 1.0) + TINY for many, other, size in rows]
    if any(not error <= limit for error, limit in zip(errors, limits, strict=True)):
        terms, gradient = response(*inputs, upstream=upstream, **kwargs)
        limits = [max(limit, 2 * one) for limit, one in zip(limits, [*terms.tolist(), gradient], strict=True)]
    for name, error, limit in zip(("total", "batch", "frame", "gradient"), errors, limits, strict=True):
        assert error <= limit, f"{name}: {error:.1e} > {limit:.1e} for {tuple(student.shape)} {student.dtype} {kwargs}"


def assert_as_accurate_as_pytorch(function, student: Tensor, real: Tensor, fake: Tensor, **kwargs) -> None:
    """:func:`assert_close_to_truth` of what ``function`` finds."""
    assert_close_to_truth(loss_and_gradient(function, student, real, fake, **kwargs), student, real, fake, **kwargs)
