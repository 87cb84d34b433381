"""The tensors of all processes as safetensors shards, a file a process, read by any number of processes.

PyTorch's Hugging Face storage writes and reads them. It keeps no index, so `meta.json` does.
"""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from .parallel import Processes
from .pickled_index import INDEX, PickledIndexReader, read_index

SHARDED = next(
    name
    for name in inspect.signature(dcp.HuggingFaceStorageWriter).parameters
    if name in ("save_distributed", "save_sharded")  # of torch 2.13 and of 2.8
)
READING = (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, KeyError, AssertionError)
"""The errors of PyTorch, alone or inside a `CheckpointException`, for files that do not hold what their index says."""


class Stored(NamedTuple):
    """A tensor of a checkpoint: its whole shape, over all shards, and its dtype."""

    shape: torch.Size
    dtype: torch.dtype


def write_shards(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Writes this process's part of `tensors`; equal ones are written once.

    Raises:
        TypeError: a value is no tensor (PyTorch would write a file that nobody can read).
        CheckpointException: on every process, when one of them could not write.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}; a checkpoint holds tensors alone")
    every_process: dict[str, Any] = {SHARDED: True}
    storage = dcp.HuggingFaceStorageWriter(str(folder), **every_process)
    quietly(dcp.save, processes)(dict(tensors), storage_writer=storage)


def read_shards(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Fills `tensors` in place; names and shapes are checked by the caller.

    Raises:
        One of `READING`, or CheckpointException: the files hold something else than the checkpoint's index says.
    """
    pickled = (folder / INDEX).is_file()
    storage = PickledIndexReader(folder) if pickled else dcp.HuggingFaceStorageReader(str(folder))
    quietly(dcp.load, processes)(dict(tensors), storage_reader=storage)


def own_shards(folder: Path, processes: Processes) -> list[Path]:
    """The files that this process wrote; processes count from 1 in their names."""
    return sorted(folder.glob(f"shard-{processes.rank + 1:05d}-*.safetensors"))


def described(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Name to [dtype, whole shape], as `meta.json` keeps them."""
    return {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()}


def stored(folder: Path, index: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors of a checkpoint.

    Args:
        index: `tensors` of its `meta.json`; empty for an old checkpoint, whose own index is read.

    Raises:
        ValueError: the index is damaged, or would run code.
    """
    if index:
        return {name: Stored(torch.Size(shape), getattr(torch, dtype)) for name, (dtype, shape) in index.items()}
    entries: dict[str, Any] = dict(read_index(folder / INDEX).state_dict_metadata)
    return {name: Stored(entry.size, entry.properties.dtype) for name, entry in entries.items()}


def quietly(function: Callable[..., Any], processes: Processes) -> Callable[..., Any]:
    """`dcp.save` or `dcp.load` for the processes at hand, without its warning that there is only one."""
    if processes.group is not None:
        return function

    def alone(*arguments: Any, **options: Any) -> Any:
        with warnings.catch_warnings():  # which forgets what was shown once: among many it would repeat all warnings
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            return function(*arguments, **options, no_dist=True)

    return alone
