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
from codmd.ops.backends.reference import attention_jvp as attention_jvp
from codmd.ops.contract import Call, Found, Objective, Pending, Relation, Upstream

_SIMULATED_PROCESSORS = 4

_C: Any
load_error: str | None
_C, load_error = cuda_binary.load()


def relation(call: Relation) -> Found:
    """The relation term of one process."""
    return _forward(call, False, True).found


def objective(call: Objective, separate: bool) -> Found:
    """The DMD loss, and the relation where ``related``, of one process."""
    return _forward(call, False, separate).found


def features(call: Call) -> Pending:
    """The stage before a gather."""
    outputs = _forward(call, True, True)
    return Pending(outputs.rows, outputs.found)


def gathered(call: Call, pending: Pending, rows: Tensor, first: int, scale: float) -> Found:
    """The stage after a gather."""
    kept: Found = pending.kept
    fields, numbers, terms, batch_grad = raw.gathered_arguments(call, rows, first, scale, kept)
    place = _place(rows)
    memory = _memory(rows.device, place)
    _C.gathered(place, memory, fields, numbers, raw.described(terms), raw.described(batch_grad))
    return kept._replace(terms=terms, batch_grad=batch_grad)


def gradient(out: Tensor, upstream: Upstream, call: Call, found: Found) -> None:
    """Write the gradient of the student's latents into ``out``."""
    _backward(out, upstream, call, found, False)


def whole_gradient(out: Tensor, upstream: Upstream, call: Relation, found: Found) -> None:
    """The same for ``pool=None``."""
    _backward(out, upstream, call, found, True)


def whole_batch_grad(samples: int, frames: int, features: int) -> tuple[int, ...]:
    """Shape of ``batch_grad`` for ``pool=None``."""
    return samples, features


def _forward(call: Call, staged: bool, separate: bool) -> raw.Outputs:
    outputs = raw.outputs(call, staged, separate)
    place = _place(call.student)
    _C.forward(place, _memory(call.student.device, place), *raw.arguments(call), outputs.described)
    return outputs


def _backward(out: Tensor, upstream: Upstream, call: Call, found: Found, whole: bool) -> None:
    _C.gradient(
        _place(out), raw.described(out), raw.upstream_arguments(upstream), *raw.gradient_arguments(out, call, whole),
        raw.kept_arguments(found),
    )  # fmt: skip


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
        return torch.zeros(count, dtype=torch.int32)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).wait_stream(side)
    return zeros
