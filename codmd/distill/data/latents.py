"""Latents as `codmd sample --latents` and `codmd encode --vae` write them, beside the embeddings of their prompts."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codmd.distill.config.typed import ConfigError
from codmd.models.base import Condition

from .prompts import Embeddings

LATENTS = "latents"
"""The tensor in a file of latents, and the folder of such files that `codmd sample` and `codmd encode` write."""
SAMPLE = "sample"
"""The entry of its metadata: JSON, with the prompt."""


class Latents:
    """Safetensors files, each with a tensor "latents" [F, C, H, W] and, in its metadata "sample", its prompt as JSON.

    The headers of all files are read at once, with progress on a terminal; latents as they are needed.

    Args:
        folder: of the files, or one with the folder `latents` inside, as the commands write it.
        latent_shape: (F, C, H, W), of every file.
        embeddings: of the prompts, looked up by their text; None for an unconditional model.

    Attributes:
        prompts: one of every file.

    Raises:
        ConfigError: there are none, or a file is not as described; the message names it.
    """

    def __init__(self, folder: Path, latent_shape: Sequence[int], embeddings: Embeddings | None) -> None:
        from tqdm import tqdm

        inner = folder / LATENTS
        self.files = sorted((inner if inner.is_dir() else folder).glob("*.safetensors")) if folder.is_dir() else []
        if not self.files:
            raise ConfigError(
                f"data.path: {folder} has no safetensors files; expected a folder of codmd sample --latents, or of "
                "codmd encode --vae"
            )
        shape = tuple(latent_shape)
        bar = tqdm(self.files, desc="latents", unit="file", leave=False, disable=not sys.stderr.isatty())
        self.prompts = [_prompt_of(path, shape) for path in bar]
        self.embeddings = embeddings
        if embeddings is not None:
            rows = {prompt: row for row, prompt in enumerate(embeddings.prompts)}
            for path, prompt in zip(self.files, self.prompts, strict=True):
                if prompt not in rows:
                    raise ConfigError(f"data.embeddings: {path} is of the prompt {prompt!r}, which has no embedding")
            self._rows = [rows[prompt] for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """Of names, sizes and prompts, and of the embeddings; the latents themselves may be terabytes."""
        files = [
            (path.name, path.stat().st_size, prompt) for path, prompt in zip(self.files, self.prompts, strict=True)
        ]
        beside = "" if self.embeddings is None else self.embeddings.fingerprint()
        return f"{zlib.crc32(json.dumps([files, beside]).encode()):08x}"

    def condition(self, numbers: Sequence[int]) -> Condition:
        """The embeddings of those files' prompts, [len(numbers), L, text_dim]; None for an unconditional model."""
        return None if self.embeddings is None else self.embeddings.condition([self._rows[n] for n in numbers])

    def videos(self, numbers: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Those files' latents [B, F, C, H, W], float32; what lies at a position does not depend on it."""
        return torch.stack([_read(self.files[number]) for number in numbers])


def _prompt_of(path: Path, shape: tuple[int, ...]) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            found = tuple(file.get_slice(LATENTS).get_shape())
            prompt = json.loads((file.metadata() or {})[SAMPLE])["prompt"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"data.path: {path} holds no latents of codmd sample --latents or codmd encode --vae: {error!r}"
        ) from error
    if found != shape:
        raise ConfigError(f"data.path: {path} has latents of shape {found}; the model's are {shape}")
    return str(prompt)


def _read(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(LATENTS).float()
