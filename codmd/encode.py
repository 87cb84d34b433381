"""Encode prompts once with a model's text encoder, so that training and sampling need no text encoder.

OUT appears when it is complete: safetensors shards with the prompts in their metadata, and the negative prompt's
embedding in `negative`. An interrupted run goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codmd.cli import CommandError, integer_in
from codmd.extras import needing

if TYPE_CHECKING:
    from codmd.models.embeddings import PromptEncoder

HELP = "encode prompts with a model's text encoder into safetensors shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd encode`."""
    parser.add_argument("prompts", type=Path, help="UTF-8: text with one prompt a line, or .json, .jsonl, .csv")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument(
        "--text-encoder",
        required=True,
        type=Path,
        help="folder or repository with text_encoder and tokenizer, as diffusers has them",
    )
    parser.add_argument("--model", help="whose text encoder it is (wan)")
    parser.add_argument("--negative-prompt", help="of the unconditional branch (the model's own)")
    parser.add_argument("--shard", type=integer_in(1, 100_000), default=256, help="prompts of one file (256)")
    parser.add_argument("--batch", type=integer_in(1, 4096), default=8, help="prompts encoded at a time (8)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Encodes what is missing and prints what is there; returns the exit status.

    Raises:
        CommandError: the prompts or the encoder cannot be read, or the folder cannot be written.
    """
    with needing("train"):
        import torch
        import transformers  # noqa: F401

        from codmd import models
        from codmd.distill.data.prompt_files import read_prompts
    try:
        prompts = read_prompts(args.prompts)
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"{args.out}: exists already; give a new folder")
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = models.adapter(args.model or models.DEFAULT)
        encoder = model.prompt_encoder(args.text_encoder, device, getattr(torch, args.dtype))
        negative = model.negative_prompt if args.negative_prompt is None else args.negative_prompt
        encode(encoder, prompts, negative, args.out, args.shard, args.batch)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    print(f"{args.out}: {len(prompts)} prompts; give it to codmd train as data.path and model.null_embedding")
    return 0


def encode(encoder: PromptEncoder, prompts: Sequence[str], negative: str, out: Path, shard: int, batch: int) -> None:
    """Fills a folder beside `out`, shard by shard, then renames it to `out`.

    Raises:
        OSError: it cannot be written, or there is not enough room; complete shards stay for the next run.
    """
    from tqdm import tqdm

    from codmd.models.embeddings import NEGATIVE_FILE

    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    if partial.is_symlink():
        raise OSError(f"{partial}: is a link; remove it")
    (partial / NEGATIVE_FILE.parent).mkdir(parents=True, exist_ok=True)
    groups = [list(prompts[start : start + shard]) for start in range(0, len(prompts), shard)]
    files = {f"{number:05d}.safetensors": group for number, group in enumerate(groups)}
    for stale in {path.name for path in partial.glob("*.safetensors")} - files.keys():
        (partial / stale).unlink()
    for number, prompt in enumerate(prompts, 1):
        if (length := encoder.length(prompt)) > encoder.tokens:
            print(f"prompt {number}: {length} tokens, of which the first {encoder.tokens} are read", file=sys.stderr)
    expected = (encoder.tokens, encoder.width, encoder.dtype)
    with tqdm(total=len(prompts), unit="prompt", desc="encoding") as bar:
        _one(encoder, partial / str(NEGATIVE_FILE), [negative], expected, 1, lambda _: None)
        missing = sum(len(g) for name, g in files.items() if not _complete(partial / name, g, expected))
        _check_room(partial, missing * encoder.tokens * expected[1] * expected[2].itemsize)
        for name, group in files.items():
            _one(encoder, partial / name, group, expected, batch, bar.update)
    if out.is_dir():
        out.rmdir()
    os.replace(partial, out)


def _one(
    encoder: PromptEncoder,
    path: Path,
    prompts: Sequence[str],
    expected: tuple[Any, ...],
    batch: int,
    progress: Callable[[int], Any],
) -> None:
    """Writes one shard, unless it is there and complete."""
    import torch

    from codmd.models.embeddings import EMBEDDING, PROMPTS
    from codmd.models.tensor_files import save_tensors

    if _complete(path, prompts, expected):
        progress(len(prompts))
        return
    parts = []
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        with warnings.catch_warnings():  # said above, with their numbers
            warnings.filterwarnings("ignore", message="a prompt has")
            parts.append(encoder(group).cpu())
        progress(len(group))
    save_tensors(path, {EMBEDDING: torch.cat(parts)}, {PROMPTS: json.dumps(list(prompts), ensure_ascii=False)})


def _complete(path: Path, prompts: Sequence[str], expected: tuple[Any, ...]) -> bool:
    """Whether a shard has those prompts in that shape and dtype; a damaged one is not complete."""
    from safetensors import SafetensorError, safe_open

    from codmd.models.embeddings import EMBEDDING, PROMPTS
    from codmd.models.safetensors_stream import DTYPES

    tokens, width, dtype = expected
    try:
        with safe_open(path, framework="pt") as file:
            entry = file.get_slice(EMBEDDING)
            same = entry.get_shape() == [len(prompts), tokens, width] and entry.get_dtype() == DTYPES[dtype]
            return same and json.loads((file.metadata() or {}).get(PROMPTS, "null")) == list(prompts)
    except (SafetensorError, OSError, ValueError, RecursionError):
        return False


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder.parent}: needs {size / 1e9:.1f} GB more and has {free / 1e9:.1f} GB free")
