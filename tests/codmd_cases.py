"""Yardsticks of ``codmd_loss``: the two terms of the reference, one after the other."""

from __future__ import annotations

import torch
from cases import relative_error
from torch import Tensor

from codmd import conventions, ops, reference

UPSTREAMS = [(1.0, 0.0, 0.0, 0.0), (0.5, -2.0, 0.7, 3.0), (0.0, 0.0, 1.0, 0.0)]
RELATION = ("temperature", "batch_weight", "frame_weight", "pool", "frame_mask")


def terms_and_gradient(function, student: Tensor, upstream=UPSTREAMS[0], **options) -> tuple[Tensor, Tensor]:
    """The four terms and the gradient of their ``upstream``-weighted sum."""
    leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    terms = function(leaf, **options)
    sum(weight * term for weight, term in zip(upstream, terms, strict=True) if weight).backward()
    return torch.stack([term.detach().double() for term in terms]), leaf.grad


def fused(student: Tensor, **options) -> ops.CodmdTerms:
    return ops.codmd_loss(student, return_terms=True, **options)


def by_reference(student: Tensor, relation_weight: float = 0.1, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four terms of the float64 (or same-dtype) reference, from x0 predictions."""
    related = {name: options.pop(name) for name in RELATION if name in options}
    convention = conventions.resolve(options.get("convention", "self_forcing"))
    layout = options.get("layout") or convention.layout
    dmd = reference.dmd_loss(student, **options)
    dtype = reference.compute_dtype(student.dtype)
    flow = (options["noisy"], options["sigma"]) if "noisy" in options else (None, None)
    guided = []
    for name, scale in (("real", options["guidance"]), ("fake", options["fake_guidance"])):
        cond, uncond = options[name].to(dtype), options.get(f"{name}_uncond")
        uncond = None if uncond is None else uncond.to(dtype)
        guided.append(reference.x0_prediction(cond, uncond, scale, convention, layout, *flow).guided)
    axes = (student, *guided)
    if layout == "bchw":
        axes, layout = [v.unsqueeze(1) for v in axes], "bfchw"
    total, batch, frame = reference.relation_loss(*axes, layout=layout, **related)
    return dmd + relation_weight * total, dmd, batch, frame


def truth(student: Tensor, **options):
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in options.items()}
    return lambda upstream: terms_and_gradient(by_reference, student.double(), upstream, **wide)


def assert_as_good_as_torch(student: Tensor, backend: str, upstream, **options) -> None:
    """Within twice the error of the same-dtype PyTorch path, plus float32 rounding of the relation's small numbers."""
    options = {"guidance": 4.5, "fake_guidance": 1.2, **options}
    terms, gradient = terms_and_gradient(fused, student, upstream, backend=backend, **options)
    yard, yard_gradient = terms_and_gradient(by_reference, student, upstream, **options)
    true, true_gradient = truth(student, **options)(upstream)
    for found, plain, exact in zip(terms, yard, true, strict=True):
        assert relative_error(found, exact) <= 2 * relative_error(plain, exact) + 2e-5
    assert gradient.dtype == student.dtype
    assert relative_error(gradient, true_gradient) <= 2 * relative_error(yard_gradient, true_gradient) + 5e-6
