"""The CUDA extension on a GPU: accuracy, Triton beside it, graphs, streams, several devices, errors."""

from __future__ import annotations

import os

# conftest.py asks for deterministic algorithms: the float64 reference's matrix products then need this, before the
# first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import codmd_cases
import dmd_cases
import pytest
import torch
from cases import DTYPES, frame_mask, latents, loss_and_gradient, relative_error
from dmd_cases import scores
from rounding import assert_as_accurate_as_pytorch

from codmd import backends, ops
from codmd.ops.backends import cuda

REFUSED = backends.load("cuda")[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REFUSED), reason=REFUSED)]

POOLS = ("mean", (2, 3), None)


def terms_of(*args, **kwargs):
    return ops.relation_loss(*args, return_terms=True, backend="cuda", **kwargs)


def on(device, tensors):
    return [v.detach().to(device) for v in tensors]


def scores_on(device, *args, **kwargs):
    student, arguments = scores(*args, **kwargs)
    return student.to(device), {name: value.to(device) for name, value in arguments.items()}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relation_matches_float64(dtype, pool):
    for shape in [(2, 5, 4, 7, 13), (1, 21, 16, 60, 104), (2, 70, 2, 3, 4), (70, 2, 2, 3, 5)]:
        inputs = on("cuda", latents(shape, dtype))
        mask = frame_mask(*shape[:2]).cuda()
        for temperature in (0.1, 0.01):
            assert_as_accurate_as_pytorch(terms_of, *inputs, temperature=temperature, pool=pool, frame_mask=mask)


@pytest.mark.parametrize("name", ["self_forcing", "longlive", "rcm", "fastgen", "fastvideo", "tdm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dmd_matches_float64(dtype, name):
    student, arguments = scores_on("cuda", (2, 7, 16, 30, 52), dtype)
    upstream = torch.tensor(1.7, device="cuda")
    options = {"convention": name, "layout": "bfchw", "guidance": 4.5, "fake_guidance": 1.5}
    dmd_cases.assert_as_good_as_torch(student, arguments, "cuda", upstream, **options)


@pytest.mark.parametrize("pool", ["mean", (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_terms_match_float64(dtype, pool):
    student, arguments = scores_on("cuda", (3, 6, 4, 15, 29), dtype, flow=True)
    options = {"prediction": "flow", "pool": pool, "frame_mask": frame_mask(3, 6).cuda(), **arguments}
    for upstream in codmd_cases.UPSTREAMS:
        codmd_cases.assert_as_good_as_torch(student, "cuda", upstream, **options)


@pytest.mark.skipif(not backends.load("triton")[0], reason="no Triton")
@pytest.mark.parametrize("pool", POOLS)
def test_triton_agrees(pool):
    inputs = on("cuda", latents((3, 21, 16, 30, 52), torch.bfloat16))
    found = loss_and_gradient(terms_of, *inputs, pool=pool)
    other = loss_and_gradient(
        lambda *a, **k: ops.relation_loss(*a, return_terms=True, backend="triton", **k), *inputs, pool=pool
    )
    assert relative_error(found[0], other[0]) < 1e-5
    assert relative_error(found[1], other[1]) < 2**-7


def captured(step):
    """(graph, the outputs that its replays write) of ``step``, warmed up on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


def with_gradient(operator, student, **options):
    """A step that returns the loss and its gradient at ``student``, which stays in place."""
    student.requires_grad_()

    def step():
        loss = operator(student, backend="cuda", **options)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    return step


def steps():
    """Every operator on latents of its own; the first of a step's tensors to change is its student."""
    for pool in POOLS:
        student, real, fake = on("cuda", latents((3, 21, 16, 30, 52), torch.bfloat16))
        yield student, with_gradient(ops.relation_loss, student, real=real, fake=fake, pool=pool)
    for operator in (ops.dmd_loss, ops.codmd_loss):
        student, arguments = scores_on("cuda", (3, 21, 16, 30, 52), torch.bfloat16)
        yield student, with_gradient(operator, student, **arguments)


def test_a_graph_replays_to_the_bits_of_an_eager_call():
    for student, step in steps():
        graph, outputs = captured(step)
        for scale in (1.0, 0.5, -2.0):
            with torch.no_grad():
                student.mul_(scale).add_(0.1)
            for _ in range(3):
                graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(outputs, step(), strict=True))


def test_graphs_replayed_side_by_side_do_not_disturb_each_other():
    prepared = [(*captured(step), step()) for _, step in steps()]
    streams = [torch.cuda.Stream() for _ in prepared]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (graph, _, _) in zip(streams, prepared, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, outputs, expected in prepared:
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_streams_side_by_side_give_the_same_bits():
    student, real, fake = on("cuda", latents((4, 21, 16, 60, 104), torch.bfloat16))
    expected = torch.stack(terms_of(student, real, fake))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(torch.stack(terms_of(student, real, fake)))
    torch.cuda.synchronize()
    assert all(torch.equal(terms, expected) for terms in found)


@pytest.mark.parametrize("pool", POOLS)
def test_offsets_pass_two_to_the_thirty_first(pool):
    far = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 6 * far:
        pytest.skip("needs 13 GB of free device memory")
    near = on("cuda", latents((2, 5, 4, 8, 16), torch.bfloat16))
    expected = loss_and_gradient(terms_of, *near, pool=pool)
    memory = torch.empty(far + near[0][0].numel(), dtype=torch.bfloat16, device="cuda")
    for which in range(3):
        apart = list(near)
        strides = (far, *near[which].stride()[1:])
        apart[which] = memory.as_strided(near[which].shape, strides).copy_(near[which])
        found = loss_and_gradient(terms_of, *apart, pool=pool)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_device_that_does_not_exist_is_an_error_with_cudas_own_words(monkeypatch):
    inputs = on("cuda", latents())
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_place", lambda example: (torch.cuda.device_count(), 1, 0))
        with pytest.raises(RuntimeError, match=r"selecting the device: .+ \(cudaErrorInvalidDevice\)"):
            terms_of(*inputs)
    assert torch.stack(terms_of(*on("cuda", latents()))).isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_the_device_of_the_inputs_is_used_and_the_callers_kept():
    inputs = latents((2, 21, 16, 30, 52))
    expected = loss_and_gradient(terms_of, *on("cuda:0", inputs))
    with torch.cuda.device(0):
        terms, gradient = loss_and_gradient(terms_of, *on("cuda:1", inputs))
        assert torch.cuda.current_device() == 0
    assert terms.device == gradient.device == torch.device("cuda", 1)
    assert torch.equal(terms.cpu(), expected[0].cpu())
    assert torch.equal(gradient.cpu(), expected[1].cpu())
