"""The CUDA backend's memory, on simulated threads: replays over one workspace, orders of execution, far addresses."""

from __future__ import annotations

from types import SimpleNamespace

import cuda_simulation
import pytest
import torch
from cases import frame_mask, latents, loss_and_gradient, relative_error
from dmd_cases import scores

from codmd import conventions, ops
from codmd.ops import _cuda, _cuda_dmd, relation_loss

pytestmark = pytest.mark.skipif(not cuda_simulation.COMPILER, reason="no C++ compiler")

UPSTREAM = (0.7, 0.3, -0.2)
POOLS = ["mean", (2, 3), None]


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    yield from cuda_simulation.serve(monkeypatch)


def terms_of(*args, **kwargs):
    return relation_loss(*args, return_terms=True, **kwargs)


@pytest.fixture
def launches(monkeypatch):
    """Every forward launch of a test, to be repeated on the addresses it had, as a graph would."""
    recorded = []

    def launch(example, sizes, function, *arguments):
        place = _cuda._place(example)
        workspace = torch.empty(function((*place, 0, 0), *arguments), dtype=torch.uint8)
        tickets = torch.zeros(_cuda._C.relation_counters(*sizes), dtype=torch.int32)
        run = *place, workspace.data_ptr(), tickets.data_ptr()
        recorded.append(lambda: (function(run, *arguments), workspace, tickets))
        recorded[-1]()

    monkeypatch.setattr(_cuda, "_launch", launch)
    monkeypatch.setattr(_cuda_dmd, "_launch", launch)
    return recorded


@pytest.mark.parametrize("shape", [(3, 5, 2, 6, 41), (2, 70, 2, 3, 4), (70, 2, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("pool", POOLS)
def test_a_replay_of_the_relation_gives_the_bits_of_a_fresh_call(simulated, launches, pool, shape):
    student, real, fake = (v.detach() for v in latents(shape))
    mask = frame_mask(*shape[:2])
    arguments = (student, real, fake, mask, "bfchw", pool, 0.1, 0.6, 1.3)
    found = _cuda.relation_forward(*arguments)
    (replay,) = launches
    for scale, seed in ((1.0, 1), (-0.5, 2), (3.0, 3)):
        student.mul_(scale).add_(0.1)
        simulated.shuffle(seed)
        for _ in range(2):
            _, _, tickets = replay()
            assert not tickets.any()
        expected = _cuda.relation_forward(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["self_forcing", "fastvideo", "longlive"])
def test_a_replay_of_both_terms_gives_the_bits_of_a_fresh_call(simulated, launches, name):
    student, given = scores((3, 7, 2, 6, 41), torch.bfloat16)
    convention = conventions.NAMED[name]
    latent = (student, given["fake"], given["real"], given["real_uncond"], None, None, None)
    arguments = (*latent, None, None, "bfchw", convention, 3.5, 0.0, True, frame_mask(3, 7), (2, 3), 0.1, 1.0, True)
    found = _cuda_dmd.codmd_forward(*arguments)
    (replay,) = launches
    for seed in (1, 2, 3):
        student.mul_(0.5).add_(0.25)
        simulated.shuffle(seed)
        _, _, tickets = replay()
        assert not tickets.any()
        assert all(torch.equal(a, b) for a, b in zip(found, _cuda_dmd.codmd_forward(*arguments), strict=True))


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
    gradients = []
    for student in (near[0], apart[0]):
        out = torch.zeros_like(student) if student is near[0] else far(torch.zeros_like(near[0]), axis, tmp_path)
        _, *features = _cuda.relation_forward(*near, mask, "bfchw", pool, 0.1, 1.0, 1.0)
        values = student if pool is None else None
        _cuda.relation_backward(out, torch.ones(()), None, None, values, mask, *features, "bfchw", pool, 1.0, 1.0)
        gradients.append(out)
    assert gradients[0].any()
    assert relative_error(gradients[1], gradients[0]) < 2**-8


@pytest.mark.parametrize("axis", range(4), ids=["samples", "frames", "channels", "rows"])
def test_offsets_of_both_terms_pass_two_to_the_thirty_first(axis, tmp_path):
    student, given = scores((2, 2, 2, 2, 16), torch.bfloat16, flow=True)
    given["mask"] = torch.rand(student.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    sigma, one = given.pop("sigma"), torch.ones(())
    near = {"student": student, **given}
    apart = {name: far(value, axis, tmp_path) for name, value in near.items()}
    options = "bfchw", conventions.self_forcing, 4.5, 1.5
    found = []
    for v, out in ((near, torch.zeros_like(student)), (apart, far(torch.zeros_like(student), axis, tmp_path))):
        scored = v["fake"], v["real"], v["real_uncond"], v["fake_uncond"]
        latent = v["student"], *scored, v["noisy"], sigma, v["mask"], None
        values, *moments, frame, frame_grad, _ = _cuda_dmd.codmd_forward(
            *latent, *options, True, None, (2, 2), 0.1, 1.0, False
        )
        _cuda_dmd.codmd_backward(
            out, one, None, None, None, *scored, sigma, v["mask"], None, *moments, frame_grad, torch.empty(0),
            *options, (2, 2), 0.1, 0.0, 1.0,
        )  # fmt: skip
        found.append((torch.cat([values, frame]), out))
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
    monkeypatch.setattr(_cuda, "_processors", lambda index: 100 + index)
    monkeypatch.setattr(_cuda, "_tickets", {})
    monkeypatch.setattr(_cuda, "_outgrown", [])
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(_cuda, "_lasting_zeros", lambda device, count: zeros(count, dtype=torch.int32))
    return state


def test_work_goes_to_the_current_stream_of_the_inputs_device(devices):
    example = SimpleNamespace(device=torch.device("cuda", 1))
    assert _cuda._place(example) == (1, 101, 7)
    devices.streams[1] = 0xABC
    assert _cuda._place(example) == (1, 101, 0xABC)


def test_calls_share_counters_on_one_stream_alone_and_captured_calls_never(devices):
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    own = _cuda._counters(first, 7, 10)
    assert _cuda._counters(first, 7, 20) is own
    assert _cuda._counters(first, 8, 10) is not own
    assert _cuda._counters(second, 7, 10) is not own
    grown = _cuda._counters(first, 7, len(own) + 1)
    assert len(grown) > len(own)
    assert any(kept is own for kept in _cuda._outgrown), "kernels under way still use it"
    devices.capturing = True
    captured = [_cuda._counters(first, 7, 10) for _ in range(2)]
    assert captured[0] is not captured[1]
    assert all(len(counters) == 10 and not counters.any() for counters in captured)
    assert _cuda._tickets[first, 7] is grown
