"""`codmd convert`: a trained student, or released weights, in the form that the model's own users load."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from codmd.cli import CommandError
from codmd.extras import needing
from codmd.hub import push

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from codmd.models import VideoDenoiser

HELP = "write a trained student, or released Wan or CoDMD weights, as a diffusers folder"
KEEP = "keep"
DTYPES = (KEEP, "float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd convert`."""
    parser.add_argument("source", type=Path, help="a run or one of its checkpoints; with --codmd a weight file")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="the whole student: VAE, text encoder and tokenizer of its base, schedulers, a model card",
    )
    parser.add_argument("--base", help="with --pipeline: folder or repository of the base (the teacher's)")
    parser.add_argument(
        "--measures",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="with --pipeline: results.json of codmd inspect, scores of codmd vbench --json, for the card",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload OUT to this repository of the Hub")
    parser.add_argument("--ema", action="store_true", help="the running average of the student instead of the student")
    parser.add_argument("--adapter", action="store_true", help="the low-rank adapter alone, not merged into its base")
    parser.add_argument(
        "--codmd",
        action="store_true",
        help="SOURCE is a .pt or .safetensors file: a CoDMD release, or Wan's own weights",
    )
    parser.add_argument("--network", default="", help="with --codmd: the entry of the file to read (generator)")
    parser.add_argument(
        "--config", default="", help="with --codmd: 1.3b, 14b, i2v_14b, ... or a config.json (found from the weights)"
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
    for option in ("base", "measures"):
        if getattr(args, option) and not args.pipeline:
            raise CommandError(f"--{option}: only with --pipeline")
    if args.pipeline and (args.codmd or args.adapter):
        raise CommandError("--pipeline: only for a training checkpoint, whole: it writes the step list and the recipe")
    if args.codmd and args.adapter:
        raise CommandError("--adapter: only for a training checkpoint; a weight file holds a whole network")
    if args.codmd and args.ema:
        raise CommandError("--ema: only for a training checkpoint; with --codmd give --network generator_ema")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise CommandError(f"{args.out}: exists already; give a new or empty folder")
    try:
        with needing("train"):
            import torch

            dtype = None if args.dtype == KEEP else getattr(torch, args.dtype)
            write = write_adapter if args.adapter else write_pipeline if args.pipeline else write_network
            count, loaded_by = write(args, dtype)
            print(f"{args.out}: {count:,} parameters" + (f"; load it with {loaded_by}" if loaded_by else ""))
            if args.push:
                print(push(args.out, args.push))
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    return 0


def write_network(args: argparse.Namespace, dtype: torch.dtype | None) -> tuple[int, str]:
    """Writes a whole network; the number of its parameters, and how it is loaded."""
    from tqdm import tqdm

    with open_source(args) as (model, tensors):
        with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="writing") as bar:
            model.save_state(args.out, tensors, dtype, progress=bar.update)
        return sum(weight.numel() for weight in model.parameters()), model.loaded_by


def write_pipeline(args: argparse.Namespace, dtype: torch.dtype | None) -> tuple[int, str]:
    """Writes the whole student; the number of its network's parameters, and how it is loaded."""
    from tqdm import tqdm

    from codmd import models
    from codmd.models.provenance import read_measures
    from codmd.trained import open_student

    measures = [row for path in args.measures or () for row in read_measures(path)]
    with open_student(args.source, args.ema) as student:
        model = models.unread(student.model.name, student.model.options)
        base = args.base or student.run.frozen.options.weights
        with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="writing") as bar:
            model.save_pipeline(args.out, student.weights, base, student.provenance(measures), dtype, bar.update)
    return sum(weight.numel() for weight in model.parameters()), model.pipeline_loaded_by


def write_adapter(args: argparse.Namespace, dtype: torch.dtype | None) -> tuple[int, str]:
    """Writes the student's adapter; the number of its parameters, and how it is loaded."""
    from codmd import models
    from codmd.trained import read_adapter

    student = read_adapter(args.source, args.ema)
    model = models.unread(student.run.frozen.name, student.run.frozen.options)
    model.save_adapter(args.out, student.weights, dtype)
    return sum(factor.numel() for factor in student.weights.values()), model.adapter_loaded_by


@contextmanager
def open_source(args: argparse.Namespace) -> Iterator[tuple[VideoDenoiser, Mapping[str, Tensor]]]:
    """The network that the command line asks for, without its weights, and the weights."""
    from codmd import models
    from codmd.trained import open_student

    if not args.codmd:
        with open_student(args.source, args.ema) as student:
            yield models.unread(student.model.name, student.model.options), student.weights
        return
    given = {"config": args.config, "entry": args.network}
    name = args.model or models.DEFAULT
    chosen = {option: value for option, value in given.items() if value}
    model = models.unread(name, models.read_options(name, weights=str(args.source), **chosen))
    with model.open_weights(args.source) as tensors:
        yield model, tensors
