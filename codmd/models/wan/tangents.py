"""Attention layers of diffusers' Wan that carry forward-mode tangents, set for a pass and restored after it.

Attention is the one operator of `WanTransformer3DModel` whose fused forms have no forward mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from codmd.ops import attention

Rotation = tuple[Tensor, Tensor]


class TangentProcessor:
    """The text-to-video attention layer, self or cross, over `codmd.ops.attention`; tokens are [B, N, H D]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotation | None = None,
    ) -> Tensor:
        if attention_mask is not None or attn.add_k_proj is not None or attn.fused_projections:
            raise ValueError("tangents: expected text-to-video attention, without mask, images or fused projections")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
        q, k, v = (tokens.unflatten(2, (attn.heads, -1)) for tokens in projected)
        if rotary_emb is not None:
            q, k = rotate(q, rotary_emb), rotate(k, rotary_emb)
        out = attention(*(heads.transpose(1, 2) for heads in (q, k, v)))
        project, dropout = attn.to_out
        return dropout(project(out.transpose(1, 2).flatten(2)))


def rotate(tokens: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding of [B, N, H, D]: the plane (2i, 2i + 1) turns by the angle whose tables are [1, N, 1, D]."""
    cos, sin = (table[..., ::2] for table in rotation)
    even, odd = tokens[..., ::2], tokens[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(tokens)


@contextmanager
def tangent_attention(transformer: Any) -> Iterator[None]:
    """Every attention layer of `transformer` takes dual numbers inside; compiled blocks run eagerly."""
    layers = [layer for block in transformer.blocks for layer in (block.attn1, block.attn2)]
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = TangentProcessor()
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor
