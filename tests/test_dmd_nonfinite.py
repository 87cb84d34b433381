"""``dmd_loss`` where a norm is zero or a number is not finite: repaired, dropped or shown, as the convention says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dmd_cases import BACKENDS, assert_as_good_as_torch, run, same_dtype, scores
from dmd_formulas import FORMULAS

from codmd import conventions, ops
from codmd.conventions import NAMED


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo"])
def test_a_zero_norm_gives_what_nan_to_num_makes_of_infinity(name, backend):
    student, arguments = scores(dtype=torch.bfloat16)
    plain = {"fake": arguments["fake"], "real": student.clone()}
    plain["fake"][:, :, 0] = student[:, :, 0]
    value, gradient = run(ops.dmd_loss, student, plain, convention=name, backend=backend)
    f, c = plain["fake"].float(), plain["real"].float()
    _, expected = run(FORMULAS[name], student.float(), {"f": f, "c": c, "u": c}, s=3.5)
    assert value == torch.inf
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-2, atol=0)
    assert gradient[:, :, 0].abs().max() == 0
    assert gradient[plain["fake"] != student].abs().min() > 1e34
    same, nothing = run(ops.dmd_loss, student, {"fake": student, "real": student}, convention=name, backend=backend)
    assert same == 0
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_norm_without_repair_is_not_hidden(backend):
    student, arguments = scores()
    bare = replace(conventions.self_forcing, nan="keep")
    value, gradient = run(
        ops.dmd_loss, student, {**arguments, "real": student, "real_uncond": student}, convention=bare, backend=backend
    )
    assert not value.isfinite()
    assert not gradient.isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["fake", "real", "real_uncond"])
@pytest.mark.parametrize("name", ["self_forcing", "rcm", "fastgen"])
def test_a_bad_prediction_in_one_sample_does_what_the_policy_says(name, where, bad, backend):
    student, arguments = scores(layout=NAMED[name].layout)
    arguments[where][0, 0, 1, 2, 3] = bad
    value, gradient = run(ops.dmd_loss, student, arguments, convention=name, backend=backend)
    expected, expected_gradient = same_dtype(student, arguments, convention=name)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0, equal_nan=True)
    rounding = 1e-6 * float(expected_gradient[1].abs().max())
    torch.testing.assert_close(gradient[1], expected_gradient[1], rtol=1e-5, atol=rounding)
    torch.testing.assert_close(gradient[0], expected_gradient[0], rtol=1e-5, atol=rounding, equal_nan=True)
    assert gradient[1].isfinite().all()
    if name == "rcm" and where != "fake" and bad is torch.nan:
        assert gradient[0].abs().max() == 0
    if name == "fastgen":
        assert not value.isfinite() or where == "real"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["self_forcing", "fastvideo", "fastgen"])
def test_a_bad_student_reaches_the_loss(name, bad, backend):
    student, arguments = scores(layout=NAMED[name].layout)
    student[0, 0, 1, 2, 3] = bad
    value, gradient = run(ops.dmd_loss, student, arguments, convention=name, backend=backend)
    assert value.isnan()
    assert gradient[0, 0, 1, 2, 3].isnan()
    if name != "fastvideo":
        assert gradient[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_sample_is_dropped_under_zero_sample(backend):
    student, arguments = scores(layout="bcfhw")
    student[0, 0, 1, 2, 3] = torch.nan
    value, gradient = run(ops.dmd_loss, student, arguments, convention="rcm", backend=backend)
    rest = {name: tensor[1:] for name, tensor in arguments.items()}
    expected, expected_gradient = run(ops.dmd_loss, student[1:], rest, convention="rcm", backend=backend)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[1:], expected_gradient)
    assert gradient[0].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_mask_leaves_out_never_leaks(backend):
    student, arguments = scores()
    mask = torch.ones(2, 7, 1, 1, 1, dtype=torch.bool)
    mask[:, -1] = False
    arguments["fake"][:, -1] = torch.nan
    value, gradient = run(ops.dmd_loss, student, arguments, mask=mask, backend=backend)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient[:, -1].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_that_overflows_in_its_own_dtype_does_not_in_float32(backend):
    student, arguments = scores(dtype=torch.float16)
    student, arguments = student * 3e4, {name: value * 3e4 for name, value in arguments.items()}
    assert not (arguments["real"] - student).isfinite().all()
    finite = {name: value.clamp(-6e4, 6e4) for name, value in arguments.items()}
    assert_as_good_as_torch(student.clamp(-6e4, 6e4), finite, backend)
