"""The processes of a run: their group, their mesh, and what they must agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from codmd.distill.config.sections import ParallelSettings
from codmd.distill.config.typed import ConfigError
from codmd.models.sharding import ShardPolicy, divisors


@dataclass(frozen=True)
class Processes:
    """This process among all of a run.

    Attributes:
        rank, size: of all processes.
        device: where this one computes.
        group: all processes; None when there is one.
        mesh: over which networks are sharded (1-D: full; 2-D: replicas x shards); None when there is one process.
        context: data x ring (1) x ulysses, over all processes: those of one row hold the same samples, those of one
            column different ones; None where every process has samples of its own.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    mesh: DeviceMesh | None
    context: DeviceMesh | None = None

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The processes whose samples differ, this one among them: those that data parallelism and relations see."""
        return self.group if self.context is None else self.context.get_group("data")

    @property
    def data_rank(self) -> int:
        """Of this process's samples."""
        return self.rank if self.context is None else self.context.get_local_rank("data")

    @property
    def data_size(self) -> int:
        """Processes with samples of their own."""
        return self.size if self.context is None else self.context.size(0)

    @property
    def first(self) -> bool:
        """Whether this process writes what one process writes for all."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The average of `values` over all processes."""
        if self.group is None:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values / self.size

    def share(self, value: Any) -> Any:
        """The first process's `value`, on every process."""
        box = [value]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def share_in_context(self, value: Any) -> Any:
        """`value` of the first process that holds this process's samples, on all that do."""
        box = [value]
        if self.context is not None:
            dist.broadcast_object_list(box, group=self.context.get_group("ulysses"), group_src=0)
        return box[0]

    def agree(self, make: Callable[[], Any]) -> Any:
        """The result of `make` on the first process, on every process.

        Raises:
            ValueError: on every process, when it failed there.
        """
        made, failure = None, ""
        if self.first:
            try:
                made = make()
            except (OSError, ValueError) as error:
                failure = str(error)
        made, failure = self.share((made, failure))
        if failure:
            raise ValueError(failure)
        return made

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, on every process, in the order of ranks."""
        values = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def policy(self, settings: ParallelSettings, offload: bool = False) -> ShardPolicy:
        """The policy of `shard_blocks`; gradients are reduced in float32."""
        compute = torch.bfloat16 if settings.compute == "bfloat16" else None
        divisor = None if self.context is None else self.data_size
        return ShardPolicy(compute, torch.float32, settings.reshard, offload, divisor)


def check_processes(settings: ParallelSettings, size: int) -> int:
    """Processes that share one copy of the weights, of `size` processes.

    Raises:
        ConfigError: the settings do not fit them.
    """
    shards = settings.shard_size or size
    if size % shards:
        raise ConfigError(f"parallel.shard_size: {shards} does not divide {size} processes; null shards over all")
    if size % settings.context:
        raise ConfigError(
            f"parallel.context: {settings.context} does not divide {size} processes; expected one of "
            f"{', '.join(map(str, divisors(size)))}"
        )
    if settings.offload_teacher and (size == 1 or not torch.cuda.is_available()):
        raise ConfigError("parallel.offload_teacher: only a network sharded over several GPUs can be offloaded")
    return shards


@contextmanager
def processes(settings: ParallelSettings) -> Iterator[Processes]:
    """Joins the processes that torchrun started; a process started by hand is alone.

    Inside the block PyTorch has the settings' number of threads.

    Raises:
        ConfigError: the settings do not fit the number of processes or their devices.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    shards = check_processes(settings, size)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or before)
    try:
        yield from _joined(settings, size, shards, device)
    finally:
        torch.set_num_threads(before)


def _joined(settings: ParallelSettings, size: int, shards: int, device: torch.device) -> Iterator[Processes]:
    if size == 1:
        yield Processes(0, 1, device, None, None)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=settings.timeout_minutes))
    try:
        names: Sequence[str] = ("replicate", "shard")
        mesh = (
            init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
            if shards == size
            else init_device_mesh(device.type, (size // shards, shards), mesh_dim_names=tuple(names))
        )
        degree, context = settings.context, None
        if degree > 1:
            context = init_device_mesh(
                device.type, (size // degree, 1, degree), mesh_dim_names=("data", "ring", "ulysses")
            )
        yield Processes(dist.get_rank(), size, device, dist.group.WORLD, mesh, context)
    finally:
        dist.destroy_process_group()
