"""The CUDA extension behind the operator boundary: tensors become addresses, shapes and strides.

The extension knows nothing of torch: outputs and workspace are allocated here, work goes to the current stream of the
tensors' device, and nothing waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codmd.ops import _cuda_binary
from codmd.reference.relation import Pool

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SIMULATED_PROCESSORS = 4

_C: Any
load_error: str | None
_C, load_error = _cuda_binary.load()


def relation_forward(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    pool: Pool,
    temperature: float,
    batch_weight: float,
    frame_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(terms [3] = total, batch, frame; frame gradient; batch gradient) without communication."""
    samples, frames, features = _sizes(student, layout, pool)
    terms = _floats(student, 3)
    frame_grad = _frame_grad(student, samples, frames, features, pool, frame_weight)
    batch_grad = _floats(student, samples, features) if batch_weight and samples > 1 else _floats(student, 0)
    _launch(
        student,
        (samples, frames),
        _C.relation_forward,
        *_scores(student, real, fake, frame_mask, layout, pool),
        temperature,
        batch_weight,
        frame_weight,
        terms.data_ptr(),
        frame_grad.data_ptr(),
        batch_grad.data_ptr(),
    )
    return terms, frame_grad, batch_grad


def relation_frames(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    frame_mask: Tensor | None,
    layout: str,
    pool: Pool,
    temperature: float,
    frame_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(frame term [1], frame gradient, rows to gather [B, 3K + 1]), the stage before a gather."""
    samples, frames, features = _sizes(student, layout, pool)
    frame = _floats(student, 1)
    frame_grad = _frame_grad(student, samples, frames, features, pool, frame_weight)
    pooled = _floats(student, samples, 3 * features + 1)
    _launch(
        student,
        (samples, frames),
        _C.relation_frames,
        *_scores(student, real, fake, frame_mask, layout, pool),
        temperature,
        frame.data_ptr(),
        frame_grad.data_ptr(),
        pooled.data_ptr(),
    )
    return frame, frame_grad, pooled


def relation_batch(
    pooled: Tensor,
    frame: Tensor,
    first_row: int,
    rows: int,
    temperature: float,
    batch_weight: float,
    frame_weight: float,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    """(terms [3], gradient of the rows ``first_row : first_row + rows``), the stage after a gather."""
    pooled = pooled.contiguous()
    samples, features = pooled.shape[0], (pooled.shape[1] - 1) // 3
    terms, batch_grad = _floats(pooled, 3), _floats(pooled, rows, features)
    _launch(
        pooled,
        (1, samples),
        _C.relation_batch,
        pooled.data_ptr(),
        samples,
        features,
        first_row,
        rows,
        frame.data_ptr(),
        temperature,
        batch_weight,
        frame_weight,
        grad_scale,
        terms.data_ptr(),
        batch_grad.data_ptr(),
    )
    return terms, batch_grad


def relation_backward(
    out: Tensor,
    grad_total: Tensor | None,
    grad_batch: Tensor | None,
    grad_frame: Tensor | None,
    student: Tensor | None,
    frame_mask: Tensor | None,
    frame_grad: Tensor,
    batch_grad: Tensor,
    layout: str,
    pool: Pool,
    batch_weight: float,
    frame_weight: float,
) -> None:
    """Write the gradient of the student's latents into ``out``."""
    _C.relation_backward(
        (*_place(out), 0, 0),
        _tensor(student),
        _tensor(out),
        out.shape,
        layout == "bcfhw",
        _DTYPE_CODES[out.dtype],
        _tensor(frame_mask),
        _grid(pool),
        (_address(grad_total), _address(grad_batch), _address(grad_frame)),
        frame_grad.data_ptr(),
        batch_grad.data_ptr(),
        batch_weight,
        frame_weight,
    )


def _launch(example: Tensor, sizes: tuple[int, int], function: Callable[..., int], *arguments: Any) -> None:
    """Call a forward function twice: for the bytes of workspace it wants, then with them."""
    place = _place(example)
    workspace = torch.empty(function((*place, 0, 0), *arguments), dtype=torch.uint8, device=example.device)
    tickets = _counters(example.device, place[2], _C.relation_counters(*sizes))
    function((*place, workspace.data_ptr(), tickets.data_ptr()), *arguments)


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


def _scores(
    student: Tensor, real: Tensor, fake: Tensor, frame_mask: Tensor | None, layout: str, pool: Pool
) -> tuple[Any, ...]:
    return (
        (_tensor(student), _tensor(real), _tensor(fake)),
        student.shape,
        layout == "bcfhw",
        _DTYPE_CODES[student.dtype],
        _tensor(frame_mask),
        _grid(pool),
    )


def _sizes(student: Tensor, layout: str, pool: Pool) -> tuple[int, int, int]:
    """B, F and the features K."""
    samples, frames, channels, height, width = student.shape
    if layout == "bcfhw":
        frames, channels = channels, frames
    rows, columns = _grid(pool)
    return samples, frames, channels * (rows * columns or height * width)


def _floats(example: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=example.device)


def _frame_grad(example: Tensor, samples: int, frames: int, features: int, pool: Pool, frame_weight: float) -> Tensor:
    if not frame_weight or frames < 2:
        return _floats(example, 0)
    return _floats(example, samples, frames, frames if pool is None else features)


def _grid(pool: Pool) -> tuple[int, int]:
    """Rows and columns of the grid; (0, 0) keeps every pixel."""
    if pool is None:
        return 0, 0
    return (1, 1) if isinstance(pool, str) else pool


def _tensor(tensor: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.stride())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
