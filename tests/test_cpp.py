"""The C++ CPU backend against the float64 reference: values, gradients, strides, masks, threads, memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from backend_calls import relation_call
from cases import DTYPES, LAYOUTS, frame_mask, latents, loss_and_gradient, relative_error, same_dtype, truth

import codmd
from codmd.ops import relation_loss
from codmd.ops.backends import cpp as extension
from codmd.ops.backends import reference
from codmd.ops.contract import Found, Numbers, Pending, Relation, Upstream

pytestmark = pytest.mark.skipif(extension.load_error is not None, reason=str(extension.load_error))

UPSTREAM = (0.7, 0.3, -0.2)
# One sample and one frame; odd planes; rows shorter than a vector, just longer, and many; one pixel.
SHAPES = [(2, 5, 4, 7, 13), (1, 21, 16, 5, 41), (3, 2, 3, 1, 1), (4, 1, 4, 6, 7), (1, 1, 4, 5, 5), (2, 3, 5, 33, 2)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    best = extension._C.active_isa()
    if not extension._C.select_isa(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    yield request.param
    assert extension._C.select_isa(best)


def cpp(*args, **kwargs):
    return relation_loss(*args, return_terms=True, backend="cpp", **kwargs)


def assert_as_accurate_as_pytorch(student, real, fake, temperature=0.1, **kwargs):
    """Error against float64 at most twice that of PyTorch in the same dtype, plus one rounding of S/temperature."""
    kwargs |= {"temperature": temperature}
    floor = 1e-6 + 3e-8 / temperature
    expected = truth(student, real, fake, upstream=UPSTREAM, **kwargs)
    usual = same_dtype(student, real, fake, upstream=UPSTREAM, **kwargs)
    found = loss_and_gradient(cpp, student, real, fake, upstream=UPSTREAM, **kwargs)
    for name, value, other, exact in zip(("terms", "gradient"), found, usual, expected, strict=True):
        error, allowed = relative_error(value, exact), 2 * relative_error(other, exact) + floor
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e} for {tuple(student.shape)} {kwargs}"


@pytest.mark.parametrize("pool", ["mean", (2, 1), (3, 2), None])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_match_float64(dtype, layout, pool):
    for seed, shape in enumerate(SHAPES):
        if isinstance(pool, tuple) and (pool[0] > shape[3] or pool[1] > shape[4]):
            continue
        student, real, fake = latents(shape, dtype, layout, seed=seed)
        for mask in (None, frame_mask(*shape[:2], seed=seed)) if shape[1] > 1 else (None,):
            for temperature in (0.1, 10.0 if seed % 2 else 0.01):
                assert_as_accurate_as_pytorch(
                    student, real, fake, temperature, layout=layout, pool=pool, frame_mask=mask
                )


@pytest.mark.parametrize("pool", ["mean", (3, 2), None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_matches_float64(isa, dtype, pool):
    for shape in [(2, 7, 4, 9, 41), (3, 2, 3, 5, 7)]:
        student, real, fake = latents(shape, dtype)
        assert_as_accurate_as_pytorch(student, real, fake, pool=pool, frame_mask=frame_mask(*shape[:2]))


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
@pytest.mark.parametrize("batch_weight,frame_weight", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.3, 2.0)])
def test_weights_select_and_scale_the_terms(batch_weight, frame_weight, pool):
    assert_as_accurate_as_pytorch(*latents(), batch_weight=batch_weight, frame_weight=frame_weight, pool=pool)


VIEWS = {
    "rows cut out of wider ones": lambda v: torch.nn.functional.pad(v, (3, 2))[..., 3:-2],
    "every second pixel": lambda v: v.repeat_interleave(2, dim=-1)[..., ::2],
    "frames cut out of a longer video": lambda v: torch.cat([v, v + 1], dim=1)[:, : v.shape[1]],
    "channels last": lambda v: v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "width before height": lambda v: v.transpose(-1, -2).contiguous().transpose(-1, -2),
    "an offset into storage": lambda v: torch.cat([v.new_zeros(3), v.flatten()])[3:].view(v.shape),
}


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_any_strides_give_the_contiguous_result(view, dtype, pool):
    student, real, fake = (v.detach() for v in latents((2, 4, 3, 6, 37), dtype))
    expected = loss_and_gradient(cpp, student, real, fake, pool=pool)
    for strided in (
        (view(student), real, fake),
        (student, view(real), fake),
        (student, real, view(fake)),
        (view(student), view(real), view(fake)),
    ):
        terms, gradient = loss_and_gradient(cpp, *strided, pool=pool)
        assert relative_error(terms, expected[0]) < 1e-6
        assert relative_error(gradient, expected[1]) < (3e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
@pytest.mark.parametrize("axis", range(5))
def test_expanded_latents_are_read_in_place(axis, pool):
    student, real, fake = (
        v.detach().narrow(axis, 0, 1).expand(3, 4, 5, 6, 7) for v in latents((3, 4, 5, 6, 7), perturbation=0.3)
    )
    assert 0 in student.stride()
    assert_as_accurate_as_pytorch(student, real, fake, pool=pool)


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
def test_strided_masks_are_read_in_place(pool):
    student, real, fake = latents((3, 5, 4, 6, 7))
    mask = frame_mask(3, 5)
    strided = torch.stack([~mask, mask], dim=-1).transpose(0, 1)[..., 1].t()
    assert not strided.is_contiguous()
    for found, expected in zip(
        loss_and_gradient(cpp, student, real, fake, pool=pool, frame_mask=strided),
        loss_and_gradient(cpp, student, real, fake, pool=pool, frame_mask=mask),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_masked_frames_never_leak(value, pool):
    student, real, fake = (v.detach().clone() for v in latents((3, 5, 4, 6, 7)))
    mask = frame_mask(3, 5)
    expected = loss_and_gradient(cpp, student, real, fake, pool=pool, frame_mask=mask)
    for v in (student, real, fake):
        v[~mask] = value
    found = loss_and_gradient(cpp, student, real, fake, pool=pool, frame_mask=mask)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not found[1][~mask].any()


@pytest.mark.parametrize("pool", ["mean", (2, 3), None])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(3))
def test_non_finite_inputs_reach_the_loss(which, value, pool):
    tensors = [v.detach().clone() for v in latents((2, 5, 4, 6, 7))]
    tensors[which][1, 2, 3, 4, 5] = value
    terms, _ = loss_and_gradient(cpp, *tensors, pool=pool)
    assert not terms.isfinite().any()


@pytest.mark.parametrize("perturbation", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("pool", ["mean", (2, 4)])
def test_small_score_differences_keep_their_digits(perturbation, pool):
    for seed in range(3):
        student, real, fake = latents((2, 21, 16, 30, 52), perturbation=perturbation, seed=seed)
        expected = truth(student, real, fake, pool=pool)
        terms, gradient = loss_and_gradient(cpp, student, real, fake, pool=pool)
        assert relative_error(terms, expected[0]) <= 1e-6
        assert relative_error(gradient, expected[1]) <= 3e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_features_survive_a_mean_that_nearly_cancels(isa, dtype):
    """The mean of 6240 values is a thousandth of their spread: 1e-7 relative is 1e-10 of a value."""
    student, real, noise = torch.randn(3, 1, 3, 4, 60, 104, generator=torch.Generator().manual_seed(0)).double()
    student, real, noise = (v - v.mean((-1, -2), keepdim=True) + 1e-3 for v in (student, real, noise))
    student, real, fake = (v.to(dtype) for v in (student, real, real + 0.01 * noise))
    call = Relation(student, real, fake, None, "bfchw", (1, 1), True, True, Numbers())
    rows = extension.features(call).rows
    difference = (fake.float() - real.float()).double()
    exact = torch.cat([v.double().mean((1, -1, -2)) for v in (student, real, difference)], dim=1)
    assert ((rows[:, :-1] - exact) / exact).abs().max() < 1.5e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_round_to_half_precision_as_torch_does(isa, dtype):
    tiny, shape = torch.finfo(dtype).smallest_normal, (1, 2, 37, 3, 5)
    special = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 3.4e38, float("inf"), -float("inf"), float("nan")]
    special += [tiny * scale for scale in (1, 0.5, 2**-7, 1.5 * 2**-7, 2**-10, 1.5 * 2**-10, 2**-11, 2**-14)]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(74, generator=generator) * 10.0 ** torch.randint(-8, 5, (74,), generator=generator)
    values[: len(special)] = torch.tensor(special)
    for pool, frame_grad, batch_grad in (
        ((1, 1), values.view(1, 2, 37), torch.empty(0)),
        (None, torch.empty(0), 2 * values.repeat_interleave(15)[: 37 * 15][None]),
    ):
        found = []
        for out in (torch.empty(shape), torch.empty(shape, dtype=dtype)):
            call = Relation(torch.zeros_like(out), out, out, None, "bfchw", pool, True, True, Numbers())
            write = extension.gradient if pool else extension.whole_gradient
            found_grads = Found(torch.empty(3), None, None, frame_grad, batch_grad)
            write(out, Upstream(torch.ones(()), None, None, None), call, found_grads)
            found.append(out)
        rounded, written = found[0].to(dtype), found[1]
        differs = rounded.view(torch.int16) != written.view(torch.int16)
        assert not (differs & ~(rounded.isnan() & written.isnan())).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", ["mean", (3, 2)])
def test_pooled_results_are_bitwise_equal_for_every_thread_count(threads, dtype, pool):
    student, real, fake = latents((2, 9, 16, 30, 52), dtype)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(loss_and_gradient(cpp, student, real, fake, pool=pool))
    for terms, gradient in results[1:]:
        assert torch.equal(terms, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_every_pixel_results_are_equal_to_rounding_for_every_thread_count(threads):
    student, real, fake = latents((2, 9, 16, 30, 52))
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(loss_and_gradient(cpp, student, real, fake, pool=None))
        again = loss_and_gradient(cpp, student, real, fake, pool=None)
        assert torch.equal(results[-1][0], again[0])
        assert torch.equal(results[-1][1], again[1])
    for terms, gradient in results[1:]:
        assert relative_error(terms, results[0][0]) < 1e-6
        assert relative_error(gradient, results[0][1]) < 1e-6


@pytest.mark.parametrize("features", [12, 5000])
def test_gathered_rows_give_the_batch_term_and_its_rows_of_the_gradient(features):
    generator = torch.Generator().manual_seed(0)
    x, r, d = (torch.randn(6, features, generator=generator) for _ in range(3))
    count = torch.tensor([[3.0], [0.0], [1.0], [2.0], [3.0], [3.0]])
    rows = torch.cat([x, r, 0.1 * d, count], dim=1)
    rows[1, :-1] = float("nan")
    latents = torch.zeros(4, 2, features, 1, 1)
    call = Relation(latents, latents, latents, None, "bfchw", (1, 1), True, True, Numbers(0.1, 0.5, 2.0))
    kept = Found(torch.tensor([0.5, 0.0, 0.25]), None, None, torch.empty(0), torch.empty(0))
    wide = torch.where(count > 0, rows, 0).double()
    expected = reference.gathered(call, Pending(wide[:4], kept), wide, 1, 3.0)
    found = extension.gathered(call, Pending(rows[:4], kept), rows, 1, 3.0)
    assert relative_error(found.terms, expected.terms) < 1e-6
    assert relative_error(found.batch_grad, expected.batch_grad) < 3e-6
    assert not found.batch_grad[0].any()


@pytest.mark.parametrize("pool", [(1, 1), (2, 3), None])
def test_the_two_stages_of_a_gather_equal_the_whole(pool):
    call = relation_call(pool, (4, 5, 3, 6, 7))
    whole, pending = extension.relation(call), extension.features(call)
    staged = extension.gathered(call, pending, pending.rows, 0, 1.0)
    assert torch.equal(pending.rows[:, -1], call.frame_mask.sum(1).float())
    assert torch.equal(whole.frame_grad, staged.frame_grad)
    assert relative_error(staged.terms, whole.terms) < 1e-6
    assert relative_error(staged.batch_grad, whole.batch_grad) < 3e-6


def test_a_term_without_upstream_gradient_does_not_spread_its_nan():
    shape = (2, 3, 4, 5, 6)
    for pool, size in (((1, 1), 4), (None, 120)):
        out = torch.empty(shape)
        poisoned = torch.full((2, 3, 4 if pool else 3), float("nan"))
        call = Relation(torch.ones(shape), out, out, None, "bfchw", pool, True, True, Numbers())
        write = extension.gradient if pool else extension.whole_gradient
        found = Found(torch.empty(3), None, None, poisoned, torch.ones(2, size))
        write(out, Upstream(None, None, torch.ones(()), None), call, found)
        assert out.isfinite().all()


def peak_growth(pool: str, dtype: str, backward: bool) -> tuple[int, int]:
    """(bytes by which the resident peak grows over the inputs, bytes of one latent), in a fresh process."""
    script = textwrap.dedent(f"""
        import gc, torch
        from codmd.ops.backends import cpp
        from codmd.ops.contract import Numbers, Relation, Upstream
        torch.set_num_threads(2)
        x, r, f = (torch.randn(1, 21, 16, 60, 104).to(torch.{dtype}) for _ in range(3))
        upstream = Upstream(torch.ones(()), None, None, None)
        call = Relation(x, r, f, None, "bfchw", {pool}, True, True, Numbers())

        def run():
            found = cpp.relation(call)
            if {backward}:
                cpp.gradient(torch.empty_like(x), upstream, call, found)

        def status(key):
            return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024

        growth = []
        for _ in range(5):
            run()
            gc.collect()
            open("/proc/self/clear_refs", "w").write("5")
            before = status("VmRSS")
            run()
            growth.append(status("VmHWM") - before)
        print(min(growth), x.nbytes)
    """)
    # Freed blocks go back to the system at once, so that the peak shows every allocation.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth, latent = done.stdout.split()
    return int(growth), int(latent)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extra_memory_is_the_gradient_and_one_percent_of_a_latent(dtype):
    growth, latent = peak_growth("(1, 1)", dtype, backward=False)
    assert growth <= 0.01 * latent
    growth, latent = peak_growth("(1, 1)", dtype, backward=True)
    assert growth <= 1.01 * latent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_every_pixel_never_copies_a_latent():
    growth, latent = peak_growth("None", "bfloat16", backward=False)
    assert growth <= 0.15 * latent


def adaptor_with(monkeypatch, binary):
    """A fresh import of the adaptor over another (or no) extension."""
    monkeypatch.delattr(codmd, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "codmd._C", binary)
    if binary is not None:
        monkeypatch.setattr(codmd, "_C", binary, raising=False)
    spec = importlib.util.spec_from_file_location("codmd.ops.backends.cpp_again", extension.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_or_stale_extension_is_a_reason_and_not_a_crash(monkeypatch):
    with monkeypatch.context() as patch:
        assert "not available" in adaptor_with(patch, None).load_error
    with monkeypatch.context() as patch:
        assert "stale" in adaptor_with(patch, SimpleNamespace(abi_version=extension.ABI_VERSION - 1)).load_error
    with monkeypatch.context() as patch:
        assert adaptor_with(patch, SimpleNamespace(abi_version=extension.ABI_VERSION)).load_error is None
