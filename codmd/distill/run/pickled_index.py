"""The index of checkpoints from before the safetensors format: a pickle, of which only the listed classes are read."""

from __future__ import annotations

import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

INDEX = ".metadata"
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
RECORDS = (
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
PATHS = ("pathlib", "pathlib._local")
ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(metadata, name) for name in RECORDS},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    **{("torch", name): getattr(torch, name) for name in DTYPES},
    **{(module, name): PurePath for module in PATHS for name in ("PosixPath", "WindowsPath")},
}
"""(module, name) to what stands for it. None of these does more than keep what it is given."""


class Unpickler(pickle.Unpickler):
    """Reads the classes of `ALLOWED` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it would call {module}.{name}") from None


def read_index(path: Path) -> Metadata:
    """The index in a file, of tensors alone.

    Raises:
        ValueError: it is damaged, or it would call what no index needs; nothing of it is run.
    """
    with open(path, "rb") as file:
        try:
            found = Unpickler(file).load()
            tensors: dict[str, Any] = {
                name: _tensor(entry)
                for name, entry in found.state_dict_metadata.items()
                if not isinstance(entry, metadata.BytesStorageMetadata)
            }
            return Metadata(tensors, storage_data={where: _place(entry) for where, entry in found.storage_data.items()})
        except Exception as error:  # a damaged pickle fails in any way
            raise ValueError(f"{path}: refused, for it is no index of a checkpoint: {error}") from error


def _tensor(entry: Any) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
    if not isinstance(entry.properties.dtype, torch.dtype):
        raise TypeError(f"it has a tensor of dtype {entry.properties.dtype!r}")
    return TensorStorageMetadata(TensorProperties(entry.properties.dtype), torch.Size(entry.size), chunks)


def _place(entry: Any) -> filesystem._StorageInfo:
    """The place of a chunk, without the decompression that the entry may ask for."""
    if Path(entry.relative_path).name != entry.relative_path:
        raise ValueError(f"it points to {entry.relative_path!r}, outside its folder")
    return filesystem._StorageInfo(entry.relative_path, int(entry.offset), int(entry.length))


class PickledIndexReader(FileSystemReader):
    """PyTorch's reader of such a checkpoint, with :func:`read_index` in the place of `pickle.load`."""

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        found = read_index(Path(self.path) / INDEX)
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found
