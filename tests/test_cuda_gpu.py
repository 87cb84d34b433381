"""The CUDA extension on a GPU: accuracy, Triton beside it, graphs, streams, several devices."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, frame_mask, latents, loss_and_gradient, relative_error, same_dtype, truth
from dmd_cases import run, scores
from dmd_cases import truth as dmd_truth

from codmd import backends, ops

REFUSED = backends.load("cuda")[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REFUSED), reason=REFUSED)]

POOLS = ("mean", (2, 3), None)


def terms_of(*args, **kwargs):
    return ops.relation_loss(*args, return_terms=True, backend="cuda", **kwargs)


def on(device, tensors):
    return [v.detach().to(device) for v in tensors]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relation_matches_float64(dtype, pool):
    for shape in [(2, 5, 4, 7, 13), (1, 21, 16, 60, 104), (2, 70, 2, 3, 4), (70, 2, 2, 3, 5)]:
        if isinstance(pool, tuple) and (pool[0] > shape[3] or pool[1] > shape[4]):
            continue
        inputs = on("cuda", latents(shape, dtype))
        mask = frame_mask(*shape[:2]).cuda()
        expected, usual, found = (
            function(*inputs, pool=pool, frame_mask=mask)
            for function in (truth, same_dtype, lambda *a, **k: loss_and_gradient(terms_of, *a, **k))
        )
        for value, other, exact in zip(found, usual, expected, strict=True):
            assert relative_error(value, exact) <= 2 * relative_error(other, exact) + 3e-6


@pytest.mark.parametrize("name", ["self_forcing", "longlive", "rcm", "fastgen", "fastvideo", "tdm"])
def test_dmd_matches_float64(name):
    student, arguments = scores((2, 7, 16, 30, 52), torch.bfloat16, "bfchw")
    student, arguments = student.cuda(), {key: value.cuda() for key, value in arguments.items()}
    options = {"convention": name, "layout": "bfchw"}
    found = run(ops.dmd_loss, student, arguments, backend="cuda", **options)
    expected = dmd_truth(student, arguments, **options)
    assert relative_error(found[0], expected[0]) < 2e-6
    assert relative_error(found[1], expected[1]) < 2**-8


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


@pytest.mark.parametrize("pool", POOLS)
def test_a_graph_replays_to_the_bits_of_an_eager_call(pool):
    student, real, fake = on("cuda", latents((3, 21, 16, 30, 52), torch.bfloat16))
    student.requires_grad_()

    def step():
        loss = ops.relation_loss(student, real, fake, pool=pool, backend="cuda")
        return loss, torch.autograd.grad(loss, student)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for scale in (1.0, 0.5, -2.0):
        with torch.no_grad():
            student.mul_(scale).add_(0.1)
        for _ in range(3):
            graph.replay()
        expected = step()
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])


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
