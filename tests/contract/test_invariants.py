"""Symmetries of the losses: of samples, frames, pixels, lengths and shifts."""

from __future__ import annotations

import pytest
import torch
from cases import POOLS, relative_error
from losses import CODMD, DMD, RELATION, SHAPE, assert_same, every_loss, related
from torch import Tensor


def everywhere(function, arguments: dict) -> dict:
    return {n: function(v) if isinstance(v, Tensor) and v.ndim == 5 else v for n, v in arguments.items()}


@every_loss
@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4])
def test_an_order_of_samples_frames_channels_or_pixels_is_no_information(axis, loss, call):
    student, arguments = loss.inputs(SHAPE)
    order = torch.randperm(SHAPE[axis], generator=torch.Generator().manual_seed(2))

    def permuted(v: Tensor) -> Tensor:
        return v.index_select(axis, order)

    found = call(loss, permuted(student), everywhere(permuted, arguments))
    terms, gradient = call(loss, student, arguments)
    assert_same(found, (terms, permuted(gradient)), 5e-6, 5e-6)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("scales", [(4.0, 0.5, 2.0), (1e-3, 3.0, 2.0)], ids=str)
def test_the_relation_sees_directions_and_not_lengths(scales, pool, call):
    student, arguments = RELATION.inputs(SHAPE, perturbation=0.5)
    scaled = {"real": arguments["real"] * scales[1], "fake": arguments["fake"] * scales[2]}
    found = call(RELATION, student * scales[0], scaled, pool=pool)
    terms, gradient = call(RELATION, student, arguments, pool=pool)
    assert_same(found, (terms, gradient / scales[0]), 1e-5, 1e-5)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_the_relation_has_no_gradient_along_the_student(pool, call):
    student, arguments = RELATION.inputs(SHAPE, perturbation=0.5)
    gradient = call(RELATION, student, arguments, pool=pool).gradient
    for axes in ((1, 2, 3, 4), (0, 1, 2, 3, 4)):
        along = (student * gradient).double().sum(axes)
        assert along.abs().max() < 1e-6 * student.norm() * gradient.norm()


@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo"])
def test_dmd_sees_distances_and_not_where_they_lie(name, call):
    student, arguments = DMD.inputs(SHAPE)
    found = call(DMD, student + 0.75, everywhere(lambda v: v + 0.75, arguments), convention=name)
    assert_same(found, call(DMD, student, arguments, convention=name), 1e-5, 1e-5)


@every_loss
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_latents_scaled_together_change_no_loss(scale, loss, call):
    student, arguments = loss.inputs(SHAPE)
    found = call(loss, student * scale, everywhere(lambda v: v * scale, arguments))
    terms, gradient = call(loss, student, arguments)
    assert relative_error(found.terms, terms) < 1e-5
    # DMD's ∂L/∂x is g/numel whatever the length of x; a relation's is the shorter, the longer x is.
    if loss is not CODMD:
        assert relative_error(found.gradient, gradient / (scale if loss is RELATION else 1)) < 1e-5


@related
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_scores_that_agree_ask_for_nothing(pool, loss, call):
    student, arguments = loss.inputs(SHAPE)
    arguments = {"real": arguments["real"], "fake": arguments["real"]}
    terms, gradient = call(loss, student, arguments, pool=pool)
    assert not terms.any()
    assert not gradient.any()


@related
@pytest.mark.parametrize("perturbation", [1e-6, 1e-3, 1.0, 30.0])
def test_a_divergence_is_never_negative(perturbation, loss, call):
    terms, _ = call(loss, *loss.inputs(SHAPE, perturbation=perturbation))
    assert (terms[-2:] >= 0).all()


def test_a_sample_alone_has_the_dmd_gradient_that_it_has_in_a_batch(call):
    student, arguments = DMD.inputs(SHAPE)
    whole = call(DMD, student, arguments)
    parts = [call(DMD, student[i : i + 1], everywhere(lambda v, i=i: v[i : i + 1], arguments)) for i in range(SHAPE[0])]
    assert relative_error(torch.stack([part.terms for part in parts]).mean(0), whole.terms) < 1e-6
    assert relative_error(torch.cat([part.gradient for part in parts]) / SHAPE[0], whole.gradient) < 1e-6


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_the_frame_term_is_the_mean_over_samples(pool, call):
    student, arguments = RELATION.inputs(SHAPE)
    upstream = (0.0, 0.0, 1.0)
    whole = call(RELATION, student, arguments, upstream, pool=pool)
    parts = [
        call(RELATION, student[i : i + 1], everywhere(lambda v, i=i: v[i : i + 1], arguments), upstream, pool=pool)
        for i in range(SHAPE[0])
    ]
    assert relative_error(torch.stack([part.terms[2] for part in parts]).mean(0), whole.terms[2]) < 1e-6
    assert relative_error(torch.cat([part.gradient for part in parts]) / SHAPE[0], whole.gradient) < 1e-6
