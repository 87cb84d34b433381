"""``dmd_loss``: every backend against the float64 reference, with every option, and the rules of an operator."""

from __future__ import annotations

import logging
import types
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, relative_error
from dmd_cases import BACKENDS, run, same_dtype, scores, truth
from dmd_formulas import FORMULAS

from codmd import backends, conventions, ops, reference
from codmd.conventions import NAMED
from codmd.ops import _dmd_backend, _reference_dmd

MASKS = ("none", "elements", "frames", "one", "all", "nothing")
LAYOUTS = ("bfchw", "bcfhw", "bchw")


def mask_of(kind: str, student):
    if kind == "none":
        return None
    if kind == "elements":
        return torch.rand(student.shape, generator=torch.Generator().manual_seed(3)) > 0.4
    if kind == "frames":
        mask = torch.zeros(student.shape[1], *[1] * (student.ndim - 2), dtype=torch.bool)
        mask[-1] = True
        return mask
    mask = torch.full(student.shape, kind == "all")
    if kind == "one":
        mask.view(-1)[mask.numel() // 2] = True
    return mask


def assert_as_good_as_torch(student, arguments, backend, upstream=1.0, **options):
    """Value and gradient within twice the same-dtype PyTorch error, plus one rounding of the output."""
    value, gradient = run(ops.dmd_loss, student, arguments, upstream, backend=backend, **options)
    yard_value, yard_gradient = same_dtype(student, arguments, upstream, **options)
    true_value, true_gradient = truth(student, arguments, upstream, **options)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    assert relative_error(value, true_value) <= 2 * relative_error(yard_value, true_value) + 5e-7
    assert relative_error(gradient, true_gradient) <= 2 * relative_error(yard_gradient, true_gradient) + 5e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_every_convention_is_as_good_as_torch(name, dtype, backend):
    student, arguments = scores(dtype=dtype, layout=NAMED[name].layout)
    assert_as_good_as_torch(student, arguments, backend, convention=name, guidance=4.5, fake_guidance=1.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo", "rcm", "tdm"])
def test_masks(name, kind, layout, backend):
    student, arguments = scores(dtype=torch.bfloat16, layout=layout)
    options = {"convention": name, "layout": layout, "mask": mask_of(kind, student)}
    assert_as_good_as_torch(student, arguments, backend, upstream=3.0, **options)
    value, gradient = run(ops.dmd_loss, student, arguments, backend=backend, **options)
    if kind == "nothing":
        assert value == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))
    if kind == "one":
        assert int((gradient != 0).sum()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastgen"])
def test_raw_network_outputs(name, dtype, layout, backend):
    student, arguments = scores(dtype=dtype, layout=layout, flow=True)
    options = {"convention": name, "layout": layout, "prediction": "flow", "guidance": 4.5}
    assert_as_good_as_torch(student, arguments, backend, **options)
    per_sample = {**arguments, "sigma": arguments["sigma"].reshape(len(student), -1)[:, 0]}
    assert_as_good_as_torch(student, per_sample, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        {"penalty": "huber", "norm_divides": "loss", "nan": "keep", "huber_c": 0.05},
        {"norm_scope": "block", "norm_block": 2, "independent_first_frame": True, "guard": "add", "eps": 0.1},
        {"norm_scope": "block", "norm_block": 100},
        {"norm_scope": "batch", "guard": "clamp", "eps": 10.0},
        {"reduction": "sum", "coefficient": 0.25},
        {"nan": "zero_sample", "guard": "add", "eps": 1e-6, "norm_scope": "block", "norm_block": 3},
    ],
    ids=str,
)
def test_customised_conventions(change, backend):
    convention = replace(conventions.self_forcing, **change)
    student, arguments = scores(dtype=torch.bfloat16)
    weight = torch.tensor([0.3, 2.5])
    mask = mask_of("elements", student)
    assert_as_good_as_torch(student, arguments, backend, convention=convention)
    assert_as_good_as_torch(student, arguments, backend, convention=convention, sample_weight=weight, mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["self_forcing", "fastgen", "fastvideo"])
def test_weights_of_samples(name, backend):
    student, arguments = scores(layout=NAMED[name].layout)
    options = {"convention": name, "sample_weight": torch.tensor([0.0, 2.0], dtype=torch.float64)}
    assert_as_good_as_torch(student, arguments, backend, **options)
    _, gradient = run(ops.dmd_loss, student, arguments, backend=backend, **options)
    assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 2, 5, 1, 41), (1, 4, 16, 3, 104), (2, 3, 1, 17, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(shape, dtype, backend):
    student, arguments = scores(shape, dtype)
    assert_as_good_as_torch(student, arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, backend):
    student, arguments = scores((2, 4, 6, 5, 14), dtype, flow=True)
    options = {"prediction": "flow", "mask": mask_of("elements", student)[..., ::2]}
    student = student[..., ::2]
    arguments = {
        name: value if name == "sigma" else value[..., ::2].transpose(1, 4).contiguous().transpose(1, 4)
        for name, value in arguments.items()
    }
    arguments["real_uncond"] = arguments["real_uncond"][:, :1].expand_as(student)
    assert_as_good_as_torch(student, arguments, backend, **options)
    channels_last = student.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    _, gradient = run(ops.dmd_loss, channels_last, arguments, backend=backend, **options)
    assert gradient.stride() == channels_last.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("perturbation", [1e-2, 1e-4])
def test_a_critic_that_tracks_the_teacher_keeps_its_digits(perturbation, backend):
    student, arguments = scores(perturbation=perturbation)
    arguments.pop("fake_uncond"), arguments.pop("real_uncond")
    value, gradient = run(ops.dmd_loss, student, arguments, backend=backend)
    true_value, true_gradient = truth(student, arguments)
    assert relative_error(value, true_value) < 1e-6
    assert relative_error(gradient, true_gradient) < 1e-6


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
        ops.dmd_loss, student, {**arguments, "real": student, "real_uncond": student}, convention=bare
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
    torch.testing.assert_close(gradient[1], expected_gradient[1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gradient[0], expected_gradient[0], rtol=1e-5, atol=1e-8, equal_nan=True)
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


def test_float16_overflow_is_emulated_to_the_last_bit():
    student, arguments = scores(dtype=torch.float16)
    student, arguments = student * 3e4, {name: value * 3e4 for name, value in arguments.items()}
    emulated = replace(conventions.self_forcing, arithmetic="emulate")
    value, gradient = run(
        ops.dmd_loss, student, {n: arguments[n] for n in ("fake", "real", "real_uncond")}, convention=emulated
    )
    names = {"f": "fake", "c": "real", "u": "real_uncond"}
    expected, expected_gradient = run(
        FORMULAS["self_forcing"], student, {short: arguments[name] for short, name in names.items()}, s=3.5
    )
    assert torch.equal(value.nan_to_num(), expected.nan_to_num())
    assert torch.equal(gradient.nan_to_num(), expected_gradient.nan_to_num())


@pytest.mark.parametrize("arithmetic", ["float64", "emulate"])
@pytest.mark.parametrize("name", NAMED)
def test_stepwise_arithmetic_is_the_reference(name, arithmetic):
    convention = replace(NAMED[name], arithmetic=arithmetic)
    student, arguments = scores(dtype=torch.bfloat16, layout=convention.layout)
    options = {"convention": convention, "guidance": 4.1, "mask": mask_of("elements", student)}
    value, gradient = run(ops.dmd_loss, student, arguments, **options)
    expected, expected_gradient = run(reference.dmd_loss, student, arguments, **options)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arithmetic", ["float32", "emulate"])
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo", "tdm"])
def test_terms_report_magnitude_norm_and_guided_real(name, arithmetic, backend):
    if arithmetic == "emulate" and backend != "reference":
        pytest.skip("emulation has one implementation")
    convention = replace(NAMED[name], arithmetic=arithmetic)
    student, arguments = scores((2, 6, 3, 5, 9), dtype=torch.bfloat16, layout=convention.layout)
    arguments.pop("fake_uncond")
    terms = ops.dmd_loss(student, **arguments, convention=convention, backend=backend, return_terms=True)
    alone = ops.dmd_loss(student, **arguments, convention=convention, backend=backend)
    assert torch.equal(terms.loss, alone)
    g = reference.dmd_direction(
        student, arguments["fake"], arguments["real"], convention, real_uncond=arguments["real_uncond"]
    )
    torch.testing.assert_close(terms.magnitude.float(), g.abs().mean().float(), rtol=1e-2, atol=0)
    guided = reference.guided(
        arguments["real"].float(), arguments["real_uncond"].float(), 3.5, convention.guidance_form
    )
    torch.testing.assert_close(terms.real.float(), guided, rtol=1e-2, atol=3e-2)
    shapes = {"sample": (2,), "batch": (1,), "block": (2, 2)}
    assert terms.norm.shape == shapes[convention.norm_scope]
    distance = (student.float() - guided).abs()
    pieces = {"sample": (2, -1), "batch": (1, -1), "block": (2, 2, -1)}[convention.norm_scope]
    expected = distance.reshape(pieces).mean(-1)
    torch.testing.assert_close(terms.norm.float(), expected, rtol=1e-2, atol=0)
    assert not terms.magnitude.requires_grad
    assert not terms.norm.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_need_not_be_the_last_layer(backend):
    student, arguments = scores()
    _, once = run(ops.dmd_loss, student, arguments, backend=backend)
    _, scaled = run(ops.dmd_loss, student, arguments, upstream=-8.0, backend=backend)
    assert torch.equal(scaled, -8.0 * once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_repeat_bit_for_bit(backend):
    student, arguments = scores((2, 9, 4, 20, 31), torch.bfloat16, flow=True)
    first = run(ops.dmd_loss, student, arguments, prediction="flow", backend=backend)
    second = run(ops.dmd_loss, student, arguments, prediction="flow", backend=backend)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("arithmetic", ["float32", "emulate"])
def test_a_second_differentiation_raises(arithmetic):
    student, arguments = scores()
    leaf = student.requires_grad_()
    loss = ops.dmd_loss(leaf, **arguments, convention=replace(conventions.self_forcing, arithmetic=arithmetic))
    (gradient,) = torch.autograd.grad(loss.square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("arithmetic", ["float32", "emulate"])
def test_autocast_changes_nothing(arithmetic):
    student, arguments = scores()
    convention = replace(conventions.self_forcing, arithmetic=arithmetic)
    outside = run(ops.dmd_loss, student, arguments, convention=convention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(ops.dmd_loss, student, arguments, convention=convention)
    assert torch.equal(outside[0], inside[0])
    assert torch.equal(outside[1], inside[1])


@pytest.mark.parametrize("name", ["self_forcing", "longlive", "rcm"])
def test_opcheck(name):
    student, arguments = scores(layout=NAMED[name].layout, flow=True)
    options = (NAMED[name].layout, NAMED[name].encoded, 3.5, 2.0, True, "auto")
    order = ("fake", "real", "real_uncond", "fake_uncond", "noisy", "sigma")
    tensors = [student.requires_grad_(), *(arguments[key] for key in order), None, torch.rand(2)]
    torch.library.opcheck(torch.ops.codmd.dmd_loss.default, (*tensors, *options))


@pytest.mark.parametrize("arithmetic", ["float32", "emulate"])
@pytest.mark.parametrize("name", ["self_forcing", "longlive"])
def test_it_compiles_without_a_graph_break(name, arithmetic):
    convention = replace(NAMED[name], arithmetic=arithmetic)
    student, arguments = scores(dtype=torch.bfloat16, flow=True)
    mask = mask_of("elements", student)

    def loss(x):
        return 2 * ops.dmd_loss(x, **arguments, convention=convention, prediction="flow", mask=mask)

    eager = run(loss, student, {})
    compiled = run(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, {})
    torch.testing.assert_close(compiled[0], eager[0])
    torch.testing.assert_close(compiled[1], eager[1])


def test_terms_compile_too():
    student, arguments = scores()
    compiled = torch.compile(ops.dmd_loss, fullgraph=True, backend="aot_eager")
    terms = compiled(student.requires_grad_(), **arguments, return_terms=True)
    expected = ops.dmd_loss(student, **arguments, return_terms=True)
    for found, wanted in zip(terms, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_gradient_is_g_over_the_number_of_selected_elements():
    student, arguments = scores((2, 3, 2, 2, 3), torch.float64, flow=True)
    mask = mask_of("elements", student)
    plain = {name: arguments[name] for name in ("fake", "real", "noisy", "sigma")}
    _, gradient = run(ops.dmd_loss, student, plain, prediction="flow", mask=mask)
    sigma = arguments["sigma"].double()[:, :, None, None, None]
    fake, real = (arguments["noisy"] - sigma * arguments[name] for name in ("fake", "real"))
    norm = (student - real).abs().flatten(1).mean(1).reshape(2, 1, 1, 1, 1)
    expected = torch.where(mask, (fake - real) / norm, 0) / mask.sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-16)


WRONG = [
    ({"student": 1.0}, TypeError, "student must be a torch.Tensor, got float"),
    ({"student": torch.zeros(2, 3, 4, 5)}, ValueError, "student must have 5 axes for layout='bfchw'"),
    (
        {"student": torch.zeros(2, 3, 4, 5, 6).long()},
        TypeError,
        "student must be float32, bfloat16, float16 or float64",
    ),
    ({"layout": "bchw"}, ValueError, "student must have 4 axes for layout='bchw'"),
    ({"layout": "bhwc"}, ValueError, "layout='bhwc' is not known; allowed: bfchw, bcfhw, bchw"),
    ({"fake": None}, TypeError, "fake must be a torch.Tensor, got NoneType"),
    ({"real": None}, TypeError, "real must be a torch.Tensor, got NoneType"),
    ({"real": torch.zeros(1)}, ValueError, "real must have the shape of student"),
    ({"fake": torch.zeros(2, 3, 4, 5, 6).half()}, TypeError, "fake must have the dtype of student"),
    ({"real_uncond": torch.zeros(3)}, ValueError, "real_uncond must have the shape of student"),
    ({"fake_uncond": "none"}, TypeError, "fake_uncond must be a torch.Tensor, got str"),
    (
        {"fake": torch.zeros(2, 3, 4, 5, 6, requires_grad=True)},
        ValueError,
        "fake requires a gradient, but only student",
    ),
    ({"fake": torch.zeros(2, 3, 4, 5, 6, device="meta")}, ValueError, "fake must be on the device of student"),
    ({"guidance": "high"}, TypeError, "guidance must be a Python number, got str"),
    ({"guidance": float("nan")}, ValueError, "guidance must be finite, got nan"),
    ({"fake_guidance": float("inf")}, ValueError, "fake_guidance must be finite, got inf"),
    ({"convention": "wan"}, ValueError, "convention='wan' is not known; known: causvid"),
    ({"convention": None}, TypeError, "convention must be a name or"),
    ({"mask": [True]}, TypeError, "mask must be a boolean torch.Tensor, got list"),
    (
        {"mask": torch.ones(2, 1, 1, 1, 1)},
        TypeError,
        "mask must be torch.bool (True selects an element), got torch.float32",
    ),
    ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask must broadcast to the shape of student"),
    (
        {"mask": torch.ones(1, 2, 3, 4, 5, 6, dtype=torch.bool)},
        ValueError,
        "mask must broadcast to the shape of student",
    ),
    ({"mask": torch.ones(6, dtype=torch.bool, device="meta")}, ValueError, "mask must be on the device of student cpu"),
    ({"sample_weight": 2.0}, TypeError, "sample_weight must be a torch.Tensor, got float"),
    ({"sample_weight": torch.ones(3)}, ValueError, "sample_weight must have shape (batch,) = (2,), got (3,)"),
    (
        {"sample_weight": torch.ones(2).int()},
        TypeError,
        "sample_weight must be a floating-point tensor, got torch.int32",
    ),
    ({"sample_weight": torch.ones(2, device="meta")}, ValueError, "sample_weight must be on the device of student cpu"),
    ({"sample_weight": torch.ones(2, requires_grad=True)}, ValueError, "sample_weight requires a gradient"),
    ({"prediction": "v"}, ValueError, "prediction='v' is not known; allowed: x0, flow"),
    ({"prediction": "flow"}, TypeError, 'noisy must be a torch.Tensor with prediction="flow", got NoneType'),
    ({"sigma": torch.ones(2)}, ValueError, 'sigma is used with prediction="flow" alone'),
    ({"noisy": torch.zeros(2, 3, 4, 5, 6)}, ValueError, 'noisy is used with prediction="flow" alone'),
    (
        {"prediction": "flow", "noisy": torch.zeros(2, 3, 4, 5, 6), "sigma": torch.ones(2, 4)},
        ValueError,
        "sigma must have shape (batch,) = (2,) or (batch, frames) = (2, 3), got (2, 4)",
    ),
    (
        {"prediction": "flow", "noisy": torch.zeros(2, 3, 4, 5, 6), "sigma": torch.ones(2).int()},
        TypeError,
        "sigma must be a floating-point tensor, got torch.int32",
    ),
    ({"backend": "gpu"}, ValueError, "backend='gpu' is not known; allowed: auto, triton, cuda, cpp, reference"),
    (
        {"backend": "cpp", "convention": replace(conventions.rcm, arithmetic="emulate"), "layout": "bfchw"},
        ValueError,
        "backend='cpp' cannot serve this convention: arithmetic='emulate' is computed step by step",
    ),
]


@pytest.mark.parametrize("operator", [ops.dmd_loss, ops.codmd_loss])
@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_a_wrong_argument_is_named_with_what_came_and_what_is_allowed(change, kind, message, operator):
    arguments = {name: torch.zeros(2, 3, 4, 5, 6) for name in ("student", "fake", "real")}
    with pytest.raises(kind) as error:
        operator(**{**arguments, **change})
    assert message in str(error.value)


def test_a_backend_without_a_fused_pass_is_a_logged_reason(monkeypatch, caplog):
    monkeypatch.setattr(backends, "select", lambda requested, tensor: types.ModuleType("codmd.ops._absent"))
    with caplog.at_level(logging.INFO, logger="codmd"):
        assert _dmd_backend.select("auto", torch.empty(1)) is _reference_dmd
    assert "the DMD losses run on the reference instead of codmd.ops._absent: ModuleNotFoundError" in caplog.text
    with pytest.raises(ValueError, match="backend='cpp' has no fused DMD loss: ModuleNotFoundError"):
        _dmd_backend.select("cpp", torch.empty(1))


def test_a_convention_that_runs_step_by_step_says_so_once(caplog):
    _dmd_backend._log_once.cache_clear()
    student, arguments = scores((1, 2, 2, 2, 2))
    with caplog.at_level(logging.INFO, logger="codmd"):
        for _ in range(2):
            ops.dmd_loss(student, **arguments, convention=replace(conventions.rcm, arithmetic="float64"))
    assert caplog.text.count("arithmetic='float64' is computed step by step") == 1
