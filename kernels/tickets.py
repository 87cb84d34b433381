"""Zeros for "last block done" tickets, which the kernels that use them leave zero."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

COUNTERS_PER_STREAM = 4096
CAPTURE_POOL = 1 << 18

_buffers: dict[tuple[torch.device, int], Tensor] = {}
_outgrown: list[Tensor] = []
"""Buffers that kernels under way on their stream may still count in."""

_capture_pool: dict[torch.device, tuple[Tensor, int]] = {}
"""Counters for captured calls, and how many of them are taken."""

_lock = threading.Lock()


def _zeros(device: torch.device, count: int) -> Tensor:
    """Zeros made on a stream of their own, so that a caller's private memory pool never owns them."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).wait_stream(side)
    return zeros


def counters(tensor: Tensor, stream: int, count: int) -> Tensor:
    """At least ``count`` int32 zeros beside ``tensor``; the kernels that use them leave zeros.

    Work on one stream runs in order and shares a buffer. Graphs may replay side by side on any streams, so every
    captured call takes counters that no other call ever gets; without a warm-up before the capture they come from
    the graph's own memory, with a memset in the graph.
    """
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return _captured(tensor.device, count)
    buffer = _buffers.get((tensor.device, stream))
    return _grown(tensor, stream, count) if buffer is None or buffer.numel() < count else buffer


def _captured(device: torch.device, count: int) -> Tensor:
    with _lock:
        pool, used = _capture_pool.get(device, (None, 0))
        if pool is not None and used + count <= len(pool):
            _capture_pool[device] = pool, used + count
            return pool[used : used + count]
    return torch.zeros(count, dtype=torch.int32, device=device)


def _grown(tensor: Tensor, stream: int, count: int) -> Tensor:
    """A new buffer of a stream, at least twice the one before, so that all outgrown ones together stay below it."""
    device = tensor.device
    with _lock:
        before = _buffers.get((device, stream))
        size = max(COUNTERS_PER_STREAM, count)
        if before is not None:
            if before.numel() >= count:
                return before
            _outgrown.append(before)
            size = max(size, 2 * before.numel())
        if tensor.is_cuda and device not in _capture_pool:
            _capture_pool[device] = _zeros(device, CAPTURE_POOL), 0
        buffer = _buffers[device, stream] = _zeros(device, size)
    return buffer
