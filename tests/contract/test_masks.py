"""Masks and weights: what is left out neither counts nor leaks."""

from __future__ import annotations

import pytest
import torch
from cases import POOLS, frame_mask
from dmd_cases import mask_of
from losses import CODMD, DMD, RELATION, SHAPE, assert_same, distributional, related
from torch import Tensor

SAMPLES, FRAMES = SHAPE[:2]


@related
@pytest.mark.parametrize("layout", ["bfchw", "bcfhw"])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_the_error_holds_under_a_frame_mask(pool, layout, loss, call):
    inputs = loss.inputs((SAMPLES, *SHAPE[1:]), layout=layout)
    for mask in (frame_mask(SAMPLES, FRAMES), torch.ones(SAMPLES, FRAMES, dtype=torch.bool)):
        call.assert_accurate(loss, *inputs, layout=layout, pool=pool, frame_mask=mask)


@related
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_frame_mask_is_the_video_without_those_frames(pool, loss, call):
    student, arguments = loss.inputs((1, *SHAPE[1:]))
    mask = torch.arange(FRAMES)[None] != 1

    def kept(v):
        return v[mask][None] if isinstance(v, Tensor) else v

    upstream = (*[0.0] * (len(loss.upstream) - 1), 1.0)
    found = call(loss, student, arguments, upstream, frame_mask=mask, pool=pool)
    expected = call(loss, kept(student), {n: kept(v) for n, v in arguments.items()}, upstream, pool=pool)
    assert_same((found.terms[-1], kept(found.gradient)), (expected.terms[-1], expected.gradient), 1e-5, 1e-5)
    assert not found.gradient[~mask].any()


@related
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_an_empty_frame_mask_leaves_no_relation(pool, loss, call):
    nothing = torch.zeros(SAMPLES, FRAMES, dtype=torch.bool)
    relation = (*[0.0] * (len(loss.upstream) - 2), 1.0, 1.0)
    terms, gradient = call(loss, *loss.inputs(SHAPE), relation, frame_mask=nothing, pool=pool)
    assert terms[-2:].tolist() == [0, 0]
    assert not gradient.any()


@related
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_frame_mask_changes_the_total(pool, loss, call):
    """Composed or fused, single sample or several."""
    options = {"pool": pool, **({"relation_weight": 100.0} if loss is CODMD else {})}
    for samples in (1, SAMPLES):
        student, arguments = loss.inputs((samples, *SHAPE[1:]))
        mask = torch.ones(samples, FRAMES, dtype=torch.bool)
        whole = call.of(loss.alone, student, (1.0,), frame_mask=mask, **arguments, **options)
        mask[:, -2:] = False
        part = call.of(loss.alone, student, (1.0,), frame_mask=mask, **arguments, **options)
        assert abs(part.terms - whole.terms) > 1e-3 * whole.terms
        assert not torch.equal(part.gradient, whole.gradient)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_masked_frames_never_leak(value, pool, call):
    student, arguments = RELATION.inputs(SHAPE)
    mask = frame_mask(SAMPLES, FRAMES)
    expected = call(RELATION, student, arguments, frame_mask=mask, pool=pool)
    for v in (student, *arguments.values()):
        v[~mask] = value
    found = call(RELATION, student, arguments, frame_mask=mask, pool=pool)
    assert_same(found, expected)
    assert not found.gradient[~mask].any()


@distributional
@pytest.mark.parametrize("kind", ["elements", "frames", "one", "all", "nothing"])
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo", "rcm", "tdm"])
def test_the_error_holds_under_a_mask(name, kind, loss, call):
    for layout in ("bfchw", "bchw"):
        student, arguments = loss.inputs((2, 4, 2, 3, 5), torch.bfloat16, layout)
        mask = mask_of(kind, student)
        call.assert_accurate(loss, student, arguments, convention=name, layout=layout, mask=mask)


@pytest.mark.parametrize("kind", ["elements", "frames", "one", "nothing"])
def test_what_a_mask_leaves_out_has_no_gradient(kind, call):
    student, arguments = DMD.inputs(SHAPE)
    mask = mask_of(kind, student)
    arguments["fake"] = torch.where(mask, arguments["fake"], torch.nan)
    terms, gradient = call(DMD, student, arguments, mask=mask)
    assert terms.isfinite().all()
    assert (gradient != 0).sum() == mask.expand(SHAPE).sum()
    assert not gradient[~mask.expand(SHAPE)].any()


@distributional
@pytest.mark.parametrize("shape", [SHAPE, (*SHAPE[:3], 1, 1), (1, FRAMES, 1, 1, SHAPE[4]), SHAPE[4:], ()], ids=str)
def test_masks_of_any_broadcastable_shape_select(shape, loss, call):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    call.assert_accurate(loss, *loss.inputs(SHAPE), mask=mask)


@distributional
@pytest.mark.parametrize("name", ["self_forcing", "fastgen", "fastvideo", "rcm"])
def test_weights_scale_each_sample(name, loss, call):
    student, arguments = loss.inputs(SHAPE)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight = torch.tensor([0.0, 2.5, 1.0], dtype=dtype)[:SAMPLES]
        call.assert_accurate(loss, student, arguments, convention=name, layout="bfchw", sample_weight=weight)
    relation_apart = {"relation_weight": 0.0} if loss is CODMD else {}
    found = call(loss, student, arguments, sample_weight=weight, convention=name, layout="bfchw", **relation_apart)
    assert not found.gradient[0].any()


@pytest.mark.parametrize("pool", ["mean", (2, 3), SHAPE[3:]], ids=str)
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "rcm", "fastgen", "fastvideo", "tdm"])
def test_every_option_of_both_terms_at_once(name, pool, call):
    student, arguments = CODMD.inputs(SHAPE, torch.bfloat16)
    call.assert_accurate(
        CODMD, student, arguments, convention=name, layout="bfchw", pool=pool, temperature=0.3, batch_weight=0.4,
        frame_weight=1.7, relation_weight=0.8, sample_weight=torch.tensor([1.0, 0.5, 2.0])[:SAMPLES],
        mask=mask_of("elements", student), frame_mask=frame_mask(SAMPLES, FRAMES),
    )  # fmt: skip
