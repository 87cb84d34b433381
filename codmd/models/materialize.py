"""Filling a model's parameters, whole or sharded, with weights that are read one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies `weights` into the state of `model`, converting dtype and device.

    Args:
        model: materialised; its parameters may be sharded (FSDP2), in which case every process reads the full
            tensor (from a memory-mapped file, say) and keeps its own part, without communication.
        weights: one tensor per entry of `model.state_dict()`, with equal names and shapes (checked by the caller);
            each is read once, so the mapping may load lazily. Low-rank adapters over the model are left as they are.
    """
    for name, target in model.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        source = weights[name.replace(".base_layer.", ".")]
        if isinstance(target, DTensor):
            mesh = target.device_mesh
            full = source.to(mesh.device_type, target.dtype)
            part = distribute_tensor(full, mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(part.to_local())
        else:
            target.copy_(source)
