"""The batch relation over several processes equals one process with the global batch."""

import pytest
import torch
import torch.distributed as dist
from cases import latents, relative_error
from torch.nn.parallel import DistributedDataParallel
from workers import run_processes

from codmd import backends, compat, distributed, ops

BACKENDS = [name for name in ("reference", "cpp") if backends.load(name)[0] is not None]
LOCAL = 2


class Generator(torch.nn.Module):
    """A few float64 parameters between noise and latents, so that the rounding measured is the operator's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.mix = torch.nn.Linear(4, 4, dtype=torch.float64)
        self.scale = torch.nn.Parameter(torch.randn(4, 1, 1, dtype=torch.float64))

    def forward(self, noise):
        latents = self.mix(noise.double().movedim(2, -1)).movedim(-1, 2).tanh() * self.scale
        return latents.to(noise.dtype)


def parameter_gradient(model, inputs, **options):
    noise, real, fake = inputs
    model.zero_grad()
    terms = ops.relation_loss(model(noise), real, fake, return_terms=True, **options)
    terms.total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), torch.stack([t.detach() for t in terms])


def global_batch(world, dtype=torch.float32):
    student, real, fake = latents((LOCAL * world, 5, 4, 6, 7), dtype, perturbation=0.3)
    return student.detach(), real, fake


def compare_with_one_process(rank, world, backend, pool, weights, batch_grad, compiled):
    dtype = torch.float64 if backend == "reference" else torch.float32
    inputs = global_batch(world, dtype)
    local = [v[rank * LOCAL : (rank + 1) * LOCAL] for v in inputs]
    options = {"batch_weight": weights[0], "frame_weight": weights[1], "pool": pool, "backend": backend}
    expected, expected_terms = parameter_gradient(Generator(), inputs, **options)
    model = DistributedDataParallel(Generator())
    if compiled:
        function = torch.compile(ops.relation_loss, fullgraph=True, backend="aot_eager")
        terms = function(model(local[0]), *local[1:], group=dist.group.WORLD, return_terms=True, **options)
        terms.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        terms = torch.stack([t.detach() for t in terms])
    else:
        gradient, terms = parameter_gradient(model, local, group=dist.group.WORLD, batch_grad=batch_grad, **options)
    if batch_grad == "local":
        expected = expected / world
    assert relative_error(gradient, expected) < 1e-6, (rank, gradient, expected)
    assert relative_error(terms[1], expected_terms[1]) < 1e-6
    frame = terms[2].clone()
    dist.all_reduce(frame)
    assert relative_error(frame / world, expected_terms[2]) < 1e-6


@pytest.mark.parametrize("world, backend", [(2, "reference"), (3, BACKENDS[-1])])
def test_parameter_gradients_equal_one_process_with_the_global_batch(world, backend):
    run_processes(compare_many, world, backend)


def compare_many(rank, world, backend):
    for pool in ("mean", (2, 3), None):
        for weights in ((1.0, 0.0), (0.0, 1.0), (0.7, 1.3)):
            compare_with_one_process(rank, world, backend, pool, weights, "global", False)
    compare_with_one_process(rank, world, backend, "mean", (1.0, 0.0), "local", False)
    compare_with_one_process(rank, world, backend, "mean", (0.7, 1.3), "global", True)


def refuse_unequal(rank, world):
    student, real, fake = latents((4, 3, 2, 4, 4))
    rows = 2 if rank == 0 else 3
    for _ in range(2):
        with pytest.raises(ValueError, match=r"same local batch size .* rank 0: 2 x 7, rank 1: 3 x 7"):
            ops.relation_loss(student[:rows], real[:rows], fake[:rows], group=dist.group.WORLD)
    assert ops.relation_loss(student[:2], real[:2], fake[:2], group=dist.group.WORLD) > 0
    # Sizes are compared on the host, whatever the default device.
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"same local batch size .* rank 0: 2 x 7, rank 1: 3 x 7"),
    ):
        ops.relation_loss(student[:rows], real[:rows], fake[:rows], group=dist.group.WORLD)


def test_unequal_batches_are_refused_on_every_rank_without_a_hang():
    run_processes(refuse_unequal, 2)


def no_group_no_communication(rank, world):
    student, real, fake = latents((2, 3, 2, 4, 4), seed=rank)
    if rank == 0:  # the other rank never enters a collective
        assert ops.relation_loss(student, real, fake) > 0
        assert ops.relation_loss(student, real, fake, batch_weight=0, group=dist.group.WORLD) > 0


def test_without_a_group_or_a_batch_weight_nothing_is_communicated():
    run_processes(no_group_no_communication, 2)


def count_collectives(rank, world):
    calls = []
    original = distributed.all_gather
    distributed.all_gather = lambda out, *a, **k: calls.append(out.dtype) or original(out, *a, **k)
    ops.relation_loss(*latents((2, 3, 2, 4, 4), seed=rank), group=dist.group.WORLD)
    assert [dtype for dtype in calls if dtype.is_floating_point] == [torch.float32], calls


def test_all_features_travel_in_one_collective():
    run_processes(count_collectives, 2)


def samples_differ_in_valid_frames(rank, world):
    inputs = global_batch(world)
    mask = torch.rand(LOCAL * world, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[1] = False
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    expected, _ = parameter_gradient(Generator(), inputs, frame_mask=mask)
    model = DistributedDataParallel(Generator())
    got, _ = parameter_gradient(model, [v[rows] for v in inputs], frame_mask=mask[rows], group=dist.group.WORLD)
    assert relative_error(got, expected) < 1e-6


def test_frame_masks_travel_with_the_features():
    run_processes(samples_differ_in_valid_frames, 2)


def a_subgroup_sees_its_own_members(rank, world):
    student, real, fake = global_batch(world)
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    mine = groups[0] if rank < 2 else groups[1]
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    members = slice(0, 2 * LOCAL) if rank < 2 else rows
    got = ops.relation_loss(student[rows], real[rows], fake[rows], frame_weight=0, group=mine)
    expected = ops.relation_loss(student[members], real[members], fake[members], frame_weight=0)
    assert relative_error(got, expected) < 1e-6


def test_a_subgroup_relates_its_own_samples():
    run_processes(a_subgroup_sees_its_own_members, 3)


def published_signature(rank, world):
    inputs = global_batch(world)
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    student, real, fake = (v[rows] for v in inputs)
    student.requires_grad_()
    loss, log = compat.compute_copula_aware_loss(student, real, fake)
    assert list(log) == ["copula_batch_loss", "copula_frame_loss"]
    (local,) = torch.autograd.grad(loss, student)
    right, _ = compat.compute_copula_aware_loss(student, real, fake, batch_grad="global")
    (scaled,) = torch.autograd.grad(right, student)
    batch, _ = compat.compute_copula_aware_loss(student, real, fake, frame_weight=0.0)
    (batch_gradient,) = torch.autograd.grad(batch, student)
    assert relative_error(scaled - local, (world - 1) * batch_gradient) < 1e-5
    whole = ops.relation_loss(*inputs, return_terms=True)
    assert relative_error(log["copula_batch_loss"], whole.batch) < 1e-6


def test_compat_gathers_over_the_default_group_with_the_published_gradient_scale():
    run_processes(published_signature, 2)


def test_compat_returns_keys_for_terms_of_positive_weight_only():
    student, real, fake = latents()
    loss, log = compat.compute_copula_aware_loss(student, real, fake, 0.1, 0.0, 2.0)
    assert list(log) == ["copula_frame_loss"]
    torch.testing.assert_close(loss.detach(), 2 * log["copula_frame_loss"])
    assert not log["copula_frame_loss"].requires_grad
    assert list(compat.compute_copula_aware_loss(student, real, fake, frame_weight=0)[1]) == ["copula_batch_loss"]
