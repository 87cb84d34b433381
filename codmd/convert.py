"""`codmd convert`: a trained student, or released weights, in the form that the model's own users load."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from codmd.cli import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from codmd.models import VideoDenoiser

HELP = "write a trained student, or released Wan or CoDMD weights, as a diffusers folder"
KEEP = "keep"
DTYPES = (KEEP, "float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd convert`."""
    parser.add_argument("source", type=Path, help="a run or one of its checkpoints; with --codmd a weight file")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--ema", action="store_true", help="the running average of the student instead of the student")
    parser.add_argument(
        "--codmd",
        action="store_true",
        help="SOURCE is a .pt or .safetensors file: a CoDMD release, or Wan's own weights",
    )
    parser.add_argument("--network", default="", help="with --codmd: the entry of the file to read (generator)")
    parser.add_argument(
        "--config", default="", help="with --codmd: 1.3b, 14b, tiny or a config.json (found out from the weights)"
    )
    parser.add_argument("--model", help="with --codmd: the model that the weights are of (wan)")
    parser.add_argument("--dtype", choices=DTYPES, default=KEEP, help="of the weights written (keep)")


def run(args: argparse.Namespace) -> int:
    """Converts, and prints what was written; returns the exit status.

    Raises:
        CommandError: the source cannot be used, or the folder cannot be written.
    """
    for option in ("network", "config", "model"):
        if getattr(args, option) and not args.codmd:
            raise CommandError(f"--{option}: only with --codmd; a checkpoint knows its own")
    if args.codmd and args.ema:
        raise CommandError("--ema: only for a training checkpoint; with --codmd give --network generator_ema")
    try:
        import torch
        from tqdm import tqdm

        dtype = None if args.dtype == KEEP else getattr(torch, args.dtype)
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise CommandError(f"{args.out}: exists already; give a new or empty folder")
        with open_source(args) as (model, tensors):
            count = sum(weight.numel() for weight in model.parameters())
            with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="writing") as bar:
                model.save_state(args.out, tensors, dtype, progress=bar.update)
    except ModuleNotFoundError as error:
        raise CommandError(f"needs the package {error.name}; install it with: pip install 'codmd[train]'") from error
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    print(f"{args.out}: {count / 1e9:.3f} billion parameters; load it with {model.loaded_by}")
    return 0


@contextmanager
def open_source(args: argparse.Namespace) -> Iterator[tuple[VideoDenoiser, Mapping[str, Tensor]]]:
    """The network that the command line asks for, without its weights, and the weights."""
    from codmd import models
    from codmd.trained import open_student

    if not args.codmd:
        with open_student(args.source, args.ema) as student:
            yield models.unread(student.run.model.name, student.run.model.options), student.weights
        return
    given = {"config": args.config, "entry": args.network}
    name = args.model or models.DEFAULT
    chosen = {option: value for option, value in given.items() if value}
    model = models.unread(name, models.read_options(name, weights=str(args.source), **chosen))
    with model.open_weights(args.source) as tensors:
        yield model, tensors
