"""Prompts, and the images that their videos start from, to a model's embeddings, in safetensors shards."""

from __future__ import annotations

import json
import math
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from codmd.models.embeddings import CHECKSUMS, EMBEDDING, IMAGES, NEGATIVE_FILE, PROMPTS, PromptEncoder
from codmd.models.images import ImageEncoder
from codmd.models.safetensors_stream import DTYPES
from codmd.models.tensor_files import save_tensors

from .folder import check_room, finish, partial_of


class Item(NamedTuple):
    """A prompt and, with images, the file of its first frame."""

    prompt: str
    image: Path | None = None


class Encoders(NamedTuple):
    """What makes the tensors of a shard.

    Attributes:
        text: of prompts.
        image: of first frames; None without them.
    """

    text: PromptEncoder
    image: ImageEncoder | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of the tensors of one item, all in the text encoder's dtype."""
        images = {} if self.image is None else self.image.shapes
        return {EMBEDDING: (self.text.tokens, self.text.width), **images}

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Name to [len(items), *shape], on the CPU."""
        found = {EMBEDDING: self.text([item.prompt for item in items])}
        if self.image is not None:
            found |= self.image([item.image for item in items if item.image is not None])
        return {name: value.to("cpu", self.text.dtype) for name, value in found.items()}


def encode_prompts(
    encoder: PromptEncoder,
    prompts: Sequence[str],
    negative: str,
    out: Path,
    shard: int,
    batch: int,
    image_encoder: ImageEncoder | None = None,
    images: Sequence[Path] = (),
) -> None:
    """Fills a folder beside `out`, shard by shard, then renames it to `out`.

    Raises:
        OSError: it cannot be written, or there is not enough room; complete shards stay for the next run.
    """
    partial = partial_of(out)
    (partial / NEGATIVE_FILE.parent).mkdir(parents=True, exist_ok=True)
    items = [Item(*pair) for pair in zip(prompts, images, strict=True)] if images else [Item(p) for p in prompts]
    groups = [items[start : start + shard] for start in range(0, len(items), shard)]
    files = {f"{number:05d}.safetensors": group for number, group in enumerate(groups)}
    for stale in {path.name for path in partial.glob("*.safetensors")} - files.keys():
        (partial / stale).unlink()
    for number, prompt in enumerate(prompts, 1):
        if (length := encoder.length(prompt)) > encoder.tokens:
            print(f"prompt {number}: {length} tokens, of which the first {encoder.tokens} are read", file=sys.stderr)
    encoders, alone = Encoders(encoder, image_encoder), Encoders(encoder)
    size = sum(map(math.prod, encoders.shapes.values())) * encoder.dtype.itemsize
    with tqdm(total=len(prompts), unit="prompt", desc="encoding") as bar:
        _one(alone, partial / str(NEGATIVE_FILE), [Item(negative)], 1, lambda _: None)
        missing = sum(len(g) for name, g in files.items() if not _complete(partial / name, g, encoders))
        check_room(partial, missing * size)
        for name, group in files.items():
            _one(encoders, partial / name, group, batch, bar.update)
    finish(partial, out)


def _one(encoders: Encoders, path: Path, items: Sequence[Item], batch: int, progress: Callable[[int], Any]) -> None:
    """Writes one shard, unless it is there and complete."""
    if _complete(path, items, encoders):
        progress(len(items))
        return
    parts = []
    for start in range(0, len(items), batch):
        group = items[start : start + batch]
        with warnings.catch_warnings():  # said above, with their numbers
            warnings.filterwarnings("ignore", message="a prompt has")
            parts.append(encoders(group))
        progress(len(group))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    save_tensors(path, tensors, {key: json.dumps(texts, ensure_ascii=False) for key, texts in _texts(items).items()})


def _texts(items: Sequence[Item]) -> dict[str, list[str]]:
    """What a shard's metadata has: the prompts and, with images, their names and, to know them again, checksums."""
    paths = [item.image for item in items if item.image is not None]
    found = {PROMPTS: [item.prompt for item in items]}
    if paths:
        found[IMAGES] = [str(path) for path in paths]
        found[CHECKSUMS] = [f"{zlib.crc32(path.read_bytes()):08x}" for path in paths]
    return found


def _complete(path: Path, items: Sequence[Item], encoders: Encoders) -> bool:
    """Whether a shard has those prompts and images in that shape and dtype; a damaged one is not complete."""
    try:
        with safe_open(path, framework="pt") as file:
            if sorted(file.keys()) != sorted(encoders.shapes):
                return False
            for name, shape in encoders.shapes.items():
                entry = file.get_slice(name)
                if entry.get_shape() != [len(items), *shape] or entry.get_dtype() != DTYPES[encoders.text.dtype]:
                    return False
            metadata = file.metadata() or {}
            return {key: json.loads(text) for key, text in metadata.items() if key != "format"} == _texts(items)
    except (SafetensorError, OSError, ValueError, RecursionError):
        return False
