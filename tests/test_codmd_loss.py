"""``codmd_loss`` is ``dmd_loss + relation_weight * relation_loss``, from one pass, on every backend."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from backend_calls import objective_call
from cases import DTYPES, relative_error
from codmd_cases import UPSTREAMS, assert_as_good_as_torch, fused, terms_and_gradient, truth
from dmd_cases import has_fused, scores
from torch.nn.parallel import DistributedDataParallel
from workers import run_processes

from benchmarks import codmd_cpu
from codmd import backends, conventions, ops


@pytest.mark.parametrize(
    "options",
    [
        {"pool": None},
        {"convention": replace(conventions.self_forcing, arithmetic="emulate")},
        {"convention": replace(conventions.self_forcing, arithmetic="float64"), "pool": (2, 2)},
    ],
    ids=["every pixel", "emulate", "float64"],
)
@pytest.mark.parametrize("flow", [False, True], ids=["x0", "flow"])
def test_what_cannot_be_fused_is_composed(options, flow):
    student, arguments = scores((2, 5, 3, 4, 6), flow=flow)
    options = {**arguments, **options, "prediction": "flow" if flow else "x0"}
    terms, gradient = terms_and_gradient(fused, student, UPSTREAMS[1], guidance=2.0, fake_guidance=1.0, **options)
    expected, expected_gradient = truth(student, guidance=2.0, fake_guidance=1.0, **options)(UPSTREAMS[1])
    assert relative_error(terms, expected) < 1e-4
    assert relative_error(gradient, expected_gradient) < 1e-4


@pytest.mark.skipif(not has_fused("cpp"), reason="the C++ extension is not built")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_from_velocities_needs_no_memory_but_the_gradient(dtype):
    latent = 21 * 16 * 60 * 104 * codmd_cpu.DTYPES[dtype].itemsize
    assert 0.99 * latent <= codmd_cpu.extra_bytes("wan-480p", dtype, threads=2) <= 1.01 * latent


RELATION_ERRORS = [
    ({"temperature": 0.0}, ValueError, "temperature must be greater than 0, got 0.0"),
    ({"relation_weight": -1.0}, ValueError, "relation_weight must be 0 or greater, got -1.0"),
    ({"batch_weight": "1"}, TypeError, "batch_weight must be a Python number or a 0-dim tensor, got str"),
    ({"frame_weight": float("inf")}, ValueError, "frame_weight must be finite, got inf"),
    ({"pool": "max"}, ValueError, 'pool must be "mean", None or a tuple of two integers'),
    ({"pool": (99, 1)}, ValueError, "pool=(99, 1) must lie between (1, 1) and the latent's height and width"),
    ({"frame_mask": torch.ones(2, 2)}, TypeError, "frame_mask must be torch.bool"),
    ({"frame_mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "frame_mask must have shape (batch, frames)"),
    ({"batch_grad": "mean"}, ValueError, "batch_grad='mean' is not known; allowed: global, local"),
    ({"group": "world"}, TypeError, "group must be a torch.distributed.ProcessGroup or None, got str"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), RELATION_ERRORS, ids=[str(m)[:30] for _, _, m in RELATION_ERRORS]
)
def test_a_wrong_argument_is_named(change, kind, message):
    student, arguments = scores()
    with pytest.raises(kind) as error:
        ops.codmd_loss(student, **arguments, **change)
    assert message in str(error.value)


class Generator(torch.nn.Module):
    """Two float64 parameters between noise and latents, so that the rounding measured is the operator's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.mix = torch.nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, noise):
        return self.mix(noise.double().movedim(2, -1)).movedim(-1, 2).tanh().to(noise.dtype)


def parameter_gradient(model, student, arguments, **options):
    model.zero_grad()
    ops.codmd_loss(model(student), **arguments, **options).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compare_with_one_process(rank, world, names):
    student, arguments = scores((2 * world, 5, 4, 6, 7), perturbation=0.3)
    own = slice(2 * rank, 2 * rank + 2)
    local = {name: value[own] for name, value in arguments.items()}
    for backend in names:
        for options in ({}, {"pool": (2, 3), "relation_weight": 2.0}, {"pool": None}, {"frame_weight": 0.0}):
            expected = parameter_gradient(Generator(), student, arguments, backend=backend, **options)
            model = DistributedDataParallel(Generator())
            found = parameter_gradient(model, student[own], local, backend=backend, group=dist.group.WORLD, **options)
            assert relative_error(found, expected) < 2e-6, (backend, options, found, expected)


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_the_two_stages_of_a_gather_find_what_one_does(name):
    run, reason = backends.load(name)
    if run is None:
        pytest.skip(reason)
    call = objective_call()
    pending = run.features(call)
    staged = run.gathered(call, pending, pending.rows, 0, 1.0)
    for found, expected in zip(staged, run.objective(call, True), strict=True):
        assert relative_error(found, expected) < 3e-6


def test_two_processes_give_the_gradient_of_the_global_batch():
    run_processes(compare_with_one_process, 2, [name for name in ("reference", "cpp") if has_fused(name)])


@pytest.mark.skipif(not has_fused("cpp"), reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_is_as_good_as_torch(dtype, isa):
    from codmd.ops.backends import cpp

    before = cpp._C.active_isa()
    if not cpp._C.select_isa(isa):
        pytest.skip(f"this processor or build has no {isa}")
    try:
        for flow in (False, True):
            student, arguments = scores((2, 5, 3, 11, 53), dtype, flow=flow)
            options = {"prediction": "flow" if flow else "x0", **arguments}
            assert_as_good_as_torch(student, "cpp", UPSTREAMS[1], **options)
            options.pop("fake_uncond")
            assert_as_good_as_torch(student, "cpp", UPSTREAMS[1], **options)
            options.pop("real_uncond")
            assert_as_good_as_torch(student, "cpp", UPSTREAMS[1], pool=(2, 3), convention="longlive", **options)
            mask = torch.rand(student.shape) > 0.5
            assert_as_good_as_torch(student, "cpp", UPSTREAMS[1], mask=mask, **options)
    finally:
        cpp._C.select_isa(before)


@pytest.mark.parametrize("flow", [False, True], ids=["x0", "flow"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_rows_of_zeros_in_fake_are_zero_vectors(backend, flow):
    """u = φ / max(‖φ‖, 1e-12) is 0 for them; r + d is 0, too, for an f that rounding lost, whose relation is NaN."""
    if not has_fused(backend):
        pytest.skip(f"{backend} does not run here")
    student, arguments = scores((3, 5, 3, 4, 6), flow=flow)
    for name in ("fake", "fake_uncond", *(["noisy"] if flow else [])):
        arguments[name][0, 1] = 0
        arguments[name][1] = 0
    options = {"prediction": "flow" if flow else "x0", **arguments}
    for pool in ("mean", (2, 3)):
        assert_as_good_as_torch(student, backend, UPSTREAMS[1], pool=pool, **options)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("scale", [1e-36, 3e-44])
def test_a_loss_of_subnormal_latents_is_right_or_not_finite(scale, backend):
    """Their norm is subnormal, too, and has few digits, though the loss is that of any other scale."""
    if not has_fused(backend):
        pytest.skip(f"{backend} does not run here")
    student, arguments = scores((3, 5, 3, 4, 6))
    student, arguments = scale * student, {name: scale * value for name, value in arguments.items()}
    options = {"guidance": 4.5, "fake_guidance": 1.2, **arguments}
    true, true_gradient = truth(student, **options)(UPSTREAMS[0])
    terms, gradient = terms_and_gradient(fused, student, backend=backend, **options)
    assert relative_error(terms[1], true[1]) < 1e-6 if scale == 1e-36 else terms[1].isnan()
    assert relative_error(gradient, true_gradient) < 1e-6 if scale == 1e-36 else gradient.isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_norm_beyond_the_largest_number_leaves_no_finite_loss(backend):
    """Divided by an infinite norm the loss would be 0."""
    if not has_fused(backend):
        pytest.skip(f"{backend} does not run here")
    student, real, fake = (torch.full((2, 3, 2, 3, 4), value) for value in (3e38, -3e38, -2.5e38))
    assert not ops.dmd_loss(student, real=real, fake=fake, backend=backend).isfinite()


def test_the_magnitude_step_by_step_is_of_the_selected_elements():
    student, arguments = scores()
    mask = torch.rand(student.shape) > 0.5
    found = [
        ops.dmd_loss(
            student, **arguments, mask=mask, return_terms=True,
            convention=replace(conventions.self_forcing, arithmetic=arithmetic),
        ).magnitude.float()
        for arithmetic in ("float32", "float64")
    ]  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_sample_of_fake_whose_digits_are_lost_is_no_zero_vector(backend):
    """Where real + (fake - real) rounds to 0, averages over pixels and frames keep it apart from one."""
    if not has_fused(backend):
        pytest.skip(f"{backend} does not run here")
    for seed in range(20):
        student, arguments = scores((2, 3, 2, 3, 4), seed=seed)
        arguments = {"real": arguments["real"], "fake": arguments["fake"]}
        arguments["real"][1] *= 1e24
        terms, _ = terms_and_gradient(fused, student, backend=backend, **arguments)
        assert terms[[0, 2, 3]].isnan().all()


@pytest.mark.skipif(not has_fused("cpp"), reason="the C++ extension is not built")
def test_the_number_of_threads_does_not_change_the_gradient_of_the_dmd_term():
    student, arguments = scores((2, 5, 4, 40, 52), torch.bfloat16, flow=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(terms_and_gradient(fused, student, prediction="flow", backend="cpp", **arguments))
    finally:
        torch.set_num_threads(threads)
    for terms, gradient in results[1:]:
        assert torch.equal(terms, results[0][0])
        assert torch.equal(gradient, results[0][1])
