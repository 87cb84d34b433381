"""The CUDA backend: the extension ``codmd._C_cuda`` behind the contract.

The extension knows nothing of torch: outputs and workspace are allocated here, work goes to the current stream of the
tensors' device, and nothing waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codmd.ops.backends import cuda_binary, raw
from codmd.ops.backends.raw import Described
from codmd.ops.backends.reference import attention_jvp as attention_jvp
from codmd.ops.contract import Call

_SIMULATED_PROCESSORS = 4

_C: Any
load_error: str | None
_C, load_error = cuda_binary.load()


class _Cuda(raw.Extension):
    def run_forward(self, call: Call, outputs: tuple[Described, ...]) -> None:
        place = _place(call.student)
        _C.forward(place, _memory(call.student.device, place), *raw.arguments(call), outputs)

    def run_gathered(self, rows: Tensor, fields: tuple[Any, ...], terms: Described, batch_grad: Described) -> None:
        place = _place(rows)
        _C.gathered(place, _memory(rows.device, place), *fields, terms, batch_grad)

    def run_gradient(
        self, out: Tensor, upstream: tuple[Described, ...], arguments: tuple[Any, ...], found: tuple[Described, ...]
    ) -> None:
        _C.gradient(_place(out), raw.described(out), upstream, *arguments, found)


_cuda = _Cuda()
relation, objective, features, gathered = _cuda.relation, _cuda.objective, _cuda.features, _cuda.gathered
gradient, whole_gradient, whole_batch_grad = _cuda.gradient, _cuda.whole_gradient, _cuda.whole_batch_grad


def _memory(device: torch.device, place: tuple[int, int, int]) -> Callable[[int, int], tuple[Any, ...]]:
    """What hands a call its workspace and counters, which live until the call has returned."""
    held = []

    def memory(size: int, counters: int) -> tuple[Any, ...]:
        held.append(torch.empty(size, dtype=torch.uint8, device=device))
        return raw.described(held[0]), raw.described(_counters(device, place[2], counters))

    return memory


def _place(example: Tensor) -> tuple[int, int, int]:
    """Device index, multiprocessors, raw stream."""
    device = example.device
    if device.type != "cuda":
        return 0, _SIMULATED_PROCESSORS, 0
    return device.index, _processors(device.index), torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


_tickets: dict[tuple[torch.device, int], Tensor] = {}
_outgrown: list[Tensor] = []


def _counters(device: torch.device, stream: int, count: int) -> Tensor:
    """int32 zeros for "last block done" tickets, which the kernels leave zero.

    Work on one stream runs in order and shares them. A captured call gets its own, zeroed inside the graph, because
    graphs may replay side by side on any streams.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    tickets = _tickets.get((device, stream))
    if tickets is None or len(tickets) < count:
        if tickets is not None:
            # Kernels under way still hold it.
            _outgrown.append(tickets)
        tickets = _tickets[device, stream] = _lasting_zeros(device, max(count, 1024))
    return tickets


def _lasting_zeros(device: torch.device, count: int) -> Tensor:
    """Made on a stream of their own, so that no private memory pool of the caller comes to own them."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).wait_stream(side)
    return zeros
