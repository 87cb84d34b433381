"""Attention with tangents: one launch, no memory but the results."""

from __future__ import annotations

from torch import Tensor

from codmd.ops.contract import Attention
from codmd.ops.shapes import empty_attention

from ..launch import architecture, current_stream
from ..limits import Refused, log
from ..plans import PLANS, alignment
from .plans import LARGEST_HEAD, AttentionPlan

FARTHEST = 1 << 23
"""Stride of rows up to which int32 offsets reach across a tile."""


def addressable(tensor: Tensor | None) -> Tensor | None:
    """``tensor``, copied where its heads are not dense or its rows too far apart for the offsets within a tile."""
    if tensor is None or (tensor.stride(3) == 1 and tensor.stride(2) < FARTHEST):
        return tensor
    return tensor.contiguous()


def attention_jvp(call: Attention) -> tuple[Tensor, Tensor]:
    """Output and tangent ``[B, H, N, D]``."""
    head = call.q.shape[3]
    if head > LARGEST_HEAD:
        log(f"heads of {head} columns, at most {LARGEST_HEAD}")
        raise Refused
    q, out = call.q, empty_attention(call.q)
    tensors = *(addressable(tensor) for tensor in call), *out
    strides = tuple((0, 0, 0) if t is None else t.stride()[:3] for t in tensors)
    aligned, tiled_for = alignment(*tensors), architecture(q.device)
    key = (AttentionPlan, q.shape, call.k.shape[2], q.dtype, q.device, strides, aligned, tiled_for)
    plan = PLANS.get(key) or PLANS.of(
        key, lambda: AttentionPlan(q.shape, call.k.shape[2], q.dtype, sum(strides, ()), aligned is True, tiled_for)
    )
    plan.launch(current_stream(q), *tensors)
    return out
