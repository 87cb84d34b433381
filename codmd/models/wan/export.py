"""Diffusers folders of Wan's transformer, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from codmd.atomic import creating_folder
from codmd.models.safetensors_stream import write_shards
from codmd.models.tensor_files import INDEX, SINGLE, save_tensors

from .config import parameter_shapes

ADAPTER = "pytorch_lora_weights.safetensors"
SHARD_BYTES = 5 * 10**9


def write_diffusers_folder(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors that `WanTransformer3DModel.from_pretrained` loads, all or nothing.

    Args:
        path: a new or empty folder.
        tensors: every weight of the configuration; looked up one at a time, so a lazy mapping is never held whole.
        dtype: of the floating-point weights written; None keeps each one's.
        progress: called with the bytes of every weight written.

    Raises:
        ValueError: a weight is missing, of another shape, or not finite.
        OSError: the folder exists and is not empty, or cannot be written.
    """
    import diffusers

    expected = parameter_shapes(dict(config))
    content = {"_class_name": "WanTransformer3DModel", "_diffusers_version": diffusers.__version__, **config}
    with creating_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        shards = write_shards(folder, SINGLE, tensors, expected, dtype, shard_bytes, progress)
        if len(shards) > 1:
            total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            index = {"metadata": {"total_size": total}, "weight_map": dict(_weight_map(shards))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_adapter_folder(
    path: str | os.PathLike[str], factors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Writes a low-rank adapter that `WanPipeline.load_lora_weights` loads, all or nothing.

    Args:
        path: a new or empty folder.
        factors: `transformer.<layer>.lora_A.weight` and `lora_B`, scaled so that alpha equals the rank, which is
            what is understood where no file says otherwise.

    Raises:
        ValueError: a factor is not finite.
        OSError: the folder exists and is not empty, or cannot be written.
    """
    for name, value in factors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name}: holds NaN or infinity; such weights are of no use")
    with creating_folder(path) as folder:
        save_tensors(
            folder / ADAPTER, {name: value.to(dtype=dtype) for name, value in factors.items()}, {"format": "pt"}
        )


def _weight_map(shards: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    for file, names in shards.items():
        for name in names:
            yield name, file
