"""Prompt embeddings: the encoder that makes them, and the folder that `codmd encode` writes.

A folder of safetensors shards, each with a tensor "embedding" [N, L, D] and the N "prompts" as JSON in its metadata,
and the negative prompt's embedding in a folder of its own inside. With first frames their tensors [N, ...] are beside,
and the paths of the N "images" with their checksums.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

EMBEDDING = "embedding"
PROMPTS, IMAGES, CHECKSUMS = "prompts", "images", "checksums"
NEGATIVE_FILE = Path("negative") / "embedding.safetensors"


class PromptEncoder(Protocol):
    """A text encoder on one device.

    Attributes:
        tokens, width, dtype: of every embedding, [tokens, width].
    """

    tokens: int
    width: int
    dtype: torch.dtype

    def length(self, prompt: str) -> int:
        """Tokens of a prompt, however many."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, tokens, width]."""
        ...


def warn_of_cuts(encoder: PromptEncoder, prompts: Sequence[str]) -> None:
    """Warns of prompts that are longer than the encoder reads, by their beginning and their number of tokens."""
    for prompt in prompts:
        if (length := encoder.length(prompt)) > encoder.tokens:
            warnings.warn(
                f"a prompt has {length} tokens, of which the first {encoder.tokens} are read: {prompt[:60]!r}",
                stacklevel=3,
            )


def read_embedding(path: str | os.PathLike[str]) -> Tensor:
    """One prompt's embedding [1, L, D].

    Args:
        path: a safetensors file, or a folder of `codmd encode`, of which the negative prompt is read.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / NEGATIVE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"null_embedding: {path}: no such file; expected a folder of codmd encode, or its file")
    try:
        with safe_open(path, framework="pt") as file:
            embedding = file.get_tensor(EMBEDDING)
    except SafetensorError as error:
        raise ValueError(f"{path}: not an embedding written by codmd encode ({error})") from error
    if embedding.dim() != 3 or len(embedding) != 1:
        raise ValueError(f"{path}: embedding of shape {tuple(embedding.shape)}; expected (1, L, D)")
    return embedding
