"""Numbers at the edges in the C++ and CUDA extensions: the value of float64, or one that is not finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_calls import (
    EXTENSIONS,
    ONE,
    forward,
    gradient,
    objective_call,
    relation_call,
    simulated,
    widened,
)  # fmt: skip
from cases import plain_relation, relative_error

from codmd import conventions
from codmd.conventions import NAMED, self_forcing
from codmd.ops.backends import cpp, reference
from codmd.ops.contract import Relation, Upstream

SCALES = [1e37, 1e30, 1e20, 1e16, 1e-12, 1e-16, 1e-20, 1e-23, 1e-30]
POOLS = [(1, 1), (2, 3), None]
THREES = replace(self_forcing, norm_scope="block", norm_block=3)
HUBER = replace(self_forcing, penalty="huber", norm_divides="loss", nan="keep", huber_c=0.5)
LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(params=EXTENSIONS)
def run(request, monkeypatch):
    with simulated(request.param, monkeypatch) as found:
        yield found


def truth(call):
    """(terms, gradient) of the float64 reference."""
    wide = widened(call)
    found = forward(reference, wide)
    return found.terms, gradient(reference, wide, found, Upstream(*(term.double() for term in ONE)))


def assert_right(value, exact, allowed=2e-5):
    assert relative_error(value, exact) <= allowed, (value, exact)


def assert_right_or_not_finite(value, exact, allowed=2e-5):
    assert not value.isfinite().all() or relative_error(value, exact) <= allowed, (value, exact)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("convention", [self_forcing, THREES, NAMED["fastvideo"], NAMED["tdm"]], ids=range(4))
def test_the_dmd_loss_is_right_at_every_scale_of_the_latents(run, convention, scale):
    for plain in (True, False):
        call = objective_call(convention, related=False, scale=scale, plain=plain)
        found, (terms, grad) = forward(run, call), truth(call)
        assert_right(found.terms, terms)
        assert_right(gradient(run, call, found), grad)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("convention", [self_forcing, THREES, NAMED["fastvideo"]], ids=range(3))
def test_the_decoupled_loss_is_right_at_every_scale_of_the_latents(run, convention, scale):
    call = objective_call(convention, related=False, scale=scale, decoupled=True)
    found, (terms, grad) = forward(run, call), truth(call)
    assert_right(found.terms, terms)
    assert_right(gradient(run, call, found), grad)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("name", [name for name, rule in NAMED.items() if rule.fusable and not rule.undecouplable])
def test_the_decoupled_loss_and_its_relation_follow_the_reference(run, name, dtype, rounding):
    for pool, shape in (((2, 3), (3, 5, 4, 6, 7)), ((1, 1), (2, 3, 2, 16, 40))):
        call = objective_call(NAMED[name], dtype=dtype, shape=shape, pool=pool, decoupled=True)
        strided = {k: v.transpose(3, 4).contiguous().transpose(3, 4) for k, v in call._asdict().items()
                   if k in ("student", "fake", "augment_uncond")}  # fmt: skip
        terms, grad = truth(call)
        for same in (call, call._replace(**strided), call._replace(mask=None)):
            if same.mask is None:
                terms, grad = truth(same)
            found = forward(run, same)
            assert_right(found.terms, terms, 1e-5)
            assert_right(gradient(run, same, found), grad, rounding)


@pytest.mark.parametrize("nan", ["to_num", "zero_sample", "keep"])
def test_either_half_of_a_decoupled_loss_keeps_to_the_nan_policy(run, nan):
    convention = replace(self_forcing, nan=nan)
    for name, value in (("fake", torch.nan), ("augment_uncond", torch.nan), ("augment_uncond", torch.inf)):
        call = objective_call(convention, decoupled=True, related=False)._replace(mask=None)
        odd = getattr(call, name).clone()
        odd[1, 2, 3] = value
        call = call._replace(**{name: odd})
        found, exact = forward(run, call), forward(reference, call)
        for ours, theirs in (
            (found.terms[:4], exact.terms[:4]),
            (found.factors, exact.factors),
            (gradient(run, call, found), gradient(reference, call, exact)),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8, equal_nan=True)


def test_one_level_of_a_decoupled_loss_that_float32_cannot_hold_is_not_a_loss_of_zero(run):
    call = objective_call(self_forcing, related=False, decoupled=True)
    far = torch.full_like(call.student, LARGEST)
    second, first = {"augment_real": -far, "augment_uncond": far}, {"real": -far, "fake": far}
    lost_norm = {"augment_real": -far, "augment_uncond": -0.95 * far, "student": far}
    for change in (second, first, lost_norm, {"augment_real": -far, "student": far}):
        odd = call._replace(**change)
        found = forward(run, odd)
        assert not found.terms[:2].isfinite().any()
        assert not gradient(run, odd, found)[odd.mask].isfinite().any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("pool", POOLS)
def test_the_relation_is_right_or_not_finite_at_every_scale_of_the_latents(run, pool, scale):
    call = relation_call(pool, scale=scale)
    found, (terms, grad) = forward(run, call), truth(call)
    written = gradient(run, call, found)
    if run is cpp:
        assert_right(found.terms[terms > 1e-37], terms[terms > 1e-37])
    elif scale >= 1e-20:
        assert_right_or_not_finite(found.terms, terms, 1e-4)
    if scale >= 1e-20:
        # Beyond 1e30, a gradient of 1/scale has no more than the digits of its subnormal numbers.
        assert_right_or_not_finite(written, grad, 2e-3 if scale > 1e30 else 2e-4)


@pytest.mark.parametrize("scale", [1e37, 1e20, 1e-20, 1e-23])
def test_the_relation_of_an_objective_keeps_to_the_same_rule(run, scale):
    call = objective_call(self_forcing, scale=scale, plain=True)
    found, (terms, grad) = forward(run, call), truth(call)
    assert_right(found.terms[1], terms[1])
    assert_right_or_not_finite(found.terms, terms)
    assert_right_or_not_finite(gradient(run, call, found), grad)


def test_long_gathered_rows_keep_to_the_same_rule(run):
    for scale in (1e30, 1e20, 1.0, 1e-20):
        call = relation_call((8, 8), (4, 2, 65, 8, 8), scale=scale)
        pending = run.features(call)
        found = run.gathered(call, pending, pending.rows, 0, 1.0)
        exact = forward(reference, widened(call))
        assert_right_or_not_finite(found.terms, exact.terms, 1e-4)
        assert_right_or_not_finite(found.batch_grad, exact.batch_grad, 1e-3)
        if run is cpp:
            assert_right(found.terms, exact.terms)


@pytest.mark.parametrize("convention", [self_forcing, NAMED["fastvideo"], NAMED["simpletuner"]], ids=range(3))
def test_a_distance_that_float32_cannot_hold_is_not_a_loss_of_zero(run, convention):
    call = objective_call(convention, related=False, plain=True)
    far = torch.full_like(call.student, LARGEST)
    for change in ({"student": far, "real": -far}, {"fake": far, "real": -far}):
        changed = call._replace(**change)
        found = forward(run, changed)
        assert not found.terms[:2].isfinite().any()
        assert not gradient(run, changed, found).isfinite().any()


def test_a_guided_prediction_that_float32_cannot_hold_is_not_a_loss_of_zero(run):
    call = objective_call(self_forcing, related=False, scale=1e38)
    found = forward(run, call._replace(sigma=None, noisy=None))
    assert not found.terms[:2].isfinite().any()


def test_a_norm_without_digits_is_not_a_loss(run):
    """2e-45 is one of float32's last numbers: the mean of such distances rounds to nothing or to twice itself."""
    call = objective_call(self_forcing, related=False, plain=True)
    small = call._replace(student=torch.full_like(call.student, 1e-44), real=call.real * 0, fake=call.fake * 1e-44)
    found = forward(run, small)
    assert not found.terms[:2].isfinite().any()
    assert not gradient(run, small, found).isfinite().any()


@pytest.mark.parametrize("scale", [1e25, 1e15, 1.0, 1e-15, 1e-25])
def test_the_huber_penalty_is_right_for_large_and_small_differences(run, scale):
    for c in (0.5, scale, 1e-3 * scale, 1e6 * scale):
        call = objective_call(replace(HUBER, huber_c=c), related=False, scale=scale, plain=True)
        found, (terms, grad) = forward(run, call), truth(call)
        assert_right(found.terms, terms)
        assert_right(gradient(run, call, found), grad)


def test_the_huber_penalty_shows_an_infinite_prediction(run):
    call = objective_call(HUBER, related=False, plain=True)
    call.fake[1, 2, 3] = torch.inf
    found, exact = forward(run, call), forward(reference, call)
    written, expected = gradient(run, call, found), gradient(reference, call, exact)
    torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-8, equal_nan=True)


def test_mixed_magnitudes_add_up(run):
    """A few elements outside of the range in which float32 squares hold, among ordinary ones."""
    call = objective_call(self_forcing, related=False, plain=True, shape=(2, 3, 4, 16, 40))
    for value in (1e18, 1e-25):
        fake = call.fake.clone()
        fake.view(-1)[::97] = value
        mixed = call._replace(fake=fake)
        assert_right(forward(run, mixed).terms, truth(mixed)[0])


def test_a_weight_on_the_direction_is_part_of_its_magnitude(run):
    call = objective_call(NAMED["fastgen"], related=False, shape=(2, 2, 3, 4, 5), plain=True)
    call = call._replace(real=call.student - 1, fake=call.student, sample_weight=torch.tensor([2.0, -4.0]))
    assert float(forward(run, call).terms[4]) == pytest.approx(3.0, rel=1e-5)
    loss_weighted = call._replace(convention=NAMED["diffsynth"], sample_weight=torch.tensor([2.0, 4.0]))
    assert float(forward(run, loss_weighted).terms[4]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_a_low_temperature_takes_the_direct_form(run, pool):
    """Shifts of far more than 20: the centred form would lose its digits, then overflow."""
    call = relation_call(pool, (2, 3, 4, 6, 7), masked=False, temperature=1e-3)
    near = call.real[:, :1] + 0.3 * call.student
    call = call._replace(student=near, fake=call.fake.roll(1, dims=1).flip(-1))
    found, (terms, grad) = forward(run, call), truth(call)
    assert terms[2] > 10
    assert_right(found.terms, terms, 1e-5)
    assert_right(gradient(run, call, found), grad, 1e-3)


@pytest.mark.parametrize("pool", [(1, 1), None])
def test_a_target_that_chooses_one_of_two_equal_rows_is_log_two_away(run, pool):
    """Opposite frames in real, equal ones in fake and student: a shift of 2/temperature."""
    call = relation_call(pool, (1, 2, 4, 3, 3), masked=False, temperature=1e-3)
    first = call.real[:, :1]
    student, fake = first.repeat(1, 2, 1, 1, 1), first.repeat(1, 2, 1, 1, 1)
    call = call._replace(student=student, real=torch.cat([first, -first], 1), fake=fake)
    assert float(forward(run, call).terms[2]) == pytest.approx(0.693147, rel=1e-5 if run is cpp else 1e-4)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("tiny", [0.0, 1e-15])
def test_a_norm_under_the_floor_is_a_constant_of_the_gradient(run, pool, tiny):
    """|x| < 1e-12: the radial part of the normalisation's gradient is absent, and 1/1e-12 remains."""
    call = relation_call(pool, (3, 4, 2, 6, 6), masked=False)
    student = call.student.clone()
    student[0, 1] *= tiny
    student[2] *= tiny
    call = call._replace(student=student)
    found, (terms, grad) = forward(run, call), truth(call)
    assert_right(found.terms, terms)
    written = gradient(run, call, found)
    for part, exact in ((written, grad), (written[1], grad[1])):
        assert_right(part, exact, 1e-4)
    assert grad[2].abs().max() > 1e8


@pytest.mark.parametrize("which", ["real", "fake"])
@pytest.mark.parametrize("tiny", [0.0, 1e-20, 1e-13, 1e-9, 1e-4])
@pytest.mark.parametrize("pool", POOLS)
def test_scores_far_under_the_others_are_right_or_not_finite(run, which, pool, tiny):
    """A fake that fake - real lost gives NaN; the C++ backend, which sums in double, loses it much later."""
    call = relation_call(pool, (3, 4, 2, 6, 6), masked=False)
    latents = getattr(call, which).clone()
    latents[0, 1] *= tiny
    latents[2] *= tiny
    call = call._replace(**{which: latents})
    weights = {"batch_weight": 0.6, "frame_weight": 1.3, "pool": call.pool}
    terms, grad = plain_relation(call.student, call.real, call.fake, (1.0, 1.0, 1.0), **weights)
    found = forward(run, call)
    kept = tiny in (0.0, 1e-4) or pool is None
    check = assert_right if which == "real" or tiny == 0 or (run is cpp and kept) else assert_right_or_not_finite
    check(found.terms, terms, 1e-3)
    check(gradient(run, call, found), grad, 1e-3)


def test_every_named_convention_is_packed_as_the_extension_reads_it(run):
    for name in NAMED:
        convention = conventions.resolve(name)
        if not convention.fusable:
            continue
        call = objective_call(convention, related=False)
        found, (terms, grad) = forward(run, call), truth(call)
        assert_right(found.terms, terms)
        assert_right(gradient(run, call, found), grad)


def test_a_relation_has_no_norms(run):
    found = forward(run, relation_call())
    assert isinstance(relation_call(), Relation)
    assert found.norms is None
    assert found.factors is None
