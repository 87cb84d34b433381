"""``codmd_loss`` is ``dmd_loss + relation_weight * relation_loss``, from one pass, on every backend."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, frame_mask, relative_error
from dmd_cases import BACKENDS, has_fused, scores
from operators import check_every_operator
from torch.nn.parallel import DistributedDataParallel
from workers import run_processes

from benchmarks import codmd_cpu
from codmd import conventions, ops, reference
from codmd.conventions import NAMED

UPSTREAMS = [(1.0, 0.0, 0.0, 0.0), (0.5, -2.0, 0.7, 3.0), (0.0, 0.0, 1.0, 0.0)]
RELATION = ("temperature", "batch_weight", "frame_weight", "pool", "frame_mask")


def terms_and_gradient(function, student, upstream=UPSTREAMS[0], **options):
    """The four terms and the gradient of their ``upstream``-weighted sum."""
    leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    terms = function(leaf, **options)
    sum(weight * term for weight, term in zip(upstream, terms, strict=True) if weight).backward()
    return torch.stack([term.detach().double() for term in terms]), leaf.grad


def fused(student, **options):
    return ops.codmd_loss(student, return_terms=True, **options)


def by_reference(student, relation_weight=0.1, **options):
    """The two terms of the float64 (or same-dtype) reference, one after the other, from x0 predictions."""
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


def truth(student, **options):
    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in options.items()}
    return lambda upstream: terms_and_gradient(by_reference, student.double(), upstream, **wide)


def assert_as_good_as_torch(student, backend, upstream, **options):
    """Within twice the error of the same-dtype PyTorch path, plus float32 rounding of the relation's small numbers."""
    options = {"guidance": 4.5, "fake_guidance": 1.2, **options}
    terms, gradient = terms_and_gradient(fused, student, upstream, backend=backend, **options)
    yard, yard_gradient = terms_and_gradient(by_reference, student, upstream, **options)
    true, true_gradient = truth(student, **options)(upstream)
    for found, plain, exact in zip(terms, yard, true, strict=True):
        assert relative_error(found, exact) <= 2 * relative_error(plain, exact) + 2e-5
    assert gradient.dtype == student.dtype
    assert relative_error(gradient, true_gradient) <= 2 * relative_error(yard_gradient, true_gradient) + 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", UPSTREAMS, ids=str)
@pytest.mark.parametrize("layout", ["bfchw", "bcfhw", "bchw"])
@pytest.mark.parametrize("flow", [False, True], ids=["x0", "flow"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_sum_of_its_terms(dtype, flow, layout, upstream, backend):
    student, arguments = scores((3, 6, 4, 5, 9), dtype, layout, flow=flow)
    options = {"layout": layout, "prediction": "flow" if flow else "x0"}
    assert_as_good_as_torch(student, backend, upstream, **arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["mean", (2, 3), (5, 9)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all frames", "frame mask"])
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "rcm", "fastgen", "fastvideo", "tdm"])
def test_every_option_of_both_terms(name, masked, pool, backend):
    convention = replace(NAMED[name], layout="bfchw")
    student, arguments = scores((3, 6, 4, 5, 9), torch.bfloat16)
    options = {
        "convention": convention, "pool": pool, "temperature": 0.3, "batch_weight": 0.4, "frame_weight": 1.7,
        "relation_weight": 0.8, "sample_weight": torch.tensor([1.0, 0.5, 2.0]),
        "mask": torch.rand(student.shape, generator=torch.Generator().manual_seed(5)) > 0.3,
    }  # fmt: skip
    if masked:
        options["frame_mask"] = frame_mask(3, 6)
    assert_as_good_as_torch(student, backend, UPSTREAMS[1], **arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 4, 5, 9), (3, 1, 4, 5, 9), (1, 1, 1, 1, 1)], ids=str)
def test_terms_that_do_not_exist_are_zero(shape, weights, backend):
    student, arguments = scores(shape)
    arguments["real"] = arguments["real"] + 2
    options = {"batch_weight": weights[0], "frame_weight": weights[1], **arguments}
    assert_as_good_as_torch(student, backend, UPSTREAMS[0], **options)
    terms = fused(student, backend=backend, **options)
    if not weights[0] or shape[0] == 1:
        assert terms.batch == 0
    if not weights[1] or shape[1] == 1:
        assert terms.frame == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_relation_weight_it_is_the_dmd_loss(backend):
    student, arguments = scores(dtype=torch.bfloat16)
    terms, gradient = terms_and_gradient(fused, student, relation_weight=0.0, backend=backend, **arguments)
    leaf = student.clone().requires_grad_()
    loss = ops.dmd_loss(leaf, backend=backend, **arguments)
    loss.backward()
    assert terms.tolist() == [loss.item(), loss.item(), 0.0, 0.0]
    assert torch.equal(gradient, leaf.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_equals_the_two_operators_called_in_turn(backend):
    student, arguments = scores((2, 6, 4, 5, 9))
    arguments.pop("fake_uncond")
    terms, gradient = terms_and_gradient(fused, student, relation_weight=0.3, backend=backend, **arguments)
    leaf = student.clone().requires_grad_()
    found = ops.dmd_loss(leaf, backend=backend, **arguments, return_terms=True, return_real=True)
    total = found.loss + 0.3 * ops.relation_loss(leaf, found.real, arguments["fake"], backend=backend)
    total.backward()
    assert relative_error(terms[0], total.detach()) < 1e-6
    assert relative_error(gradient, leaf.grad) < 1e-5


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, backend):
    student, arguments = scores((2, 4, 6, 5, 14), dtype, flow=True)
    student = student[..., ::2]
    arguments = {
        name: value if name == "sigma" else value[..., ::2].transpose(1, 4).contiguous().transpose(1, 4)
        for name, value in arguments.items()
    }
    assert_as_good_as_torch(student, backend, UPSTREAMS[1], prediction="flow", **arguments)
    channels_last = student.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert_as_good_as_torch(channels_last, backend, UPSTREAMS[1], prediction="flow", pool=(2, 2), **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["fake", "real", "student"])
def test_non_finite_inputs_reach_the_loss(where, backend):
    student, arguments = scores()
    (student if where == "student" else arguments[where])[0, 2, 1, 0, 0] = torch.nan
    terms = fused(student, backend=backend, **arguments)
    assert not terms.total.isfinite()
    assert not terms.frame.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_term_without_upstream_gradient_does_not_spread_its_nan(backend):
    student, arguments = scores((2, 4, 3, 5, 9))
    arguments["fake"][0, 2, 1, 0, 0] = torch.nan
    _, gradient = terms_and_gradient(fused, student, (0.0, 1.0, 0.0, 0.0), backend=backend, **arguments)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_repeat_bit_for_bit(backend):
    student, arguments = scores((2, 9, 4, 20, 31), torch.bfloat16, flow=True)
    first = terms_and_gradient(fused, student, prediction="flow", backend=backend, **arguments)
    second = terms_and_gradient(fused, student, prediction="flow", backend=backend, **arguments)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_second_differentiation_raises():
    student, arguments = scores()
    leaf = student.requires_grad_()
    loss = ops.codmd_loss(leaf, **arguments)
    (gradient,) = torch.autograd.grad(loss.square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_changes_nothing():
    student, arguments = scores()
    outside = terms_and_gradient(fused, student, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = terms_and_gradient(fused, student, **arguments)
    assert torch.equal(outside[0], inside[0])
    assert torch.equal(outside[1], inside[1])


@pytest.mark.parametrize("name", ["self_forcing", "longlive"])
def test_opcheck(name):
    student, arguments = scores((2, 4, 3, 5, 9), flow=True)
    student.requires_grad_()
    options = {"convention": name, "prediction": "flow", "pool": (2, 3), "frame_mask": frame_mask(2, 4)}
    checked = check_every_operator(lambda: ops.codmd_loss(student, **arguments, **options))
    assert checked == ["codmd::objective", "codmd::objective_backward"]


@pytest.mark.parametrize("options", [{}, {"pool": None}, {"convention": "longlive", "batch_weight": 0.0}], ids=str)
def test_it_compiles_without_a_graph_break(options):
    student, arguments = scores(dtype=torch.bfloat16, flow=True)

    def total(x, **kwargs):
        return ops.codmd_loss(x, prediction="flow", return_terms=True, **options, **kwargs)

    eager = terms_and_gradient(total, student, UPSTREAMS[1], **arguments)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    traced = terms_and_gradient(compiled, student, UPSTREAMS[1], **arguments)
    torch.testing.assert_close(traced[0], eager[0])
    torch.testing.assert_close(traced[1], eager[1])


def test_the_backward_pass_keeps_no_latent_of_its_own():
    student, arguments = scores((2, 5, 4, 16, 16), flow=True)
    kept = []
    known = {v.untyped_storage().data_ptr() for v in (student, *arguments.values())}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.codmd_loss(student.requires_grad_(), **arguments, prediction="flow")
    assert sum(kept) < 0.02 * student.untyped_storage().nbytes()


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


def compare_with_one_process(rank, world, backends):
    student, arguments = scores((2 * world, 5, 4, 6, 7), perturbation=0.3)
    own = slice(2 * rank, 2 * rank + 2)
    local = {name: value[own] for name, value in arguments.items()}
    for backend in backends:
        for options in ({}, {"pool": (2, 3), "relation_weight": 2.0}, {"pool": None}, {"frame_weight": 0.0}):
            expected = parameter_gradient(Generator(), student, arguments, backend=backend, **options)
            model = DistributedDataParallel(Generator())
            found = parameter_gradient(model, student[own], local, backend=backend, group=dist.group.WORLD, **options)
            assert relative_error(found, expected) < 2e-6, (backend, options, found, expected)


def test_two_processes_give_the_gradient_of_the_global_batch():
    run_processes(compare_with_one_process, 2, [name for name in ("reference", "cpp") if has_fused(name)])


@pytest.mark.skipif(not has_fused("cpp"), reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_is_as_good_as_torch(dtype, isa):
    from codmd.ops import _cpp

    before = _cpp._C.active_isa()
    if not _cpp._C.select_isa(isa):
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
        _cpp._C.select_isa(before)


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
