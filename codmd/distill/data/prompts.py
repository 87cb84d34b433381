"""Prompts as text and as embeddings, read from the files that people and `codmd encode` write."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from codmd.distill.config.typed import ConfigError
from codmd.models.base import Condition, VideoDenoiser
from codmd.models.embeddings import EMBEDDING, PROMPTS
from codmd.models.fingerprint import fingerprint

from .prompt_files import read_prompts


class Prompts:
    """The prompts of a text file, encoded by the model as they come."""

    def __init__(self, path: Path, model: VideoDenoiser | None = None) -> None:
        self.prompts, self.model = read_prompts(path), model

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        """Of the prompts and their order."""
        return f"{zlib.crc32(json.dumps(self.prompts).encode()):08x}"

    def condition(self, numbers: Sequence[int]) -> Condition:
        """The model's encoding of those prompts."""
        assert self.model is not None, "these prompts were read for validation only"
        return self.model.encode([self.prompts[number] for number in numbers])


class Embeddings:
    """The folder that `codmd encode` wrote: safetensors shards, read row by row as they are needed.

    Every shard has a tensor "embedding" [N, L, text_dim] and, in its metadata, the N "prompts" as JSON.
    """

    def __init__(self, folder: Path) -> None:
        shards = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if not shards:
            raise ConfigError(
                f"data.path: {folder} has no safetensors shards; expected a folder that codmd encode wrote"
            )
        self.prompts: list[str] = []
        self._rows: list[tuple[int, int]] = []
        self._shards = [_open_shard(path) for path in shards]
        shapes = set()
        for number, (path, shard) in enumerate(zip(shards, self._shards, strict=True)):
            shape = shard.get_slice(EMBEDDING).get_shape()
            prompts = _prompts_of(path, shard)
            if len(prompts) != shape[0]:
                raise ConfigError(f"data.path: {path} has {len(prompts)} prompts for {shape[0]} embeddings")
            shapes.add(tuple(shape[1:]))
            self.prompts += prompts
            self._rows += [(number, row) for row in range(shape[0])]
        if len(shapes) > 1:
            raise ConfigError(f"data.path: {folder} mixes embeddings of shapes {sorted(shapes)}")

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        """Of the prompts, their order and their embeddings."""
        return f"{zlib.crc32(json.dumps(self.fingerprints()).encode()):08x}"

    def fingerprints(self) -> list[tuple[str, str]]:
        """(prompt, fingerprint of its embedding) in order."""
        rows = (row for shard in self._shards for row in shard.get_tensor(EMBEDDING))
        return [(prompt, fingerprint({"": row})) for prompt, row in zip(self.prompts, rows, strict=True)]

    def condition(self, numbers: Sequence[int]) -> Condition:
        """The embeddings of those rows, [len(numbers), L, text_dim]."""
        rows = [self._rows[number] for number in numbers]
        return torch.cat([self._shards[shard].get_slice(EMBEDDING)[row : row + 1] for shard, row in rows])


def _prompts_of(path: Path, shard: Any) -> list[str]:
    try:
        prompts = json.loads((shard.metadata() or {}).get(PROMPTS, "[]"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.path: {path}: its prompts are not JSON: {error}") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"data.path: {path}: its prompts are no list of texts")
    return prompts


def _open_shard(path: Path) -> Any:
    try:
        shard = safe_open(path, framework="pt").__enter__()
        shard.get_slice(EMBEDDING)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"data.path: {path} is no readable shard of embeddings: {error}") from error
    return shard
