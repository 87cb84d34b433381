"""A blind pairwise user study: `codmd compare A B` writes its page, `codmd compare --tally ANSWERS...` counts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from codmd.cli import CommandError, integer_in
from codmd.extras import needing
from codmd.files import is_text, read_json, write_whole

if TYPE_CHECKING:
    from .tally import WinRate

HELP = "make the page of a blind user study of two folders of videos, or tally its answers"
PAGE, CHART = Path("codmd-compare.html"), Path("codmd-tally.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd compare`."""
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="A B | ANSWERS",
        help="two folders of same-named mp4 or webm files; or answers",
    )
    parser.add_argument("--tally", action="store_true", help="count exported answers instead of making a page")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"page ({PAGE}) or chart of the tally ({CHART})")
    parser.add_argument(
        "--seed", type=integer_in(0, 2**31), default=0, help="decides the order of pairs and the sides (0)"
    )
    parser.add_argument("--pairs", type=integer_in(1, 10_000), metavar="N", help="draw N pairs by the seed (all)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSON {name: prompt} (what codmd sample recorded, or the name)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page or prints the tally; returns the exit status.

    Raises:
        CommandError: something is missing, damaged or cannot be written; nothing is left half-written.
    """
    return _tally(args) if args.tally else _make_page(args)


def _make_page(args: argparse.Namespace) -> int:
    from .render import render
    from .study import make_study

    if len(args.paths) != 2:
        raise CommandError(f"got {len(args.paths)} folders; expected two, or --tally with answers")
    a, b = args.paths
    try:
        study, alone = make_study(a, b, args.seed, args.pairs, _read_prompts(args.prompts))
        page = render(study)
    except OSError as error:
        raise CommandError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    out = args.out or PAGE
    write_whole(out, page)
    if alone:
        print(f"In one folder only, left out: {', '.join(alone)}", file=sys.stderr)
    print(f"{len(study.pairs)} pairs: {out} ({len(page) / 2**20:.1f} MiB)")
    return 0


def _tally(args: argparse.Namespace) -> int:
    from .tally import BadAnswers, read_ballots, tally

    with needing("plot"):
        from .chart import chart
    try:
        ballots = read_ballots(args.paths)
    except BadAnswers as error:
        raise CommandError(str(error)) from error
    rates, names = tally(ballots), ballots[0].names
    if not any(rates.values()):
        raise CommandError("the files hold no answer yet")
    people = len({ballot.participant for ballot in ballots})
    pairs = len({vote.pair for ballot in ballots for vote in ballot.votes})
    title = f"{names[0]} against {names[1]}: {people} participant(s), {pairs} pair(s)"
    out = args.out or CHART
    write_whole(out, chart(rates, names, title))
    print(f"{title}\n\n{table(rates, names)}\n\nChart: {out}")
    return 0


def table(rates: Mapping[str, WinRate | None], names: tuple[str, str]) -> str:
    """Counts and win rates by question, as aligned text."""
    rows: list[Sequence[str]] = [("", names[0], "no difference", names[1], f"win rate of {names[0]}", "95 % interval")]
    for question, rate in rates.items():
        if rate is None:
            rows.append((question, "0", "0", "0", "-", "-"))
            continue
        interval = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"
        rows.append((question, *map(str, (rate.wins, rate.same, rate.losses)), f"{100 * rate.rate:.1f} %", interval))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _read_prompts(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        prompts = read_json(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--prompts {path}: cannot be read: {error}") from error
    if not isinstance(prompts, dict) or not all(map(is_text, prompts.values())):
        raise CommandError(f"--prompts {path}: expected {{name: prompt}}, prompts without NUL or lone surrogates")
    return prompts
