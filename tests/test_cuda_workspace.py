"""The CUDA backend's memory, on simulated threads: replays over one workspace, orders of execution, far addresses."""

from __future__ import annotations

from types import SimpleNamespace

import cuda_simulation
import pytest
import torch
from backend_calls import ONE, objective_call, relation_call
from cases import frame_mask, latents, loss_and_gradient, relative_error
from dmd_cases import scores

from codmd import conventions, ops
from codmd.ops import relation_loss
from codmd.ops.backends import cuda, raw
from codmd.ops.contract import Numbers, Relation

pytestmark = pytest.mark.skipif(not cuda_simulation.COMPILER, reason="no C++ compiler")

UPSTREAM = (0.7, 0.3, -0.2)
POOLS = ["mean", (2, 3), None]


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    yield from cuda_simulation.serve(monkeypatch)


def terms_of(*args, **kwargs):
    return relation_loss(*args, return_terms=True, **kwargs)


@pytest.fixture
def launches(monkeypatch, simulated):
    """Every forward launch of a test, to be repeated on the addresses it had, as a graph would."""
    recorded = []

    def forward(place, _, *arguments):
        memory = {}

        def held(size, counters):
            if not memory:
                memory["workspace"] = torch.empty(size, dtype=torch.uint8)
                memory["tickets"] = torch.zeros(counters, dtype=torch.int32)
            return raw.described(memory["workspace"]), raw.described(memory["tickets"])

        def launch():
            simulated.forward(place, held, *arguments)
            return memory["tickets"]

        recorded.append(launch)
        launch()

    monkeypatch.setattr(cuda, "_C", SimpleNamespace(forward=forward, gradient=simulated.gradient))
    return recorded


def assert_same_bits(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)


@pytest.mark.parametrize("shape", [(3, 5, 2, 6, 41), (2, 70, 2, 3, 4), (70, 2, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("pool", [(1, 1), (2, 3), None])
def test_a_replay_of_the_relation_gives_the_bits_of_a_fresh_call(simulated, launches, pool, shape):
    call = relation_call(pool, shape)
    found = cuda.relation(call)
    (replay,) = launches
    for scale, seed in ((1.0, 1), (-0.5, 2), (3.0, 3)):
        call.student.mul_(scale).add_(0.1)
        simulated.shuffle(seed)
        for _ in range(2):
            assert not replay().any()
        assert_same_bits(found, cuda.relation(call))


@pytest.mark.parametrize("name", ["self_forcing", "fastvideo", "longlive"])
def test_a_replay_of_both_terms_gives_the_bits_of_a_fresh_call(simulated, launches, name):
    call = objective_call(conventions.NAMED[name], shape=(3, 7, 2, 6, 41), dtype=torch.bfloat16)
    found = cuda.objective(call, True)
    (replay,) = launches
    for seed in (1, 2, 3):
        call.student.mul_(0.5).add_(0.25)
        simulated.shuffle(seed)
        assert not replay().any()
        assert_same_bits(found, cuda.objective(call, True))


@pytest.mark.parametrize("pool", ["mean", (3, 2), None])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(simulated, pool):
    student, real, fake = latents((3, 26, 4, 9, 16), torch.bfloat16)
    mask = frame_mask(3, 26)
    student_dmd, arguments = scores((3, 5, 4, 9, 16), torch.bfloat16)

    def everything():
        found = [*loss_and_gradient(terms_of, student, real, fake, upstream=UPSTREAM, pool=pool, frame_mask=mask)]
        if pool is not None:
            leaf = student_dmd.clone().requires_grad_()
            loss = ops.codmd_loss(leaf, pool=pool, convention="rcm", layout="bfchw", **arguments)
            loss.backward()
            found += [loss.detach(), leaf.grad]
        return found

    expected = everything()
    for seed in (1, 2, 3):
        simulated.shuffle(seed)
        assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))


FAR = 2**31 + 64


def far(tensor, axis, folder):
    """``tensor`` with ``axis`` more than 2^31 elements apart, in a file with holes."""
    strides = list(tensor.contiguous().stride())
    strides[axis] = FAR
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    path = folder / f"{len(list(folder.iterdir()))}"
    memory = torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("axis", range(4), ids=["samples", "frames", "channels", "rows"])
@pytest.mark.parametrize("pool", ["mean", (2, 2), None])
def test_offsets_of_the_relation_pass_two_to_the_thirty_first(pool, axis, tmp_path):
    near = [v.detach() for v in latents((2, 2, 2, 2, 16), torch.bfloat16)]
    apart = [far(v, axis, tmp_path) for v in near]
    mask = torch.tensor([[True, True], [True, False]])
    expected = loss_and_gradient(terms_of, *near, pool=pool, frame_mask=mask)
    found = loss_and_gradient(terms_of, *apart, pool=pool, frame_mask=mask)
    assert relative_error(found[0], expected[0]) < 2e-6
    assert relative_error(found[1], expected[1]) < 2**-8
    call = Relation(*near, mask, "bfchw", None if pool is None else (1, 1) if pool == "mean" else pool, True, True,
                    Numbers())  # fmt: skip
    features = cuda.relation(call)
    gradients = []
    for student in (near[0], apart[0]):
        out = torch.zeros_like(student) if student is near[0] else far(torch.zeros_like(near[0]), axis, tmp_path)
        write = cuda.whole_gradient if pool is None else cuda.gradient
        write(out, ONE, call._replace(student=student, real=out, fake=out), features)
        gradients.append(out)
    assert gradients[0].any()
    assert relative_error(gradients[1], gradients[0]) < 2**-8


@pytest.mark.parametrize("axis", range(4), ids=["samples", "frames", "channels", "rows"])
def test_offsets_of_both_terms_pass_two_to_the_thirty_first(axis, tmp_path):
    near = objective_call(conventions.self_forcing, shape=(2, 2, 2, 2, 16), dtype=torch.bfloat16, pool=(2, 2))
    latents = ("student", "real", "fake", "real_uncond", "fake_uncond", "noisy", "mask")
    apart = near._replace(**{name: far(getattr(near, name), axis, tmp_path) for name in latents})
    found = []
    for call, out in (
        (near, torch.zeros_like(near.student)),
        (apart, far(torch.zeros_like(near.student), axis, tmp_path)),
    ):
        terms = cuda.objective(call, True)
        cuda.gradient(out, ONE, call._replace(student=out, noisy=None, sample_weight=None), terms)
        found.append((terms.terms, out))
    assert found[0][1].any()
    assert relative_error(found[1][0], found[0][0]) < 2e-6
    assert relative_error(found[1][1], found[0][1]) < 2**-8


@pytest.fixture
def devices(monkeypatch):
    """Two CUDA devices, each with a current stream, as far as Python asks about them."""
    state = SimpleNamespace(capturing=False, streams={0: 0, 1: 7})
    streams = state.streams
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: SimpleNamespace(cuda_stream=streams[d.index]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(cuda, "_processors", lambda index: 100 + index)
    monkeypatch.setattr(cuda, "_tickets", {})
    monkeypatch.setattr(cuda, "_outgrown", [])
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(cuda, "_lasting_zeros", lambda device, count: zeros(count, dtype=torch.int32))
    return state


def test_work_goes_to_the_current_stream_of_the_inputs_device(devices):
    example = SimpleNamespace(device=torch.device("cuda", 1))
    assert cuda._place(example) == (1, 101, 7)
    devices.streams[1] = 0xABC
    assert cuda._place(example) == (1, 101, 0xABC)


def test_calls_share_counters_on_one_stream_alone_and_captured_calls_never(devices):
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    own = cuda._counters(first, 7, 10)
    assert cuda._counters(first, 7, 20) is own
    assert cuda._counters(first, 8, 10) is not own
    assert cuda._counters(second, 7, 10) is not own
    grown = cuda._counters(first, 7, len(own) + 1)
    assert len(grown) > len(own)
    assert any(kept is own for kept in cuda._outgrown), "kernels under way still use it"
    devices.capturing = True
    captured = [cuda._counters(first, 7, 10) for _ in range(2)]
    assert captured[0] is not captured[1]
    assert all(len(counters) == 10 and not counters.any() for counters in captured)
    assert cuda._tickets[first, 7] is grown
