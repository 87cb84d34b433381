"""Encode prompts, and the images that their videos start from, once, so that training and sampling need no encoder.

OUT appears when it is complete: safetensors shards with the prompts in their metadata, and the negative prompt's
embedding in `negative`. An interrupted run goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from codmd.cli import CommandError, integer_in
from codmd.extras import needing

if TYPE_CHECKING:
    from torch import Tensor

    from codmd.models.embeddings import PromptEncoder
    from codmd.models.images import ImageEncoder

HELP = "encode prompts, and first frames where they have one, into safetensors shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd encode`."""
    parser.add_argument(
        "prompts",
        type=Path,
        help='UTF-8: text with one prompt a line, or .json, .jsonl, .csv, where every prompt may have an "image"',
    )
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
    images = parser.add_argument_group("images", "of prompts that have one")
    images.add_argument(
        "--config", help="of the network: i2v_14b, ti2v_5b or a config.json (TEXT_ENCODER's, if it has it)"
    )
    images.add_argument("--vae", help="folder or repository of the VAE (TEXT_ENCODER, if it has one)")
    images.add_argument(
        "--image-encoder",
        help="folder or repository of image_encoder and image_processor (TEXT_ENCODER, if it has them)",
    )
    for side, default in (("frames", 81), ("height", 480), ("width", 832)):
        images.add_argument(f"--{side}", type=integer_in(1, 10_000), help=f"of the videos ({default})")


def run(args: argparse.Namespace) -> int:
    """Encodes what is missing and prints what is there; returns the exit status.

    Raises:
        CommandError: the prompts or the encoder cannot be read, or the folder cannot be written.
    """
    with needing("train"):
        import torch
        import transformers  # noqa: F401

        from codmd import models
        from codmd.distill.data.prompt_files import read_pairs
    try:
        prompts, images = read_pairs(args.prompts)
        _check_image_options(args, bool(images))
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"{args.out}: exists already; give a new folder")
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = models.adapter(args.model or models.DEFAULT)
        encoder = model.prompt_encoder(args.text_encoder, device, getattr(torch, args.dtype))
        negative = model.negative_prompt if args.negative_prompt is None else args.negative_prompt
        image_encoder = model.image_encoder(_image_options(args), device) if images else None
        encode(encoder, prompts, negative, args.out, args.shard, args.batch, image_encoder, images)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    what = f"{len(prompts)} prompts" + (" with an image each" if images else "")
    print(f"{args.out}: {what}; give it to codmd train as data.path and model.null_embedding")
    return 0


IMAGE_OPTIONS = ("config", "vae", "image_encoder", "frames", "height", "width")


def _check_image_options(args: argparse.Namespace, images: bool) -> None:
    for name in IMAGE_OPTIONS:
        if getattr(args, name) is not None and not images:
            raise ValueError(f"--{name.replace('_', '-')}: for images, and {args.prompts} names none")


def _image_options(args: argparse.Namespace) -> Any:
    """Options of the network whose first frames are encoded, at the size of its videos."""
    from codmd import models

    name, source = args.model or models.DEFAULT, args.text_encoder
    config = args.config or (str(source) if (source / "transformer" / "config.json").is_file() else "")
    if not config:
        raise ValueError(f"--config: not given, and {source} has no transformer to tell it; expected i2v_14b, ti2v_5b")
    given = {part: getattr(args, part) for part in ("vae", "image_encoder") if getattr(args, part)}
    parts = models.adapter(name).pipeline_options(source) | given
    options = models.read_options(name, weights="random", config=config, from_image=True, **parts)
    sizes = {side: getattr(args, side) or default for side, default in options.default_video.items()}
    return options.for_video(**sizes)


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
        from codmd.models.embeddings import EMBEDDING

        images = {} if self.image is None else self.image.shapes
        return {EMBEDDING: (self.text.tokens, self.text.width), **images}

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Name to [len(items), *shape], on the CPU."""
        from codmd.models.embeddings import EMBEDDING

        found = {EMBEDDING: self.text([item.prompt for item in items])}
        if self.image is not None:
            found |= self.image([item.image for item in items if item.image is not None])
        return {name: value.to("cpu", self.text.dtype) for name, value in found.items()}


def encode(
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
    from tqdm import tqdm

    from codmd.models.embeddings import NEGATIVE_FILE

    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    if partial.is_symlink():
        raise OSError(f"{partial}: is a link; remove it")
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
        _check_room(partial, missing * size)
        for name, group in files.items():
            _one(encoders, partial / name, group, batch, bar.update)
    if out.is_dir():
        out.rmdir()
    os.replace(partial, out)


def _one(encoders: Encoders, path: Path, items: Sequence[Item], batch: int, progress: Callable[[int], Any]) -> None:
    """Writes one shard, unless it is there and complete."""
    import torch

    from codmd.models.tensor_files import save_tensors

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
    from codmd.models.embeddings import CHECKSUMS, IMAGES, PROMPTS

    paths = [item.image for item in items if item.image is not None]
    found = {PROMPTS: [item.prompt for item in items]}
    if paths:
        found[IMAGES] = [str(path) for path in paths]
        found[CHECKSUMS] = [f"{zlib.crc32(path.read_bytes()):08x}" for path in paths]
    return found


def _complete(path: Path, items: Sequence[Item], encoders: Encoders) -> bool:
    """Whether a shard has those prompts and images in that shape and dtype; a damaged one is not complete."""
    from safetensors import SafetensorError, safe_open

    from codmd.models.safetensors_stream import DTYPES

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


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder.parent}: needs {size / 1e9:.1f} GB more and has {free / 1e9:.1f} GB free")
