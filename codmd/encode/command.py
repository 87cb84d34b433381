"""Encode once what training reads many times: prompts and first frames by a model's encoders, or videos by its VAE.

OUT appears when it is complete; an interrupted run goes on where it stopped when it is started again.

Of prompts, OUT has safetensors shards with the prompts in their metadata, and the negative prompt's embedding in
`negative`. Of videos, it has the files that `codmd sample --latents` writes, in `latents`, and the captions in
prompts.json. A caption is the text in a .txt file beside the video, or the prompt that `codmd sample` noted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from codmd.cli import CommandError, integer_in
from codmd.extras import needing

HELP = "encode prompts, first frames or videos into safetensors, once for many epochs"
SIZE = ("frames", "height", "width")
OF_IMAGES = ("config", "vae", "image_encoder", *SIZE)
OF_PROMPTS = ("negative_prompt", "shard", "batch", "config", "image_encoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd encode`."""
    parser.add_argument(
        "source",
        type=Path,
        help='prompts in UTF-8: text with one a line, or .json, .jsonl, .csv, where every prompt may have an "image"; '
        "or a folder of videos with captions",
    )
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument(
        "--text-encoder", type=Path, help="for prompts: folder or repository with text_encoder and tokenizer"
    )
    parser.add_argument(
        "--vae",
        type=Path,
        help="for videos, and for images (TEXT_ENCODER's, if it has one): folder or repository",
    )
    parser.add_argument("--model", help="whose encoders they are (wan)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the result (bfloat16; of videos float32)")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")

    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--negative-prompt", help="of the unconditional branch (the model's own)")
    prompts.add_argument("--shard", type=integer_in(1, 100_000), help="prompts of one file (256)")
    prompts.add_argument("--batch", type=integer_in(1, 4096), help="prompts encoded at a time (8)")

    images = parser.add_argument_group("images", "of prompts that have one")
    images.add_argument(
        "--config", help="of the network: i2v_14b, ti2v_5b or a config.json (TEXT_ENCODER's, if it has it)"
    )
    images.add_argument(
        "--image-encoder",
        help="folder or repository of image_encoder and image_processor (TEXT_ENCODER's, if it has them)",
    )

    size = parser.add_argument_group("size", "of videos, scaled and cut in the middle, and of those that images start")
    size.add_argument("--frames", type=integer_in(1, 10_000), help="at the model's frame rate, from the beginning (81)")
    size.add_argument("--height", type=integer_in(16, 10_000), help="in pixels (480)")
    size.add_argument("--width", type=integer_in(16, 10_000), help="in pixels (832)")


def run(args: argparse.Namespace) -> int:
    """Encodes what is missing and prints what is there; returns the exit status.

    Raises:
        CommandError: the source or the encoder cannot be read, or the folder cannot be written.
    """
    if not (args.text_encoder or args.vae):
        raise CommandError("--text-encoder or --vae: expected the first for prompts, the second for videos")
    with needing("train"):
        import torch
        import tqdm  # noqa: F401
        import transformers  # noqa: F401
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.text_encoder:
            return _run_prompts(args, device)
        _refuse(args, OF_PROMPTS, "only for prompts")
        return _run_videos(args, device)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: {why}")


def _run_prompts(args: argparse.Namespace, device: str) -> int:
    import torch

    from codmd import models
    from codmd.distill.data.prompt_files import read_pairs

    from .folder import check_new
    from .prompts import encode_prompts

    prompts, images = read_pairs(args.source)
    if not images:
        _refuse(args, OF_IMAGES, f"for images, and {args.source} names none")
    check_new(args.out)
    model = models.adapter(args.model or models.DEFAULT)
    encoder = model.prompt_encoder(args.text_encoder, device, getattr(torch, args.dtype or "bfloat16"))
    negative = model.negative_prompt if args.negative_prompt is None else args.negative_prompt
    image_encoder = model.image_encoder(_image_options(args), device) if images else None
    encode_prompts(encoder, prompts, negative, args.out, args.shard or 256, args.batch or 8, image_encoder, images)
    what = f"{len(prompts)} prompts" + (" with an image each" if images else "")
    print(f"{args.out}: {what}; give it to codmd train as data.path and model.null_embedding")
    return 0


def _image_options(args: argparse.Namespace) -> Any:
    """Options of the network whose first frames are encoded, at the size of its videos."""
    from codmd import models

    name, source = args.model or models.DEFAULT, args.text_encoder
    config = args.config or (str(source) if (source / "transformer" / "config.json").is_file() else "")
    if not config:
        raise ValueError(f"--config: not given, and {source} has no transformer to tell it; expected i2v_14b, ti2v_5b")
    given = {part: str(getattr(args, part)) for part in ("vae", "image_encoder") if getattr(args, part)}
    parts = models.adapter(name).pipeline_options(source) | given
    options = models.read_options(name, weights="random", config=config, from_image=True, **parts)
    sizes = {side: getattr(args, side) or default for side, default in options.default_video.items()}
    return options.for_video(**sizes)


def _run_videos(args: argparse.Namespace, device: str) -> int:
    import torch

    from codmd import models

    with needing("inspect"):
        from .videos import captioned_videos, encode_videos
    from .folder import check_new

    name = args.model or models.DEFAULT
    videos = captioned_videos(args.source)
    check_new(args.out)
    encoder = models.adapter(name).video_encoder(args.vae, device, getattr(torch, args.dtype or "float32"))
    default = models.options_class(name).default_video
    size = {side: getattr(args, side) or default[side] for side in SIZE}
    encode_videos(encoder, videos, args.out, **size)
    print(
        f"{args.out}: {len(videos)} videos; give it to codmd train as data.path with data.kind=latents, and to "
        f"data.embeddings what codmd encode makes of {args.out / 'prompts.json'}"
    )
    return 0
