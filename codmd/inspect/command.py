"""Measure videos: frame relations, motion, flicker, colour; with --reference, what differs from another set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from codmd.cli import CommandError, above, integer_in
from codmd.extras import needing

if TYPE_CHECKING:
    from .measures import Measurement
    from .report import Inspection

HELP = "measure videos: relations between frames, motion, flicker, colour; compare with a reference folder"

SOME_SKIPPED = 3
"""Exit status when the report was written but something was skipped."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd inspect`."""
    parser.add_argument(
        "videos",
        nargs="+",
        type=Path,
        metavar="VIDEO",
        help="mp4, webm, gif, ...; a folder of frames; latents in safetensors; or a folder of these",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FOLDER", help="folder with clips of the same names, say the teacher's"
    )
    parser.add_argument("--out", type=Path, default=Path("codmd-inspect"), help="folder for the report (codmd-inspect)")
    parser.add_argument(
        "--pool",
        type=_pool,
        metavar="mean|GHxGW",
        help="regions that frame features are averaged over (mean for latents, 8x8 for pixels)",
    )
    parser.add_argument("--fps", type=above(0), help="frames per second (the file's own; 16 if it has none)")
    parser.add_argument(
        "--pictures", type=integer_in(0, 1000), default=24, metavar="N", help="clips to show in pictures (24)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the report; returns 0, or 3 when something was skipped.

    Raises:
        CommandError: no clip can be read, the output folder cannot be used, or a package is missing.
    """
    if args.reference is not None and not args.reference.is_dir():
        raise CommandError(f"--reference {args.reference}: no such folder")
    with needing("inspect"):
        from codmd.output import OutputError, building, check_output

        from .report import verdict, write_report
    try:
        check_output(args.out, "inspection")
        inspection = inspect(args)
        if not inspection.clips:
            raise CommandError("no clip can be read:\n" + _listing(inspection))
        with building(args.out) as folder:
            write_report(folder, inspection, args.pictures)
    except (OutputError, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"{verdict(inspection)}\nReport: {args.out / 'report.html'}")
    if inspection.skipped:
        print(f"Skipped or not compared:\n{_listing(inspection)}", file=sys.stderr)
        return SOME_SKIPPED
    return 0


def inspect(args: argparse.Namespace) -> Inspection:
    """Reads and measures every clip and its reference, one at a time; nothing is written."""
    from tqdm import tqdm

    from codmd.sample.names import recorded_prompts, without_seed

    from .clips import UnreadableClip, clip_name, find_clips, read_clip
    from .measures import measure
    from .pairs import compare
    from .report import Inspection

    paths = list({path.absolute(): path for path in find_clips(args.videos)}.values())
    candidates = [] if args.reference is None else find_clips([args.reference])
    counterparts = {clip_name(p): p for p in candidates} | {p.name: p for p in candidates}
    found = Inspection([], [], [], {})
    recorded: dict[Path, dict[str, str]] = {}

    def measured(path: Path) -> Measurement | None:
        try:
            return measure(path, read_clip(path, args.fps), args.pool)
        except UnreadableClip as error:
            found.skipped.append((path, str(error)))
            return None

    def prompt(path: Path) -> str | None:
        folder = path.absolute().parent
        if folder not in recorded:
            try:
                recorded[folder] = recorded_prompts(folder)
            except (OSError, ValueError) as error:
                recorded[folder] = {}
                found.skipped.append((folder, f"its prompts: {error}"))
        return recorded[folder].get(without_seed(clip_name(path)))

    interval = 0.2 if sys.stderr.isatty() else 10.0
    for path in tqdm(paths, desc="clips", unit="clip", mininterval=interval, dynamic_ncols=True):
        clip = measured(path)
        if clip is None:
            continue
        found.clips.append(clip)
        if (text := prompt(path)) is not None:
            found.prompts[path] = text
        if args.reference is None:
            continue
        counterpart = counterparts.get(path.name) or counterparts.get(clip_name(path))
        if counterpart is None:
            found.skipped.append((path, f"not compared: {args.reference} holds no clip named {clip_name(path)}"))
        elif (reference := measured(counterpart)) is not None:
            try:
                found.pairs.append(compare(clip, reference))
            except ValueError as error:
                found.skipped.append((path, str(error)))
    return found


def _pool(text: str) -> str | tuple[int, int]:
    if text == "mean":
        return text
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) > 0 and int(width) > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected mean or two positive integers such as 8x8")
    return int(height), int(width)


def _listing(inspection: Inspection) -> str:
    lines = "\n".join(f"  {path}: {reason}" for path, reason in inspection.skipped)
    return lines.encode("utf-8", "backslashreplace").decode()  # a name may not be UTF-8
