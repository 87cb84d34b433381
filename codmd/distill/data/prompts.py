"""Prompts as text and as embeddings, read from the files that people and `codmd encode` write; first frames, too."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codmd.distill.config.typed import ConfigError
from codmd.models.base import Condition, VideoDenoiser
from codmd.models.embeddings import EMBEDDING, IMAGES, PROMPTS
from codmd.models.fingerprint import fingerprint

from .prompt_files import read_pairs


class Prompts:
    """The prompts of a file, and its images where it has them, encoded by the model as they come."""

    def __init__(self, path: Path, model: VideoDenoiser | None = None) -> None:
        self.prompts, self.images = read_pairs(path)
        self.model = model

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        """Of the prompts and their order, and of the images' names and sizes."""
        images = [[(path.name, path.stat().st_size) for path in self.images]] if self.images else []
        return f"{zlib.crc32(json.dumps([*self.prompts, *images]).encode()):08x}"

    def condition(self, numbers: Sequence[int]) -> Condition:
        """The model's encoding of those prompts."""
        assert self.model is not None, "these prompts were read for validation only"
        images = [self.images[number] for number in numbers] if self.images else []
        return self.model.encode([self.prompts[number] for number in numbers], images)


class Embeddings:
    """The folder that `codmd encode` wrote: safetensors shards, read row by row as they are needed.

    Every shard has a tensor "embedding" [N, L, text_dim] and, in its metadata, the N "prompts" as JSON. With first
    frames it has further tensors [N, ...], the model's own, and the names of the N "images".

    Attributes:
        prompts, images: of every row; images are empty where there are none.
    """

    def __init__(self, folder: Path) -> None:
        shards = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if not shards:
            raise ConfigError(
                f"data.path: {folder} has no safetensors shards; expected a folder that codmd encode wrote"
            )
        self.prompts: list[str] = []
        self.images: list[str] = []
        self._rows: list[tuple[int, int]] = []
        self._shards = [_open_shard(path) for path in shards]
        shapes = set()
        for number, (path, shard) in enumerate(zip(shards, self._shards, strict=True)):
            sizes = {name: tuple(shard.get_slice(name).get_shape()) for name in sorted(shard.keys())}
            count = sizes[EMBEDDING][0]
            prompts, images = _texts_of(path, shard, PROMPTS), _texts_of(path, shard, IMAGES)
            if len(prompts) != count:
                raise ConfigError(f"data.path: {path} has {len(prompts)} prompts for {count} embeddings")
            lengths = {name: size[0] for name, size in sizes.items()} | ({IMAGES: len(images)} if images else {})
            for name, length in lengths.items():
                if length != count:
                    raise ConfigError(f"data.path: {path} has {length} {name} for {count} embeddings")
            shapes.add(tuple((name, size[1:]) for name, size in sizes.items()))
            self.prompts += prompts
            self.images += images
            self._rows += [(number, row) for row in range(count)]
        if len(shapes) > 1:
            found = [", ".join(f"{name} {shape}" for name, shape in parts) for parts in sorted(shapes)]
            raise ConfigError(f"data.path: {folder} mixes embeddings of shapes {' and '.join(found)}")
        self.names = [name for name, _ in shapes.pop()]

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        """Of the prompts, their order and their embeddings."""
        return f"{zlib.crc32(json.dumps(self.fingerprints()).encode()):08x}"

    def fingerprints(self) -> list[tuple[str, str]]:
        """(prompt, fingerprint of its embedding, with its first frame where there is one) in order."""
        return [(prompt, fingerprint(self._row(number))) for number, prompt in enumerate(self.prompts)]

    def condition(self, numbers: Sequence[int]) -> Condition:
        """The embeddings of those rows, [len(numbers), L, text_dim]; with first frames a mapping, row by row alike."""
        rows = [self._row(number) for number in numbers]
        if self.names == [EMBEDDING]:
            return torch.stack([row[""] for row in rows])
        return {name: torch.stack([row[name] for row in rows]) for name in self.names}

    def _row(self, number: int) -> dict[str, Tensor]:
        """Name to tensor; an embedding alone has the name ""."""
        shard, row = self._rows[number]
        found = {name: self._shards[shard].get_slice(name)[row] for name in self.names}
        return {"": found[EMBEDDING]} if self.names == [EMBEDDING] else found


def _texts_of(path: Path, shard: Any, key: str) -> list[str]:
    try:
        texts = json.loads((shard.metadata() or {}).get(key, "[]"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.path: {path}: its {key} are not JSON: {error}") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"data.path: {path}: its {key} are no list of texts")
    return texts


def _open_shard(path: Path) -> Any:
    try:
        shard = safe_open(path, framework="pt").__enter__()
        shard.get_slice(EMBEDDING)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"data.path: {path} is no readable shard of embeddings: {error}") from error
    return shard
