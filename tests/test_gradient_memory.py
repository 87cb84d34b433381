"""CPU gradients: the memory of one serves the next, and never while anything can still see it."""

import threading

import pytest
import torch

from codmd import ops
from codmd.ops import gradient_memory
from codmd.ops.gradient_memory import KEPT_BYTES, empty_gradient

SHAPE = (1, 8, 16, 60, 104)
"""3 MiB in float32."""


def latents(shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student, real, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    return student.to(dtype).requires_grad_(), real.to(dtype), (real + 0.1 * noise).to(dtype)


def gradient(loss, student, real, fake):
    (found,) = torch.autograd.grad(loss(student, real, fake), student)
    return found


LOSSES = {
    "relation": ops.relation_loss,
    "dmd": lambda student, real, fake: ops.dmd_loss(student, real=real, fake=fake),
    "codmd": lambda student, real, fake: ops.codmd_loss(student, real=real, fake=fake),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_takes_the_memory_of_the_one_before_and_the_same_value(loss, dtype):
    inputs = latents(dtype=dtype)
    first = gradient(loss, *inputs)
    address, expected = first.data_ptr(), first.clone()
    del first
    others = [torch.empty_like(expected) for _ in range(3)]  # what would take the memory, had it been given back
    second = gradient(loss, *inputs)
    assert second.data_ptr() == address
    assert address not in [other.data_ptr() for other in others]
    assert torch.equal(second, expected)
    assert second.stride() == inputs[0].stride()


@pytest.mark.parametrize(
    "hold",
    [
        lambda found: found,
        lambda found: found[:, 2:3],
        lambda found: found.numpy(),
        lambda found: found.untyped_storage(),
        lambda found: torch.utils.dlpack.to_dlpack(found),
    ],
    ids=["tensor", "view", "numpy", "storage", "dlpack"],
)
def test_memory_that_anything_refers_to_is_left_alone(hold):
    inputs = latents()
    found = gradient(ops.relation_loss, *inputs)
    address, held = found.data_ptr(), hold(found)
    del found
    again = gradient(ops.relation_loss, *inputs)
    assert again.data_ptr() != address
    del held


def test_shared_memory_is_left_alone():
    inputs = latents()
    found = gradient(ops.relation_loss, *inputs).share_memory_()
    address = found.data_ptr()
    del found
    assert gradient(ops.relation_loss, *inputs).data_ptr() != address


def test_one_block_is_kept_and_can_be_released():
    for shape in (SHAPE, (2, *SHAPE[1:]), SHAPE):
        gradient(ops.relation_loss, *latents(shape))
    assert [memory.nbytes() for memory in gradient_memory._kept] == [latents()[0].nbytes]
    gradient_memory.release_gradient_memory()
    assert not gradient_memory._kept


def test_sizes_in_turn_and_small_gradients_keep_their_values():
    large, small = latents(), latents((1, 3, 4, 5, 6))
    assert small[0].nbytes < KEPT_BYTES < large[0].nbytes
    expected = [gradient(ops.relation_loss, *inputs).clone() for inputs in (large, small)]
    for _ in range(3):
        found = [gradient(ops.relation_loss, *inputs) for inputs in (large, small)]
        assert all(map(torch.equal, found, expected))


def test_threads_never_share_memory():
    shape = torch.Size(SHAPE)
    strides = torch.empty(shape, device="meta").stride()
    wrong = []

    def work(value):
        for _ in range(300):
            found = empty_gradient(shape, strides, torch.float32, torch.device("cpu")).fill_(value)
            if not (found == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
