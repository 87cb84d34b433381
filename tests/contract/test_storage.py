"""Storage: any strides, offsets, expanded and overlapping memory, both layouts; what is read is never written."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS
from dmd_cases import mask_of
from losses import CODMD, DMD, SHAPE, Calls, assert_same, distributional, every_loss, pools, related
from torch import Tensor

WIDE = (*SHAPE[:4], 19)

VIEWS = {
    "rows cut out of wider ones": lambda v: torch.cat([v, v, v], dim=-1)[..., v.shape[-1] : 2 * v.shape[-1]],
    "every second pixel": lambda v: v.repeat_interleave(2, dim=-1)[..., ::2],
    "frames cut out of a longer video": lambda v: torch.cat([v, v.flip(0)], dim=1)[:, : v.shape[1]],
    "channels last": lambda v: v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "channels before frames": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2),
    "width before height": lambda v: v.mT.contiguous().mT,
    "samples last": lambda v: v.movedim(0, -1).contiguous().movedim(-1, 0),
    "an offset into storage": lambda v: torch.cat([v.new_zeros(3), v.flatten()])[3:].view(v.shape),
}


def moved(arguments: dict, view, names) -> dict:
    return {n: view(v) if isinstance(v, Tensor) and n in names else v for n, v in arguments.items()}


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_any_strides_give_the_contiguous_result(view, dtype, loss, call):
    student, arguments = loss.inputs(WIDE, dtype)
    limits = (3e-6, 3e-6 if dtype is torch.float32 else 2**-8)
    for options in pools(loss):
        expected = call(loss, student, arguments, **options)
        for moved_student, names in ((view(student), ()), (student, ("real",)), (view(student), arguments)):
            found = call(loss, moved_student, moved(arguments, view, names), **options)
            assert_same(found, expected, *limits)


@distributional
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_velocities_masks_and_noise_levels_may_be_strided(view, loss, call):
    student, arguments = loss.inputs(WIDE, torch.bfloat16, flow=True)
    mask = mask_of("elements", student)
    arguments |= {"prediction": "flow", "mask": mask}
    expected = call(loss, student, arguments)
    sigma = torch.stack([arguments["sigma"], arguments["sigma"] + 1], dim=-1)[..., 0]
    found = call(loss, student, {**moved(arguments, view, arguments.keys() - {"sigma"}), "sigma": sigma})
    assert_same(found, expected, 3e-6, 2**-8)


@pytest.mark.parametrize("name", ["noisy", "fake", "real_uncond"])
def test_one_strided_latent_among_contiguous_ones_is_read_by_its_strides(name, call):
    student, arguments = DMD.inputs(WIDE, flow=True)
    arguments = {**arguments, "prediction": "flow", "fake_uncond": None}
    apart = torch.stack([arguments[name], arguments[name] + 1], dim=-1)[..., 0]
    assert_same(call(DMD, student, {**arguments, name: apart}), call(DMD, student, arguments), 3e-6, 3e-6)


@every_loss
@pytest.mark.parametrize("axis", range(5))
def test_expanded_latents_are_read_in_place(axis, loss, call):
    student, arguments = loss.inputs(SHAPE, perturbation=0.3)

    def expanded(v: Tensor) -> Tensor:
        return v.narrow(axis, 0, 1).expand(SHAPE)

    assert expanded(student).stride(axis) == 0
    # Channels that are all the same have cosines of ±1, whose changes are nothing but rounding.
    for options in [{"pool": (2, 3)}] if loss is CODMD else pools(loss):
        found = call.assert_accurate(loss, expanded(student), moved(arguments, expanded, arguments), **options)
        assert found.gradient.is_contiguous()


@every_loss
def test_latents_that_overlap_in_storage_are_read_in_place(loss, call):
    student, arguments = loss.inputs(SHAPE)
    room = torch.randn(100, generator=torch.Generator().manual_seed(1))

    def windows(offset: int) -> Tensor:
        return room[offset:].as_strided(SHAPE, (7, 3, 5, 2, 1))

    arguments |= {"real": windows(0), "fake": windows(2)}
    for latents in (student, windows(1), arguments["real"]):
        call.assert_accurate(loss, latents, arguments)


@every_loss
def test_one_tensor_may_be_every_argument(loss, call):
    student, arguments = loss.inputs(SHAPE)
    same = {name: student if isinstance(value, Tensor) else value for name, value in arguments.items()}
    terms, gradient = call(loss, student, same)
    assert not terms.any()
    assert not gradient.any()


@every_loss
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_give_one_result(layout, loss, call):
    student, arguments = loss.inputs(SHAPE)
    expected = call(loss, student, arguments, layout="bfchw")
    if layout == "bcfhw":
        student, arguments = student.transpose(1, 2), moved(arguments, lambda v: v.transpose(1, 2), arguments)
    found = call(loss, student, arguments, layout=layout)
    gradient = found.gradient.transpose(1, 2) if layout == "bcfhw" else found.gradient
    assert_same((found.terms, gradient), expected, 1e-6, 1e-6)


@every_loss
@pytest.mark.parametrize("view", [VIEWS["channels last"], VIEWS["width before height"]], ids=["channels", "width"])
def test_the_gradient_keeps_the_students_memory_format(view, loss, call):
    student, arguments = loss.inputs(SHAPE)
    for options in pools(loss):
        found = call(loss, view(student), arguments, **options)
        assert found.gradient.stride() == view(student).stride()


@related
@pytest.mark.parametrize("pool", ["mean", None], ids=str)
def test_strided_frame_masks_are_read_in_place(pool, loss, call):
    student, arguments = loss.inputs(SHAPE)
    mask = torch.rand(SHAPE[:2], generator=torch.Generator().manual_seed(0)) > 0.3
    strided = torch.stack([~mask, mask], dim=-1).transpose(0, 1)[..., 1].t()
    assert not strided.is_contiguous()
    expected = call(loss, student, arguments, frame_mask=mask, pool=pool)
    assert_same(call(loss, student, arguments, frame_mask=strided, pool=pool), expected)


@every_loss
def test_a_call_writes_to_nothing_it_was_given(loss, call: Calls):
    for options in pools(loss):
        student, arguments = loss.inputs(SHAPE)
        upstream = torch.full((), 2.0)
        given = [student, upstream, *(v for v in arguments.values() if isinstance(v, Tensor))]
        before = [v.clone() for v in given]
        with call.ambient():
            leaf = student.requires_grad_()
            loss.alone(leaf, backend=call.backend, **arguments, **options)[0].backward(upstream)
        assert all(map(torch.equal, given, before))
