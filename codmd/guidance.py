"""Converts a guidance scale from one codebase's formula to another's, and prints both formulas."""

from __future__ import annotations

import argparse
import math
import sys

from codmd import conventions
from codmd.cli import nearest

HELP = "convert a guidance scale between codebases"

FORMULAS = {"cond": "cond + s * (cond - uncond)", "uncond": "uncond + s * (cond - uncond)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`codmd guidance SCALE --from CONVENTION --to CONVENTION`."""
    parser.add_argument("scale", type=_finite, help="the scale as --from means it")
    for option in ("--from", "--to"):
        parser.add_argument(option, type=_name, required=True, metavar="CONVENTION", help=", ".join(conventions.NAMED))


def run(args: argparse.Namespace) -> int:
    """Prints the equivalent scale, and the formula on either side."""
    source, target = conventions.NAMED[vars(args)["from"]], conventions.NAMED[args.to]
    try:
        scale = target.guidance_scale(source.cond_scale(args.scale), form="cond")
    except ValueError as error:
        sys.exit(f"codmd guidance: --to {args.to}: {error}")
    rows = [
        (vars(args)["from"], f"{args.scale:.12g}", formula(source)),
        (args.to, f"{scale:.12g}", formula(target)),
    ]
    names, numbers = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, number, text in rows:
        print(f"{name:<{names}}  s = {number:<{max(numbers, 8)}} {text}")
    return 0


def formula(convention: conventions.Convention) -> str:
    """How a convention guides, in words of ``cond``, ``uncond`` and ``s``."""
    above = "" if convention.guided_above is None else f" for s > {convention.guided_above:g}, else cond"
    return FORMULAS[convention.guidance_form] + above


def _name(text: str) -> str:
    if text not in conventions.NAMED:
        known = ", ".join(conventions.NAMED)
        raise argparse.ArgumentTypeError(f"got {text!r}; expected one of {known}{nearest(text, conventions.NAMED)}")
    return text


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a finite number")
    return value
