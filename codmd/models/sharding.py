"""Weights over a mesh: how blocks are sharded, and how parameters, whole or sharded, are filled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class ShardPolicy:
    """How `shard_blocks` lays a model over a mesh (FSDP2).

    Attributes:
        param_dtype: dtype of the gathered weights in forward and backward; None keeps the stored one.
        reduce_dtype: dtype in which gradients are reduced.
        reshard_after_forward: free the gathered weights between forward and backward.
        offload: keep the shards in host memory and copy them to the device when they are used.
        gradient_divisor: of the sum of gradients over the mesh; None takes the number of processes, the average.
    """

    param_dtype: torch.dtype | None = torch.bfloat16
    reduce_dtype: torch.dtype | None = torch.float32
    reshard_after_forward: bool = True
    offload: bool = False
    gradient_divisor: int | None = None

    def shard(self, module: nn.Module, mesh: DeviceMesh, full_precision: bool = False) -> None:
        """Shards one module, in place; `full_precision` keeps the stored dtype."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        mixed = MixedPrecisionPolicy(
            param_dtype=None if full_precision else self.param_dtype,
            reduce_dtype=self.reduce_dtype,
            cast_forward_inputs=False,  # a bfloat16 timestep turns 757 into 756
        )
        offload = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        sharded = fully_shard(
            module, mesh=mesh, mp_policy=mixed, reshard_after_forward=self.reshard_after_forward, offload_policy=offload
        )
        if mesh.device_type == "cpu":
            # gloo in torch 2.8 returns the sum where FSDP asks for the average; so FSDP sums and divides.
            sharded.set_force_sum_reduction_for_comms(True)
        if self.gradient_divisor is not None:
            sharded.set_gradient_divide_factor(float(self.gradient_divisor))


def divisors(number: int) -> list[int]:
    """Every whole number that divides it, in order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


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
