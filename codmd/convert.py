"""`codmd convert`: a training checkpoint, or a file of Wan weights, as a diffusers folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codmd.cli import CommandError

if TYPE_CHECKING:
    from torch import Tensor

HELP = "write a trained student, or released Wan or CoDMD weights, as a diffusers folder"
KEEP = "keep"
DTYPES = (KEEP, "float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd convert`."""
    parser.add_argument("source", type=Path, help="a run or one of its checkpoints; with --codmd a weight file")
    parser.add_argument("out", type=Path, help="new folder for config.json and safetensors")
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
    parser.add_argument("--dtype", choices=DTYPES, default=KEEP, help="of the weights written (keep)")


def run(args: argparse.Namespace) -> int:
    """Converts, and prints what was written; returns the exit status.

    Raises:
        CommandError: the source cannot be used, or the folder cannot be written.
    """
    if not args.codmd and (args.network or args.config):
        raise CommandError(
            f"{'--network' if args.network else '--config'}: only with --codmd; a checkpoint knows its own"
        )
    if args.codmd and args.ema:
        raise CommandError("--ema: only for a training checkpoint; with --codmd give --network generator_ema")
    try:
        import torch
        from tqdm import tqdm

        from codmd.models.wan.config import parameter_shapes
        from codmd.models.wan.export import write_diffusers_folder
    except ModuleNotFoundError as error:
        raise CommandError(f"needs the package {error.name}; install it with: pip install 'codmd[train]'") from error

    dtype = None if args.dtype == KEEP else getattr(torch, args.dtype)
    try:
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise CommandError(f"{args.out}: exists already; give a new or empty folder")
        with open_source(args) as (config, tensors):
            count = sum(shape.numel() for shape in parameter_shapes(config).values())
            with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="writing") as bar:
                write_diffusers_folder(args.out, config, tensors, dtype, progress=bar.update)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    print(f"{args.out}: {count / 1e9:.3f} billion parameters; load it with WanTransformer3DModel.from_pretrained")
    return 0


@contextmanager
def open_source(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Mapping[str, Tensor]]]:
    """The configuration and the weights, by diffusers' names, that the command line asks for."""
    from codmd.models.wan.config import read_config
    from codmd.models.wan.weights import fitting_config, open_wan

    if not args.codmd:
        from codmd.trained import Renamed, open_student

        with open_student(args.source, args.ema) as student:
            if student.run.model.name != "wan":
                raise ValueError(
                    f"{args.source}: trained a {student.run.model.name!r} model; only Wan's can be written"
                )
            yield student.run.model.options.network(), Renamed(student.weights, "transformer.")
        return
    if args.config or args.source.is_dir():
        config = read_config(args.config or args.source)
    else:
        config = fitting_config(args.source, args.network)
    with open_wan(args.source, config, args.network) as tensors:
        yield config, tensors
