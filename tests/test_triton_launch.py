"""What is decided before a Triton kernel runs: plans, what they are kept under, tickets, sizes that are refused."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from codmd.kernels import launch, limits, tiling
from codmd.kernels.dmd import passes as dmd
from codmd.kernels.dmd import related
from codmd.kernels.launch import Launch, recording
from codmd.kernels.pooled import passes as pooled
from codmd.kernels.whole import passes as whole
from codmd.kernels.whole import together
from codmd.kernels.whole.runs import Runs

from codmd import conventions, kernels

KERNELS = Path(__file__).parent.parent / "kernels"
HALF, SINGLE = torch.float16, torch.float32
SHAPE = (2, 3, 2, 4, 8)
PLANS = (
    pooled._forward_plans, pooled._rows_plans, pooled._backward_plans, dmd._plans,
    related._gathered_plans, whole._plans, together._plans,
)  # fmt: skip


def misaligned(tensor: Tensor) -> Tensor:
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return room[1:].view(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


CHANGES = {"misaligned": misaligned, "transposed": transposed}
UPSTREAMS = (
    (SINGLE, None, None), (torch.float64, None, None), (None, SINGLE, None), (None, None, SINGLE),
    (SINGLE, SINGLE, SINGLE),
)  # fmt: skip


def relation(
    shape=SHAPE, dtype=HALF, layout="bfchw", pool="mean", mask=None, weights=(1.0, 1.0), change=(), gather=False
):
    """Launches of the relation loss; ``change`` = (latent, what) makes that one strided or misaligned."""
    scores = {name: torch.empty(shape, dtype=dtype) for name in ("student", "real", "fake", "out")}
    if change:
        scores[change[0]] = CHANGES[change[1]](scores[change[0]])
    out = scores.pop("out")
    with recording() as launches:
        if gather:
            kernels.relation_frames(*scores.values(), mask, layout, pool, 0.1, weights[1])
            return launches
        _, *grads = kernels.relation_forward(*scores.values(), mask, layout, pool, 0.1, *weights)
        for upstream in UPSTREAMS:
            given = (g if g is None else torch.empty((), dtype=g) for g in upstream)
            kernels.relation_backward(out, *given, scores["student"], mask, *grads, layout, pool, *weights)
    return launches


def gathered(vectors=6, features=5, first=0, rows=2):
    pooled = torch.empty(vectors, 3 * features + 1)
    with recording() as launches:
        for table in (pooled, misaligned(pooled)):
            kernels.relation_batch(table, torch.empty(1), first, rows, 0.1, 1.0, 1.0, 1.0)
    return launches


def both(
    shape=SHAPE, dtype=HALF, layout="bfchw", convention="longlive", change=(), absent=(), mask=None, sigma=None,
    weight=None, valid=None, pool="mean", weights=(1.0, 1.0), ranks=0, rule=None,
):  # fmt: skip
    """Launches of the DMD loss and of the CoDMD loss, or of its stages on one of ``ranks`` processes."""
    names = "student", "fake", "real", "real_uncond", "fake_uncond", "noisy", "out"
    tensors = {name: torch.empty(shape, dtype=dtype) for name in names}
    if change:
        tensors[change[0]] = CHANGES[change[1]](tensors[change[0]])
    tensors |= dict.fromkeys(absent)
    out, sigma = tensors.pop("out"), torch.empty(shape[:2]) if sigma is None else sigma
    rule = conventions.resolve(convention) if rule is None else rule
    inputs = *tensors.values(), sigma, mask, weight, layout, rule, 3.5, 0.5
    scores = tuple(tensors[name] for name in names[1:5])
    with recording() as launches:
        if ranks:
            pending = kernels.codmd_rows(inputs, valid, pool, 0.1, weights[1], ranks)
            rows = torch.empty(ranks * shape[0], pending.rows.shape[1])
            kernels.codmd_gathered(pending, rows, 0, 0.1, 1.0, 1.0, 1.0)
            return launches
        _, norms, factors = kernels.dmd_forward(*inputs, False)
        tail = layout, rule, 3.5, 0.5
        kernels.dmd_backward(out, torch.empty(()), *scores, sigma, mask, norms, factors, *tail)
        _, norms, factors, *grads = kernels.codmd_terms(inputs, valid, pool, 0.1, 0.1, *weights)
        for upstream in UPSTREAMS:
            total, first, last = (g if g is None else torch.empty((), dtype=g) for g in upstream)
            for given in ((total, first, last, last), (total, last, first, last), (total, last, last, first)):
                kernels.codmd_backward(
                    out, *given, *scores, sigma, mask, valid, norms, factors, *grads, *tail, pool, 0.1, *weights
                )
    return launches


def masks(samples: int, frames: int) -> tuple[Tensor, ...]:
    """Frame masks that differ in strides or dtype."""
    valid = torch.empty(samples, frames, dtype=torch.bool)
    return valid, valid.t().contiguous().t(), valid[:1].expand(samples, frames), valid.float()


def calls():
    """Calls in groups: within each, a plan kept from one must serve no other."""
    strided = [(name, what) for name in ("student", "real", "fake", "out") for what in CHANGES]
    for shape, pool in (
        (SHAPE, "mean"), ((2, 33, 2, 4, 8), "mean"), (SHAPE, None), ((3, 33, 2, 4, 8), None), ((3, 1, 2, 4, 8), None),
    ):  # fmt: skip
        one = partial(relation, shape, pool=pool)
        yield one
        for changed in (
            {"dtype": SINGLE}, {"dtype": torch.bfloat16}, {"layout": "bcfhw"}, {"weights": (0.0, 1.0)},
            {"weights": (1.0, 0.0)}, {"gather": True}, *({"change": c} for c in strided),
            *({"pool": (2, 1)}, {"pool": (1, 2)}) * (pool is not None),
            *({"mask": m} for m in masks(*shape[:2])),
        ):  # fmt: skip
            yield partial(one, **changed)
    for features in (5, limits.MOST_POOLED * 4):
        for changed in ({}, {"first": 2}, {"rows": 3}, {"vectors": 40}):
            yield partial(gathered, **{"features": features} | changed)
    selected = torch.empty(SHAPE, dtype=torch.bool)
    names = "student", "fake", "real", "real_uncond", "fake_uncond", "noisy", "out"
    strided = [(name, what) for name in names for what in CHANGES]
    for changed in (
        {}, {"dtype": SINGLE}, {"dtype": torch.bfloat16}, {"layout": "bcfhw", "sigma": torch.empty(2, 2)},
        *({"change": c} for c in strided), *({"convention": name} for name in ("rcm", "fastvideo", "fastgen", "tdm")),
        {"rule": conventions.replace(conventions.longlive, norm_block=2)},
        {"absent": ("real_uncond",)}, {"absent": ("fake_uncond",)},
        *({"mask": m} for m in (selected, misaligned(selected), transposed(selected), selected[:1, :1].expand(SHAPE))),
        {"sigma": torch.empty(3, 2).t()}, {"sigma": torch.empty(2, 3, dtype=torch.float64)},
        {"weight": torch.empty(2)}, {"weight": torch.empty(4)[::2]}, {"weight": torch.empty(2, dtype=torch.float64)},
        *({"valid": m} for m in masks(2, 3)), {"pool": (2, 1)}, {"pool": (1, 2)},
        {"weights": (0.0, 1.0)}, {"weights": (1.0, 0.0)}, {"ranks": 2}, {"ranks": 3},
        {"ranks": 2, "weights": (1.0, 0.0)},
        {"ranks": 2, "shape": (2, 33, 2, 4, 8)}, {"ranks": 2, "shape": (2, 34, 2, 4, 8)},
    ):  # fmt: skip
        yield partial(both, **changed)


def specialised(launched: Launch) -> tuple:
    """What Triton compiles a launch for."""
    found = []
    for parameter, value in zip(launched.launcher.kernel.params, launched.values.values(), strict=True):
        if isinstance(value, Tensor):
            free = parameter.do_not_specialize_on_alignment
            found.append((value.dtype, free or value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and not parameter.is_constexpr and not parameter.do_not_specialize:
            found.append((value == 1, value % 16 == 0, value < 1 << 31))
        elif isinstance(value, int) and not parameter.is_constexpr:
            found.append(value < 1 << 31)
        else:
            found.append(type(value) if isinstance(value, float) else value)
    return tuple(found)


def described(launched: Launch) -> tuple:
    """Everything of a launch but the tensors' contents."""
    values = [v for v in launched.values.values() if not isinstance(v, Tensor)]
    launcher = launched.launcher
    return launched.name, launcher.grid, launcher.options("cuda"), values


@pytest.mark.skipif(launch.INTERPRETING, reason="the interpreter specialises on nothing")
def test_a_kept_plan_launches_what_a_fresh_one_would_and_as_it_was_compiled():
    every, fresh = list(calls()), []
    for call in every:
        for plans in PLANS:
            plans.clear()
        fresh.append([described(launched) for launched in call()])
    compiled = {}
    for call, expected in zip(every, fresh, strict=True):
        launches = call()
        assert [described(launched) for launched in launches] == expected, call
        for launched in launches:
            _, first = compiled.setdefault(id(launched.launcher), (launched.launcher, specialised(launched)))
            assert specialised(launched) == first, (launched.name, call)


@pytest.fixture
def on_gpu(monkeypatch):
    """What :func:`launch.counters` sees of a tensor on a GPU, with memory of the CPU; ``capturing`` is for the test."""
    monkeypatch.setattr(launch, "_counters", {})
    monkeypatch.setattr(launch, "_capture_pool", {})
    monkeypatch.setattr(launch, "_CAPTURE_POOL", 64)
    seen = SimpleNamespace(device=torch.device("cpu"), is_cuda=True, capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    return seen


def test_calls_on_one_stream_share_their_tickets_and_streams_do_not(on_gpu):
    first, again, other = (launch.counters(on_gpu, stream, 3) for stream in (5, 5, 6))
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    large = launch.counters(on_gpu, 5, 10_000)
    assert len(large) >= 10_000
    assert not large.any()


def test_captured_calls_take_tickets_that_no_other_call_ever_gets(on_gpu):
    eager = launch.counters(on_gpu, 5, 3)
    on_gpu.capturing = True
    taken = [eager, *(launch.counters(on_gpu, 5, 30) for _ in range(4))]
    places = [set(range(t.data_ptr(), t.data_ptr() + 4 * len(t), 4)) for t in taken]
    assert all(len(t) >= 30 and not t.any() for t in taken[1:])
    assert len(set.union(*places)) == sum(map(len, places))


def test_a_capture_without_warm_up_has_tickets(on_gpu):
    on_gpu.capturing = True
    found = launch.counters(on_gpu, 5, 7)
    assert (len(found), found.dtype, bool(found.any())) == (7, torch.int32, False)


def test_an_axis_of_one_element_does_not_narrow_the_vectors():
    odd = tiling.Geometry.of((1, 2, 16, 1, 8), (7, 128, 8, 3, 1), "bfchw")
    assert tiling.vector_width((odd,), False, 1, 2, True) == 8
    assert Runs((odd,), (2,), True).vec == 8


@pytest.mark.parametrize(
    ("taken", "refused", "pool", "batch", "frame"),
    [
        ((1, 1024, 1, 1, 1), (1, 1025, 1, 1, 1), "mean", True, True),
        ((1024, 1, 1, 1, 1), (1025, 1, 1, 1, 1), "mean", True, True),
        ((1, 128, 9, 9, 9), (1, 129, 9, 9, 9), None, False, True),
        ((128, 1, 9, 9, 9), (129, 1, 9, 9, 9), None, True, False),
        ((1, 2, (1 << 28) - 1, 1, 1), (1, 2, 1 << 28, 1, 1), "mean", False, True),
        ((2, 1, (1 << 28) - 1, 1, 1), (2, 1, 1 << 28, 1, 1), "mean", True, False),
        ((1, 2, (1 << 26) - 1, 2, 2), (1, 2, 1 << 26, 2, 2), (2, 2), False, True),
    ],
)
def test_the_largest_sizes_are_taken_and_the_next_refused(taken, refused, pool, batch, frame):
    assert limits.refusal(taken, pool, batch, frame) == ""
    assert limits.refusal(refused, pool, batch, frame)
    with pytest.raises(limits.Refused):
        limits.check(refused, pool, batch, frame)


def test_a_term_that_is_not_wanted_refuses_nothing():
    assert limits.refusal((2000, 3, 1, 1, 1), "mean", False, True) == ""
    assert limits.refusal((3, 2000, 1, 1, 1), "mean", True, False) == ""


def _calls(name: str):
    """(file, line, keywords) of every ``tl.name`` of the kernels."""
    for source in sorted(KERNELS.rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"tl.{name}":
                yield f"{source.name}:{node.lineno}", {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_masked_loads_say_what_stands_outside():
    """Without ``other`` it is undefined on a GPU, and zero under the interpreter."""
    found = list(_calls("load"))
    assert len(found) > 50
    assert [place for place, keywords in found if "mask" in keywords and "other" not in keywords] == []


def test_every_dot_is_ieee_float32():
    """The default is TF32, which the interpreter does not imitate."""
    found = list(_calls("dot"))
    assert len(found) > 10
    assert [place for place, keywords in found if keywords.get("input_precision") != "'ieee'"] == []
