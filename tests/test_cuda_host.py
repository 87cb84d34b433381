"""The CUDA backend without a GPU: its kernels' bodies on simulated threads, behind the same Python boundary.

Accuracy, masks, strides and gradients are those of the real kernels, whose sources these are; so is a dependence on the
order of threads within a phase or of blocks, which shuffling would show.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import codmd_cases
import cuda_simulation
import dmd_cases
import pytest
import test_cpp
import torch
from backend_calls import relation_call
from cases import DTYPES, LAYOUTS, frame_mask, latents, loss_and_gradient, relative_error, truth
from dmd_cases import scores
from rounding import assert_as_accurate_as_pytorch

from codmd import conventions, ops
from codmd.conventions import NAMED
from codmd.ops import relation_loss
from codmd.ops.backends import cuda

pytestmark = pytest.mark.skipif(not cuda_simulation.COMPILER, reason="no C++ compiler")

UPSTREAM = (0.7, 0.3, -0.2)
# Beside the shapes of the other backends: more frames, then more samples, than one block relates.
SHAPES = sorted({*test_cpp.SHAPES, (2, 21, 16, 6, 10), (2, 3, 2, 1, 41), (2, 70, 2, 3, 4), (70, 2, 2, 3, 5)})


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    yield from cuda_simulation.serve(monkeypatch)


def terms_of(*args, **kwargs):
    return relation_loss(*args, return_terms=True, **kwargs)


@pytest.mark.parametrize("pool", ["mean", (2, 1), (2, 3), None])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relation_values_and_gradients_match_float64(dtype, layout, pool):
    for seed, shape in enumerate(SHAPES):
        if isinstance(pool, tuple) and (pool[0] > shape[3] or pool[1] > shape[4]):
            continue
        inputs = latents(shape, dtype, layout, seed=seed)
        options = {"layout": layout, "pool": pool, "upstream": UPSTREAM}
        for mask, temperature in ((None, 0.1), (frame_mask(*shape[:2], seed=seed), 10.0 if seed % 2 else 0.01)):
            assert_as_accurate_as_pytorch(terms_of, *inputs, temperature=temperature, frame_mask=mask, **options)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("perturbation", [1e-4, 1e-2, 1.0])
def test_relation_holds_over_temperatures_and_perturbations(perturbation, temperature):
    for pool in ("mean", (2, 3), None):
        for shape in ((2, 5, 4, 7, 9), (2, 9, 5, 8, 12)):
            inputs = latents(shape, perturbation=perturbation)
            assert_as_accurate_as_pytorch(terms_of, *inputs, temperature=temperature, pool=pool, upstream=UPSTREAM)


@pytest.mark.parametrize("batch_weight, frame_weight", [(0, 0), (1, 0), (0, 1), (0.3, 2.0)])
def test_relation_holds_for_any_weights_zero_included(batch_weight, frame_weight):
    weights = {"batch_weight": batch_weight, "frame_weight": frame_weight}
    for pool in ("mean", None):
        for upstream in ((1.0, 0.0, 0.0), (-2.5, 0.0, 3.0), (0.0, 1.5, 0.0)):
            assert_as_accurate_as_pytorch(terms_of, *latents(), pool=pool, upstream=upstream, **weights)


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
@pytest.mark.parametrize("axis", range(5))
def test_expanded_latents_are_read_in_place(axis, pool):
    shape = (3, 4, 5, 6, 7)
    inputs = [v.detach().narrow(axis, 0, 1).expand(shape) for v in latents(shape, perturbation=0.3)]
    assert 0 in inputs[0].stride()
    assert_as_accurate_as_pytorch(terms_of, *inputs, pool=pool)


VIEWS = {
    "rows cut out of wider ones": lambda v: torch.nn.functional.pad(v, (3, 2))[..., 3:-2],
    "every second pixel": lambda v: v.repeat_interleave(2, dim=-1)[..., ::2],
    "channels last": lambda v: v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "an offset into storage": lambda v: torch.cat([v.new_zeros(3), v.flatten()])[3:].view(v.shape),
}


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_any_strides_give_the_contiguous_result(view, pool):
    student, real, fake = (v.detach() for v in latents((2, 4, 3, 6, 37), torch.bfloat16))
    expected = loss_and_gradient(terms_of, student, real, fake, pool=pool)
    for strided in ((view(student), real, fake), (student, real, view(fake)), tuple(map(view, (student, real, fake)))):
        terms, gradient = loss_and_gradient(terms_of, *strided, pool=pool)
        assert relative_error(terms, expected[0]) < 2e-6
        assert relative_error(gradient, expected[1]) < 2**-8


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_leak_from_valid_frames_alone(value, pool):
    student, real, fake = (v.detach().clone() for v in latents((3, 5, 4, 6, 7)))
    mask = frame_mask(3, 5)
    expected = loss_and_gradient(terms_of, student, real, fake, pool=pool, frame_mask=mask)
    for v in (student, real, fake):
        v[~mask] = value
    found = loss_and_gradient(terms_of, student, real, fake, pool=pool, frame_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for tensor in (student, real, fake):
        kept = tensor[0, 0, 2, 3, 4].clone()
        tensor[0, 0, 2, 3, 4] = value
        terms = terms_of(student, real, fake, pool=pool, frame_mask=mask)
        assert not torch.stack(terms).isfinite().any()
        tensor[0, 0, 2, 3, 4] = kept


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
def test_zero_vectors_follow_the_reference(pool):
    for which in range(3):
        inputs = [v.detach().clone() for v in latents((3, 4, 2, 6, 6))]
        inputs[which][0, 1] = 0
        inputs[which][1] = 0
        found, expected = loss_and_gradient(terms_of, *inputs, pool=pool), truth(*inputs, pool=pool)
        assert relative_error(found[0], expected[0]) < 5e-6
        assert relative_error(found[1], expected[1]) < 5e-6


@pytest.mark.parametrize("shape", [(4, 5, 3, 6, 7), (70, 2, 3, 4, 4)], ids=str)
def test_gathered_rows_give_the_relation_of_one_process(shape):
    call = relation_call(shape=shape, masked=False)
    whole = cuda.relation(call)
    rows = cuda.features(call).rows
    for first in (0, 2):
        own = call._replace(**{name: getattr(call, name)[first : first + 2] for name in ("student", "real", "fake")})
        pending = cuda.features(own)
        partial = pending.partial._replace(terms=whole.terms)
        found = cuda.gathered(own, pending._replace(partial=partial), rows, first, 2.0)
        torch.testing.assert_close(found.terms, whole.terms, rtol=2e-6, atol=0)
        torch.testing.assert_close(found.batch_grad, 2 * whole.batch_grad[first : first + 2], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, convention in NAMED.items() if convention.fusable])
def test_every_fusable_convention_matches_float64(name):
    for dtype in DTYPES:
        student, arguments = scores(dtype=dtype, layout=NAMED[name].layout)
        options = {"convention": name, "guidance": 4.5, "fake_guidance": 1.5}
        dmd_cases.assert_as_good_as_torch(student, arguments, "cuda", upstream=1.7, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"penalty": "huber", "norm_divides": "loss", "nan": "keep", "huber_c": 0.05},
        {"norm_scope": "block", "norm_block": 2, "independent_first_frame": True, "guard": "add", "eps": 0.1},
        {"norm_scope": "batch", "guard": "clamp", "eps": 10.0},
        {"reduction": "sum", "coefficient": 0.25},
        {"nan": "zero_sample", "guard": "add", "eps": 1e-6},
    ],
    ids=str,
)
def test_customised_conventions_with_masks_weights_and_velocities_match_float64(change):
    student, arguments = scores((2, 7, 3, 5, 9), torch.bfloat16, flow=True)
    mask = torch.rand(student.shape, generator=torch.Generator().manual_seed(3)) > 0.4
    options = {
        "convention": replace(conventions.self_forcing, **change), "mask": mask, "prediction": "flow",
        "sample_weight": torch.tensor([0.3, 2.5]),
    }  # fmt: skip
    dmd_cases.assert_as_good_as_torch(student, arguments, "cuda", upstream=1.7, **options)


@pytest.mark.parametrize("pool", ["mean", (2, 3), (5, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_terms_match_float64(dtype, pool):
    for flow in (False, True):
        student, arguments = scores((3, 6, 4, 5, 9), dtype, flow=flow)
        options = {"prediction": "flow" if flow else "x0", "pool": pool, **arguments}
        for upstream in codmd_cases.UPSTREAMS:
            codmd_cases.assert_as_good_as_torch(student, "cuda", upstream, **options)
        mask = torch.rand(student.shape, generator=torch.Generator().manual_seed(5)) > 0.3
        options |= {"mask": mask, "frame_mask": frame_mask(3, 6), "convention": "longlive", "temperature": 0.3}
        codmd_cases.assert_as_good_as_torch(student, "cuda", upstream, **options)


@pytest.mark.parametrize("pool", ["mean", (2, 3)])
@pytest.mark.parametrize("shape", [(3, 6, 4, 5, 9), (2, 70, 2, 4, 5)], ids=str)
def test_both_terms_in_one_pass_equal_the_two_operators(shape, pool):
    student, arguments = scores(shape)
    arguments = {name: arguments[name] for name in ("fake", "real")}
    mask = frame_mask(*shape[:2])

    def gradient_of(function):
        leaf = student.clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        return loss.detach(), leaf.grad

    both = gradient_of(
        lambda x: ops.codmd_loss(x, relation_weight=0.3, temperature=0.2, pool=pool, frame_mask=mask, **arguments)
    )
    apart = gradient_of(
        lambda x: (
            ops.dmd_loss(x, **arguments)
            + 0.3 * relation_loss(x, arguments["real"], arguments["fake"], 0.2, pool=pool, frame_mask=mask)
        )
    )
    assert relative_error(both[0], apart[0]) < 2e-6
    assert relative_error(both[1], apart[1]) < 5e-6


@pytest.mark.every
def test_kernels_run_clean_under_address_and_undefined_sanitizers(tmp_path):
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [cuda_simulation.COMPILER, *sanitize, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no C++ compiler with -fsanitize=address,undefined")
    sources = [*cuda_simulation.KERNELS, cuda_simulation.CSRC / "tests" / "cuda_driver.cpp"]
    driver = tmp_path / "driver"
    cuda_simulation.build(tmp_path, sources, driver, ["-O1", "-g1", *sanitize], sanitize)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(driver)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "0 failed checks" in done.stdout
