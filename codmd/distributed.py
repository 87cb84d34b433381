"""The gather of the batch relation and its stated gradient convention.

Every rank contributes the pooled features of its samples; all ranks then compute the same batch term and keep
the gradient of their own rows. No gradient travels through the collective.

``batch_grad="global"``: the rows' gradient is multiplied by the number of ranks W, so that after data-parallel
*averaging* the parameter gradient is that of one process holding the global batch.
``batch_grad="local"``: the rows' gradient as it is; after averaging, 1/W of the former.

Under sequence or context parallelism pass the data-parallel group: the same sample on two ranks would be two
rows of the relation.
"""

from __future__ import annotations

import weakref
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from codmd import private

BatchGrad = Literal["global", "local"]

# PyTorch's newer name where it has it: the older one warns there.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def gradient_scale(batch_grad: str, world_size: int) -> float:
    """Factor on the gradient of the local rows, see the module's docstring."""
    return float(world_size) if batch_grad == "global" else 1.0


_companions: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group with the members of ``group``: sizes are compared on the host, no device is synchronised.

    Held weakly: a process group that outlives ``destroy_process_group`` would end its threads in an interpreter
    that is shutting down, which aborts the process.
    """
    if "gloo" in dist.get_backend(group):
        return group
    companion = _companions.get(group)
    if companion is None:
        ranks = dist.get_process_group_ranks(group)
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        companion = _companions[group] = made
    return companion


resolve = private.group_of_name


def check_equal_rows(rows: int, columns: int, group: dist.ProcessGroup) -> None:
    """Raise the same ``ValueError`` on every rank unless all ranks bring ``[rows, columns]``."""
    host = _host_group(group)
    shapes = torch.empty(host.size(), 2, dtype=torch.int64, device="cpu")
    all_gather(shapes, torch.tensor([[rows, columns]], device="cpu"), group=host)
    found = shapes.tolist()
    if any(shape != found[0] for shape in found):
        listing = ", ".join(f"rank {rank}: {b} x {k}" for rank, (b, k) in enumerate(found))
        raise ValueError(
            "the batch relation needs the same local batch size and feature length on every rank of the group, "
            f"got {listing}. Drop the last incomplete batch, or pad it"
        )


def gather_rows(rows: Tensor, group_name: str) -> Tensor:
    """All ranks' ``[B, K]`` rows as ``[W·B, K]``, in rank order, with one collective on the rows' device.

    Raises:
        ValueError: on every rank, when the ranks' shapes differ.
    """
    group = resolve(group_name)
    check_equal_rows(rows.shape[0], rows.shape[1], group)
    gathered = rows.new_empty(group.size() * rows.shape[0], rows.shape[1])
    all_gather(gathered, rows.contiguous(), group=group)
    return gathered
