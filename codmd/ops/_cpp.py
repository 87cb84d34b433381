"""The C++ CPU backend behind the operator boundary: tensors become addresses, shapes and strides.

torch is imported before the extension, so that both share one OpenMP runtime and its threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codmd.reference.relation import Pool

ABI_VERSION = 1

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_MASK = (0, 0, 0)

_C: Any = None
load_error: str | None = None
try:
    from codmd import _C  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    load_error = (
        f"the C++ extension is not available ({error}); install with a C++17 compiler, "
        "without CODMD_SKIP_EXT, to build it"
    )
else:
    _found = getattr(_C, "abi_version", None)
    if _found != ABI_VERSION:
        load_error = (
            f"the C++ extension codmd._C is stale (interface {_found}, this version needs {ABI_VERSION}): "
            "run `pip install` again"
        )


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
    scores, samples, frames, features = _scores(student, real, fake, frame_mask, layout, pool)
    terms = torch.empty(3)
    frame_grad = _frame_grad(samples, frames, features, pool, frame_weight)
    batch_grad = torch.empty(samples, features) if batch_weight and samples > 1 else torch.empty(0)
    _C.relation_forward(
        *scores, temperature, batch_weight, frame_weight, torch.get_num_threads(),
        terms.data_ptr(), frame_grad.data_ptr(), batch_grad.data_ptr(),
    )  # fmt: skip
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
    scores, samples, frames, features = _scores(student, real, fake, frame_mask, layout, pool)
    frame = torch.empty(1)
    frame_grad = _frame_grad(samples, frames, features, pool, frame_weight)
    pooled = torch.empty(samples, 3 * features + 1)
    _C.relation_frames(
        *scores, temperature, torch.get_num_threads(), frame.data_ptr(), frame_grad.data_ptr(), pooled.data_ptr()
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
    terms, batch_grad = torch.empty(3), torch.empty(rows, features)
    _C.relation_batch(
        pooled.data_ptr(), samples, features, first_row, rows, frame.data_ptr(), temperature, batch_weight,
        frame_weight, grad_scale, torch.get_num_threads(), terms.data_ptr(), batch_grad.data_ptr(),
    )  # fmt: skip
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
    strides = out.stride()
    _C.relation_backward(
        0 if student is None else student.data_ptr(), out.shape, strides if student is None else student.stride(),
        out.data_ptr(), strides, layout == "bcfhw", _DTYPE_CODES[out.dtype], *_mask(frame_mask), *_grid(pool),
        frame_grad.data_ptr(), batch_grad.data_ptr(), _address(grad_total), _address(grad_batch),
        _address(grad_frame), batch_weight, frame_weight, torch.get_num_threads(),
    )  # fmt: skip


def _scores(
    student: Tensor, real: Tensor, fake: Tensor, frame_mask: Tensor | None, layout: str, pool: Pool
) -> tuple[tuple[Any, ...], int, int, int]:
    """The leading arguments of a forward function, and the sizes B, F, K."""
    shape = student.shape
    samples, frames, channels, height, width = shape
    channels_first = layout == "bcfhw"
    if channels_first:
        frames, channels = channels, frames
    grid = _grid(pool)
    features = channels * (height * width if pool is None else grid[0] * grid[1])
    arguments = (
        student.data_ptr(), real.data_ptr(), fake.data_ptr(), shape, student.stride(), real.stride(), fake.stride(),
        channels_first, _DTYPE_CODES[student.dtype], *_mask(frame_mask), *grid,
    )  # fmt: skip
    return arguments, samples, frames, features


def _frame_grad(samples: int, frames: int, features: int, pool: Pool, frame_weight: float) -> Tensor:
    if not frame_weight or frames < 2:
        return torch.empty(0)
    return torch.empty(samples, frames, frames if pool is None else features)


def _grid(pool: Pool) -> tuple[int, int]:
    """Rows and columns of the grid; (0, 0) keeps every pixel."""
    if pool is None:
        return 0, 0
    return (1, 1) if isinstance(pool, str) else pool


def _mask(frame_mask: Tensor | None) -> tuple[int, int, int]:
    if frame_mask is None:
        return _NO_MASK
    batch_stride, frame_stride = frame_mask.stride()
    return frame_mask.data_ptr(), batch_stride, frame_stride


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
