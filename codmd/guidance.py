"""Converts a guidance scale from one codebase's formula to another's, and prints both formulas."""

from __future__ import annotations

import argparse
import math

from codmd import conventions

HELP = "convert a guidance scale between codebases"

FORMULAS = {"cond": "cond + s * (cond - uncond)", "uncond": "uncond + s * (cond - uncond)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`codmd guidance SCALE --from CONVENTION --to CONVENTION`."""
    parser.add_argument("scale", type=_finite, help="the scale as --from means it")
    names = tuple(conventions.NAMED)
    for option in ("--from", "--to"):
        parser.add_argument(
            option, dest=option.strip("-"), choices=names, required=True, metavar="CONVENTION", help=", ".join(names)
        )


def run(args: argparse.Namespace) -> int:
    """Prints the equivalent scale, and the formula on either side."""
    source, target = conventions.NAMED[vars(args)["from"]], conventions.NAMED[args.to]
    scale = target.guidance_scale(args.scale, form=source.guidance_form)
    rows = [
        (vars(args)["from"], f"{args.scale:.12g}", FORMULAS[source.guidance_form]),
        (args.to, f"{scale:.12g}", FORMULAS[target.guidance_form]),
    ]
    names, numbers = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, number, formula in rows:
        print(f"{name:<{names}}  s = {number:<{max(numbers, 8)}} {formula}")
    return 0


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a finite number")
    return value
