"""What is decided before a Triton kernel runs: plans, what they are kept under, tickets, sizes that are refused."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_calls import gradient, objective_call, relation_call

from codmd import conventions
from codmd.kernels import backend, blocks, launch, limits, plans, tickets, tiling
from codmd.kernels.launch import Launch, recording
from codmd.kernels.whole.runs import Runs
from codmd.ops.contract import Numbers, Upstream

KERNELS = Path(__file__).parent.parent / "kernels"
HALF, SINGLE = torch.float16, torch.float32
SHAPE = (2, 3, 2, 4, 8)


def misaligned(tensor: Tensor) -> Tensor:
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return room[1:].view(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


CHANGES = {"misaligned": misaligned, "transposed": transposed}
UPSTREAMS = tuple(
    {name: torch.empty((), dtype=dtype) for name, dtype in zip(Upstream._fields, kinds, strict=True) if dtype}
    for kinds in (
        (SINGLE, None, None, None), (torch.float64, None, None, None), (None, SINGLE, None, None),
        (None, None, SINGLE, None), (None, None, None, SINGLE), (SINGLE, None, SINGLE, SINGLE),
        (SINGLE, SINGLE, SINGLE, SINGLE),
    )
)  # fmt: skip
SCHEDULED = torch.empty(6)


def relation(
    shape=SHAPE, dtype=HALF, layout="bfchw", pool="mean", mask=None, weights=(1.0, 1.0), change=(), gather=False,
    scheduled=False,
):  # fmt: skip
    """Launches of the relation loss; ``change`` = (latent, what) makes that one strided or misaligned."""
    scores = {name: torch.empty(shape, dtype=dtype) for name in ("student", "real", "fake", "out")}
    if change:
        scores[change[0]] = CHANGES[change[1]](scores[change[0]])
    out = scores.pop("out")
    call = relation_call(tuple(scores.values()), pool, mask, layout, weights)
    call = call._replace(numbers=SCHEDULED) if scheduled else call
    with recording() as launches:
        if gather:
            backend.features(call)
            return launches
        found = backend.relation(call)
        for upstream in UPSTREAMS:
            gradient(backend, call, found, out, **upstream)
    return launches


def gathered(vectors=6, features=5, first=0, samples=2, scheduled=False):
    call = relation_call([torch.empty(samples, 1, features, 1, 1)] * 3)
    call = call._replace(numbers=SCHEDULED) if scheduled else call
    rows = torch.empty(vectors, 3 * features + 1)
    with recording() as launches:
        pending = backend.features(call)
        for table in (rows, misaligned(rows)):
            backend.gathered(call, pending, table, first, 1.0)
    return launches


def both(
    shape=SHAPE, dtype=HALF, layout="bfchw", convention="longlive", change=(), absent=(), mask=None, sigma=None,
    weight=None, valid=None, pool="mean", batch=True, frame=True, ranks=0, scheduled=False,
):  # fmt: skip
    """Launches of the DMD loss and of the CoDMD loss, or of its stages on one of ``ranks`` processes."""
    names = "student", "real", "fake", "real_uncond", "fake_uncond", "noisy", "out"
    tensors = {name: torch.empty(shape, dtype=dtype) for name in names}
    if change:
        tensors[change[0]] = CHANGES[change[1]](tensors[change[0]])
    tensors |= dict.fromkeys(absent)
    student, out = tensors.pop("student"), tensors.pop("out")
    tensors["sigma"] = torch.empty(shape[:2]) if sigma is None else sigma
    call = objective_call(
        student, tensors, convention, mask=mask, sample_weight=weight, frame_mask=valid, layout=layout, pool=pool,
        batch=batch, frame=frame, numbers=SCHEDULED if scheduled else None,
    )  # fmt: skip
    with recording() as launches:
        if ranks:
            pending = backend.features(call)
            backend.gathered(call, pending, torch.empty(ranks * shape[0], pending.rows.shape[1]), 0, 1.0)
            return launches
        for one in (call, call._replace(related=False)):
            found = backend.objective(one, True)
            for upstream in UPSTREAMS:
                gradient(backend, one, found, out, **upstream)
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
            {"weights": (1.0, 0.0)}, {"gather": True}, {"scheduled": True}, *({"change": c} for c in strided),
            *({"pool": (2, 1)}, {"pool": (1, 2)}) * (pool is not None),
            *({"mask": m} for m in masks(*shape[:2])),
        ):  # fmt: skip
            yield partial(one, **changed)
    for features in (5, limits.MOST_POOLED * 4):
        for changed in ({}, {"first": 2}, {"samples": 3}, {"vectors": 40}, {"scheduled": True}):
            yield partial(gathered, **{"features": features} | changed)
    selected = torch.empty(SHAPE, dtype=torch.bool)
    names = "student", "fake", "real", "real_uncond", "fake_uncond", "noisy", "out"
    strided = [(name, what) for name in names for what in CHANGES]
    for changed in (
        {}, {"dtype": SINGLE}, {"dtype": torch.bfloat16}, {"layout": "bcfhw", "sigma": torch.empty(2, 2)},
        *({"change": c} for c in strided), *({"convention": name} for name in ("rcm", "fastvideo", "fastgen", "tdm")),
        {"convention": conventions.replace(conventions.longlive, norm_block=2)},
        {"absent": ("real_uncond",)}, {"absent": ("fake_uncond",)},
        *({"mask": m} for m in (selected, misaligned(selected), transposed(selected), selected[:1, :1].expand(SHAPE))),
        {"sigma": torch.empty(3, 2).t()}, {"sigma": torch.empty(2, 3, dtype=torch.float64)},
        {"weight": torch.empty(2)}, {"weight": torch.empty(4)[::2]}, {"weight": torch.empty(2, dtype=torch.float64)},
        *({"valid": m} for m in masks(2, 3)), {"pool": (2, 1)}, {"pool": (1, 2)},
        {"batch": False}, {"frame": False}, {"scheduled": True}, {"ranks": 2}, {"ranks": 3},
        {"ranks": 2, "frame": False}, {"ranks": 2, "scheduled": True},
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
        plans.PLANS.clear()
        fresh.append([described(launched) for launched in call()])
    compiled = {}
    for call, expected in zip(every, fresh, strict=True):
        launches = call()
        assert [described(launched) for launched in launches] == expected, call
        for launched in launches:
            _, first = compiled.setdefault(id(launched.launcher), (launched.launcher, specialised(launched)))
            assert specialised(launched) == first, (launched.name, call)


def test_the_plans_used_latest_are_kept_and_their_number_is_bounded():
    made = []
    cache = plans.Plans(most=3)

    def use(key):
        return cache.of(key, lambda: made.append(key) or key)

    for key in "abcadaeaf":
        assert use(key) == key
    assert made == list("abcdef")
    for key in "aef":
        use(key)
    assert made == list("abcdef")
    for key in range(100):
        use(key)
        use(key)
        assert len(list(cache)) <= 6
    assert made[6:] == list(range(100))


def test_the_pieces_of_a_workspace_do_not_overlap_and_are_aligned():
    workspace = plans.Workspace(first=5, empty=0, second=8, last=1)
    assert workspace.at("first", "empty", "second", "last") == (0, 8, 8, 16)
    assert workspace.size == 20


def test_kernels_load_numbers_in_the_contracts_order():
    assert [getattr(blocks, name.upper()).value for name in Numbers._fields] == list(range(len(Numbers._fields)))


@pytest.fixture
def on_gpu(monkeypatch):
    """What :func:`tickets.counters` sees of a tensor on a GPU, in memory of the CPU; ``capturing`` is the test's."""
    monkeypatch.setattr(tickets, "_buffers", {})
    monkeypatch.setattr(tickets, "_outgrown", [])
    monkeypatch.setattr(tickets, "_capture_pool", {})
    monkeypatch.setattr(tickets, "CAPTURE_POOL", 64)
    seen = SimpleNamespace(device=torch.device("cpu"), is_cuda=True, capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    return seen


def test_calls_on_one_stream_share_their_tickets_and_streams_do_not(on_gpu):
    first, again, other = (tickets.counters(on_gpu, stream, 3) for stream in (5, 5, 6))
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    large = tickets.counters(on_gpu, 5, 10_000)
    assert len(large) >= 10_000
    assert not large.any()


def test_a_buffer_that_kernels_may_still_count_in_outlives_a_larger_one(on_gpu):
    sizes = 3, 5000, 6000, 9000, 20_000
    places = {tickets.counters(on_gpu, 5, size).data_ptr() for size in sizes}
    kept = [*tickets._outgrown, *tickets._buffers.values()]
    assert places <= {buffer.data_ptr() for buffer in kept}
    assert sum(map(len, tickets._outgrown)) < len(tickets._buffers[on_gpu.device, 5])
    assert tickets.counters(on_gpu, 5, 3).data_ptr() == kept[-1].data_ptr()


def test_threads_that_capture_at_once_share_no_ticket(on_gpu, monkeypatch):
    monkeypatch.setattr(tickets, "CAPTURE_POOL", 4000)
    tickets.counters(on_gpu, 5, 3)
    on_gpu.capturing = True
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            taken = list(pool.map(lambda _: tickets.counters(on_gpu, 5, 2).data_ptr(), range(1000)))
    finally:
        sys.setswitchinterval(switch)
    assert len(set(taken)) == len(taken)


def test_captured_calls_take_tickets_that_no_other_call_ever_gets(on_gpu):
    eager = tickets.counters(on_gpu, 5, 3)
    on_gpu.capturing = True
    taken = [eager, *(tickets.counters(on_gpu, 5, 30) for _ in range(4))]
    places = [set(range(t.data_ptr(), t.data_ptr() + 4 * len(t), 4)) for t in taken]
    assert all(len(t) >= 30 and not t.any() for t in taken[1:])
    assert len(set.union(*places)) == sum(map(len, places))


def test_a_capture_without_warm_up_has_tickets(on_gpu):
    on_gpu.capturing = True
    found = tickets.counters(on_gpu, 5, 7)
    assert (len(found), found.dtype, bool(found.any())) == (7, torch.int32, False)


@pytest.mark.parametrize("fails", [False, True])
def test_a_first_call_loads_its_kernel_in_relaxed_capture_mode(monkeypatch, fails):
    modes = [0]

    def exchange(mode):
        mode._obj.value, before = modes[-1], mode._obj.value
        modes.append(before)
        return 0

    def start(self, arguments):
        assert modes[-1] == launch.RELAXED
        if fails:
            raise RuntimeError("the compiler's own")
        return SimpleNamespace(run=lambda *_: None, function=None, packed_metadata=None)

    monkeypatch.setattr(launch, "_exchange_capture_mode", lambda: exchange)
    monkeypatch.setattr(launch.Launcher, "start", start)
    one = launch.Launcher(None, 1, (), warps=4)
    with pytest.raises(RuntimeError, match="own") if fails else contextlib.nullcontext():
        one(0)
    assert modes == [0, launch.RELAXED, 0]
    if not fails:
        one(0)
        assert len(modes) == 3


def test_an_axis_of_one_element_does_not_narrow_the_vectors():
    odd = tiling.Geometry.of((1, 2, 16, 1, 8), (7, 128, 8, 3, 1), "bfchw")
    assert tiling.vector_width((odd,), False, 1, 2, True) == 8
    assert Runs((odd,), (2,), True).vec == 8


@pytest.mark.parametrize(
    ("taken", "refused", "pool", "batch", "frame"),
    [
        ((1, 1024, 1, 1, 1), (1, 1025, 1, 1, 1), (1, 1), True, True),
        ((1024, 1, 1, 1, 1), (1025, 1, 1, 1, 1), (1, 1), True, True),
        ((1, 128, 9, 9, 9), (1, 129, 9, 9, 9), None, False, True),
        ((128, 1, 9, 9, 9), (129, 1, 9, 9, 9), None, True, False),
        ((1, 2, (1 << 28) - 1, 1, 1), (1, 2, 1 << 28, 1, 1), (1, 1), False, True),
        ((2, 1, (1 << 28) - 1, 1, 1), (2, 1, 1 << 28, 1, 1), (1, 1), True, False),
        ((1, 2, (1 << 26) - 1, 2, 2), (1, 2, 1 << 26, 2, 2), (2, 2), False, True),
    ],
)
def test_the_largest_sizes_are_taken_and_the_next_refused(taken, refused, pool, batch, frame):
    assert limits.refusal(taken, pool, batch, frame) == ""
    assert limits.refusal(refused, pool, batch, frame)
    with pytest.raises(limits.Refused):
        limits.check(refused, pool, batch, frame)


@pytest.mark.parametrize(("frames", "pieces", "each"), [(21, 32, 3), (168, 32, 4), (240, 32, 4), (2, 7, 1)])
def test_programs_fill_the_multiprocessors_and_are_short_where_memory_is_what_takes_the_time(frames, pieces, each):
    assert tiling.pieces_of_a_program(frames, pieces, 132, pieces) == each


def test_a_term_that_is_not_wanted_refuses_nothing():
    assert limits.refusal((2000, 3, 1, 1, 1), (1, 1), False, True) == ""
    assert limits.refusal((3, 2000, 1, 1, 1), (1, 1), True, False) == ""


def test_the_readme_names_functions_where_they_are():
    named = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:,\s)?)+)", (KERNELS / "README.md").read_text())
    places = [(file, name) for file, names in named for name in re.findall(r"\w+", names)]
    assert len(places) > 30
    for file, name in places:
        assert re.search(rf"^(def {name}\(|{name} = )", (KERNELS / file).read_text(), re.M), (file, name)


LAYERS = (
    "launch", "tiling", "limits", "plans", "tickets", "blocks", "divergence", "pooled", "whole", "dmd", "attention",
    "backend",
)  # fmt: skip


def test_no_import_runs_up_from_a_lower_layer_to_a_higher_one():
    for source in KERNELS.rglob("*.py"):
        own = source.relative_to(KERNELS).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(source.read_text())):
            if own == "__init__" or not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            above = node.level == (2 if source.parent != KERNELS else 1)
            targets = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            for target in targets if above else []:
                assert target == "load_error" or LAYERS.index(target) < LAYERS.index(own), (source, target)


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


def test_what_temperature_magnifies_is_divided_with_one_rounding():
    """S, S/τ and the softmax; a plain division is off by two units on a GPU, and exact under the interpreter."""
    divergence = (KERNELS / "divergence.py").read_text()
    assert set(re.findall(r"tl\.div_rn\((.+?)\)", divergence)) == {"similarity, temperature", "weight, mass"}
    for file in ("pooled/algebra.py", "pooled/rows.py"):
        assert re.search(r"similarity = tl\.div_rn\(similarity, i_norms\[0\] \* ", (KERNELS / file).read_text())


def test_every_dot_is_ieee_float32():
    """The default is TF32, which the interpreter does not imitate. cores.py multiplies 16 bits (test_static.py)."""
    found = [(place, keywords) for place, keywords in _calls("dot") if not place.startswith("cores.py:")]
    assert len(found) > 10
    assert [place for place, keywords in found if keywords.get("input_precision") != "'ieee'"] == []
