"""Memory at the boundary of the C++ and CUDA extensions: what does not fit is refused before it is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backend_calls import BLOCKS, EXTENSIONS, ONE, forward, gradient, objective_call, relation_call, simulated

from codmd.conventions import fastvideo
from codmd.ops.backends import cuda, raw

TENSORS = (
    "student", "real", "fake", "real_uncond", "fake_uncond", "noisy", "sigma", "mask", "sample_weight", "frame_mask",
    "augment_real", "augment_uncond",
)  # fmt: skip
STRIDED = (*TENSORS[:8], *TENSORS[9:], "out")
FOUND = ("terms", "norms", "factors", "frame_grad", "batch_grad", "rows")
CALLS = {
    "relation": relation_call(),
    "relation of every pixel": relation_call(None),
    "objective": objective_call(),
    "objective of one norm": objective_call(fastvideo, plain=True),
    "dmd alone": objective_call(related=False),
    "decoupled": objective_call(decoupled=True),
    "decoupled of one norm": objective_call(fastvideo, decoupled=True),
}


class Recorder:
    """The extension, and the arguments of its last call."""

    def __init__(self, extension: Any) -> None:
        self.extension, self.name, self.arguments = extension, "", ()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.name, self.arguments = name, arguments
            return getattr(self.extension, name)(*arguments)

        return call


@pytest.fixture(params=EXTENSIONS)
def run(request, monkeypatch):
    with simulated(request.param, monkeypatch) as found:
        monkeypatch.setattr(found, "_C", Recorder(found._C))
        yield found


def is_tensor(value: Any) -> bool:
    return type(value) is tuple and len(value) == 5 and (value[4] is None or isinstance(value[4], tuple))


def tensors(value: Any, names: tuple[str, ...], path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """(place, name) of every tensor among the arguments."""
    for i, item in enumerate(value):
        if is_tensor(item):
            yield (*path, i), names[i] if names else ""
        elif isinstance(item, tuple) and not path:
            inner = {len(TENSORS): TENSORS, len(FOUND): FOUND, 4: ("upstream gradient",) * 4}.get(len(item), ())
            inner = ("rows", *("",) * 5, "kept terms", "") if len(item) == 8 else inner
            yield from tensors(item, inner, (i,))


def changed(value: tuple[Any, ...], path: tuple[int, ...], entry: Any) -> tuple[Any, ...]:
    head, *rest = path
    return (*value[:head], changed(value[head], tuple(rest), entry) if rest else entry, *value[head + 1 :])


def at(value: Any, path: tuple[int, ...]) -> Any:
    for i in path:
        value = value[i]
    return value


def assert_guarded(extension: Recorder, optional: tuple[str, ...] = ()) -> int:
    """Every tensor of the last call is refused when it does not fit; returns how many there were."""
    name, arguments = extension.name, extension.arguments
    target = getattr(extension.extension, name)
    others = len(arguments) - 2
    top = {"gradient": ("out",) * (2 + others), "gathered": ("",) * others + ("terms", "batch_grad")}.get(name, ())
    places = list(tensors(arguments, top))
    for path, tensor in places:
        address, size, first, code, strides = at(arguments, path)
        width = (4, 2, 2, 1, 1, 4)[code]
        wrong = [
            ((address, size - width, first, code, strides), "elements needed from its address on"),
            ((address, size, first + 1, code, strides), "elements needed from its address on"),
            ((0, size, first, code, strides), "elements needed from its address on, 0 came"),
            ((address, size, first, 1 if code != 1 else 2, strides), r"needed, \w+ came"),
            ((address, size, first, -1, strides), "needed, an unknown dtype came"),
        ]
        if tensor in STRIDED:
            wide = [stride * (10**6 if i == 1 else 1) for i, stride in enumerate(strides)]
            wrong.append(((address, size, first, code, tuple(wide)), "elements needed from its address on"))
            wrong.append(((address, size, first, code, (-1, *strides[1:])), "must not be negative"))
        if tensor not in optional:
            wrong.append((None, "missing, "))
        for entry, message in wrong:
            with pytest.raises(ValueError, match=f"codmd extension: {tensor}.*{message}"):
                target(*changed(arguments, path, entry))
    return len(places)


OPTIONAL = (
    "real_uncond", "fake_uncond", "sigma", "mask", "sample_weight", "frame_mask", "frame_grad", "batch_grad", "rows",
    "upstream gradient",
)  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_a_forward_pass_reads_and_writes_is_measured_first(run, name):
    call = CALLS[name]
    found = forward(run, call)
    given = sum(isinstance(value, torch.Tensor) for value in call)
    assert assert_guarded(run._C, OPTIONAL) >= given + 3
    assert found.terms.isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_what_a_gradient_reads_and_writes_is_measured_first(run, name):
    call = CALLS[name]
    found = forward(run, call)
    out = gradient(run, call, found)
    assert assert_guarded(run._C, OPTIONAL) >= 6
    assert out.isfinite().all()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "dmd alone"])
def test_what_a_gather_reads_and_writes_is_measured_first(run, name):
    call = CALLS[name]
    pending = run.features(call)
    assert assert_guarded(run._C, OPTIONAL) >= 5
    found = run.gathered(call, pending, pending.rows, 0, 1.0)
    assert assert_guarded(run._C) == 4
    assert found.terms.isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_a_storage_that_shrank_is_refused(run, name):
    call = CALLS[name]
    short = call.fake.clone()
    short.untyped_storage().resize_(short.nbytes - 4)
    with pytest.raises(ValueError, match=f"fake: {short.numel()} elements needed from its address on, "):
        forward(run, call._replace(fake=short))
    found = forward(run, call)
    found.frame_grad.untyped_storage().resize_(0)
    if found.frame_grad.numel():
        with pytest.raises(ValueError, match=r"frame_grad: .* elements needed from its address on, 0 came"):
            gradient(run, call, found)


def test_a_view_of_a_storage_without_memory_is_refused(run):
    """Its address is its offset alone."""
    call = CALLS["relation"]
    nowhere = torch._efficientzerotensor((2, *call.fake.shape))[1]
    assert nowhere.data_ptr()
    with pytest.raises(ValueError, match=r"fake: .* elements needed from its address on, 0 came"):
        forward(run, call._replace(fake=nowhere))


def test_workspace_and_counters_are_measured_before_a_launch(monkeypatch):
    with simulated(cuda, monkeypatch):
        given = cuda._memory
        for kind, message in ((0, "workspace"), (1, "counters")):

            def short(device, place, kind=kind):
                memory = given(device, place)

                def less(size, counters):
                    buffers = list(memory(size, counters))
                    address, bytes_, *rest = buffers[kind]
                    needed = size if kind == 0 else 4 * counters
                    assert bytes_ >= needed
                    buffers[kind] = (address, needed - 1, *rest)
                    return tuple(buffers)

                return less

            monkeypatch.setattr(cuda, "_memory", short)
            with pytest.raises(ValueError, match=f"{message}: .* elements needed"):
                cuda.relation(relation_call(None))


def test_options_out_of_range_are_refused(run):
    forward(run, CALLS["objective"])
    arguments, target = run._C.arguments, run._C.extension.forward
    start = next(i for i, value in enumerate(arguments) if isinstance(value, tuple) and len(value) == len(TENSORS))
    sizes, dtype, grid, rule, numbers = start + 1, start + 3, start + 4, start + 5, start + 6
    for place, entry, message in (
        (sizes, (3, 5, 4, 6), "sizes: 5 entries needed, 4 came"),
        (sizes, (3, 5, 0, 6, 7), "sizes: every one must be at least 1"),
        (sizes, (1, 1, 1, 1 << 20, 1 << 20), "at most 2\\^31 - 1"),
        (sizes, [3, 5, 4, 6, 7], "sizes: a tuple needed, list came"),
        (dtype, 3, "dtype: float32, bfloat16 or float16 needed, bool came"),
        (grid, (7, 1), "grid: between one region and one a pixel"),
        (grid, (0, 0), "grid: between one region and one a pixel"),
        (rule, tuple(BLOCKS.rule)[:-1], "rule: 11 entries needed, 10 came"),
        (rule, BLOCKS.rule._replace(scope=3), "rule: entry 0 is 3"),
        (rule, BLOCKS.rule._replace(norm_block=0), "rule: entry 1 is 0"),
        (numbers, (0.1, 1.0), "numbers: 6 entries needed, 2 came"),
    ):
        with pytest.raises(ValueError, match=message):
            target(*changed(arguments, (place,), entry))
    pending = run.features(CALLS["relation"])
    for first in (-1, 1, 4):
        with pytest.raises(ValueError, match="rows outside the gathered ones"):
            run.gathered(CALLS["relation"], pending, pending.rows, first, 1.0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_buffers_do_not_follow_the_default_dtype_or_device(run, name, dtype):
    call = CALLS[name]

    def everything():
        found, staged = forward(run, call), None
        if name != "dmd alone":
            pending = run.features(call)
            staged = run.gathered(call, pending, pending.rows, 0, 1.0)
        results = [*found, gradient(run, call, found), *(staged or ())]
        return [value for value in results if value is not None]

    expected = everything()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = everything()
    finally:
        torch.set_default_dtype(before)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_flat_pieces_of_one_allocation_hold_the_same_results(run):
    for name in ("objective", "objective of one norm", "dmd alone", "decoupled"):
        call = CALLS[name]
        apart, flat = forward(run, call), forward(run, call, separate=False)
        assert flat.terms.untyped_storage().data_ptr() == flat.factors.untyped_storage().data_ptr()
        assert all(torch.equal(a.flatten(), b) for a, b in zip(apart, flat, strict=True))
        assert torch.equal(gradient(run, call, apart), gradient(run, call, flat))


def test_numbers_on_the_device_give_the_results_of_floats(monkeypatch):
    with simulated(cuda, monkeypatch) as run:
        for call in CALLS.values():
            loaded = call._replace(numbers=torch.tensor(call.numbers, dtype=torch.float32))
            apart, found = forward(run, call), forward(run, loaded)
            for a, b in zip(apart, found, strict=True):
                assert a is b or torch.allclose(a, b, rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient(run, loaded, found), gradient(run, call, apart), rtol=1e-6, atol=0)


def test_a_decoupled_loss_with_guidance_or_velocities_is_refused(run):
    call = CALLS["dmd alone"]
    with pytest.raises(ValueError, match=r"augment_real: it goes with .* without real_uncond and sigma"):
        forward(run, call._replace(augment_real=call.real, augment_uncond=call.real))


def test_the_cpu_does_not_take_numbers_of_a_device():
    from codmd.ops.backends import cpp

    call = CALLS["relation"]._replace(numbers=torch.ones(6))
    with pytest.raises(ValueError, match="numbers: a tuple of six floats needed, a tensor came"):
        forward(cpp, call)


def test_tensors_cross_in_the_order_of_the_contract():
    assert type(CALLS["objective"])._fields[:12] == TENSORS
    call = CALLS["objective"]
    described = raw.arguments(call)[0]
    addresses = [None if entry is None else entry[0] for entry in described]
    assert addresses == [None if tensor is None else tensor.data_ptr() for tensor in call[: len(TENSORS)]]
    assert sum(address is not None for address in addresses) == 10
    assert len(ONE) == 4
