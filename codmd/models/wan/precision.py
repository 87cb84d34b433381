"""Which parts of Wan's transformer compute in float32 whatever the autocast dtype.

Wan computes the time embedding and its projection, the modulation, the norms and the softmax statistics in float32
and the rest in bfloat16. Under autocast three of diffusers' modules need telling; each is re-typed in place, which
keeps parameter names, deep copies and sharding hooks as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.nn import functional as F


class Float32TimestepEmbedding(TimestepEmbedding):
    """`TimestepEmbedding` in float32 inside an autocast region."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample.float(), condition)


class Float32Linear(nn.Linear):
    """`nn.Linear` in float32 inside an autocast region."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class Float32RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` with float32 arithmetic and the input's dtype.

    CUDA's autocast would return float32 queries and keys beside bfloat16 values, which flash kernels refuse.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = None if self.weight is None else self.weight.float()
            return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


def compute_in_float32(transformer: Any) -> None:
    """Re-types the time embedding, its projection and the query and key norms of a `WanTransformer3DModel`."""
    embedder = transformer.condition_embedder
    embedder.time_embedder.__class__ = Float32TimestepEmbedding
    embedder.time_proj.__class__ = Float32Linear
    for module in transformer.modules():
        if type(module) is nn.RMSNorm:
            module.__class__ = Float32RMSNorm


def float32_modules(transformer: Any) -> tuple[nn.Module, nn.Module]:
    """The modules whose weights stay float32 in every storage and sharding mode."""
    return transformer.condition_embedder.time_embedder, transformer.condition_embedder.time_proj


def store_in_bfloat16(transformer: Any) -> None:
    """Casts the weights of matrix products; norms, modulation and time embedding stay float32, as in diffusers."""
    kept = {module for parent in float32_modules(transformer) for module in parent.modules()}
    for module in transformer.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)) and module not in kept:
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(weight.detach().bfloat16(), weight.requires_grad))
