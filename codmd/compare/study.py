"""Pairs of videos from two folders, their order and their sides, decided by a seed."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codmd.cli import CommandError
from codmd.files import samples_in, short_names
from codmd.mp4 import BadMovie, read_movie
from codmd.sample.names import recorded_prompts, without_seed

MEDIA_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}
"""Files that browsers play."""

PLAYED = {"avc1", "avc3", "hev1", "hvc1", "av01", "vp08", "vp09"}
"""Codecs of mp4 files that a browser plays: H.264, AV1 and VP9 in all, H.265 where the system decodes it."""

UNPLAYED = "which no browser plays"
REMEDY = "encode again what no browser plays: ffmpeg -i IN.mp4 -c:v libx264 -pix_fmt yuv420p OUT.mp4"

EBML = b"\x1a\x45\xdf\xa3"


@dataclass(frozen=True)
class Pair:
    """Two videos of one name, as they will be shown."""

    name: str
    prompt: str
    left: Path
    right: Path


@dataclass(frozen=True)
class Study:
    """A comparison, ready to be written as a page.

    Attributes:
        pairs: in the order they are shown.
        key: base64 of JSON {"a": name, "b": name, "left": {pair: "a" or "b"}}, opaque to whoever looks at the page;
            answers carry it along and the tally reads it.
        identity: changes with the key, hence with seed, names and pairs.
    """

    pairs: list[Pair]
    key: str
    identity: str


def make_study(a: Path, b: Path, seed: int, limit: int | None, prompts: dict[str, str]) -> tuple[Study, list[str]]:
    """Pairs same-named videos of two folders.

    Args:
        a, b: folders of mp4 or webm files, or what `codmd sample` wrote; names count without the suffix.
        seed: decides the pairs drawn, their order and their sides. Of n pairs, n // 2 or (n + 1) // 2 have `a` left.
        limit: number of pairs to draw; all by default.
        prompts: prompt by name; others are those that `codmd sample` recorded, or are read off the name,
            "{prompt}-{number}".

    Returns:
        the study, and the names that only one of the folders holds.

    Raises:
        CommandError: no folder, no pair, one video of two prompts, or videos that no browser plays (all are named).
        OSError, ValueError: a file cannot be read; names it.
    """
    name_a, name_b = (name.encode("utf-8", "replace").decode() for name in short_names([a, b]))
    ours, theirs = _videos(a), _videos(b)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise CommandError(f"{a} and {b} have no video of the same name; found {len(ours)} and {len(theirs)}")
    chooser = random.Random(seed)
    chooser.shuffle(common)
    names = common[:limit]
    bad = [f"{p}: {why}" for name in names for p in (ours[name], theirs[name]) if (why := unplayable(p))]
    if bad:
        remedy = [REMEDY] if any(line.endswith(UNPLAYED) for line in bad) else []
        raise CommandError("\n  ".join(["videos that cannot be shown:", *bad, *remedy]))
    recorded = [recorded_prompts(folder) for folder in (a, b)]
    a_left = [i % 2 == 0 for i in range(len(names))]
    if chooser.random() < 0.5:
        a_left = [not side for side in a_left]
    chooser.shuffle(a_left)
    pairs = []
    for name, left in zip(names, a_left, strict=True):
        sides = (ours[name], theirs[name]) if left else (theirs[name], ours[name])
        pairs.append(Pair(name, _prompt(name, prompts, recorded), *sides))
    sides_by_name = {pair.name: "a" if left else "b" for pair, left in zip(pairs, a_left, strict=True)}
    secret = json.dumps({"a": name_a, "b": name_b, "left": sides_by_name}).encode()
    identity = hashlib.sha256(secret).hexdigest()[:16]
    return Study(pairs, base64.b64encode(secret).decode(), identity), sorted(ours.keys() ^ theirs.keys())


def unplayable(path: Path) -> str | None:
    """Why no browser plays this file, as far as its container tells; None when one does."""
    if path.suffix.lower() == ".webm":
        with path.open("rb") as file:
            return None if file.read(4) == EBML else "is not a webm file"
    try:
        codec = read_movie(path).codec
    except BadMovie as error:
        return str(error)
    return None if codec in PLAYED else f"is coded as {codec}, {UNPLAYED}"


def _prompt(name: str, given: Mapping[str, str], recorded: Sequence[Mapping[str, str]]) -> str:
    start = without_seed(name)
    found = list(dict.fromkeys(prompts[start] for prompts in recorded if start in prompts))
    if name not in given and len(found) > 1:
        raise CommandError(
            f"{name}: one folder was sampled from the prompt {found[0]!r}, the other from {found[1]!r}; "
            "say with --prompts what people are to read"
        )
    return given.get(name, found[0] if found else start)


def _videos(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder")
    files = sorted(samples_in(folder).iterdir())
    return {p.stem: p for p in files if p.suffix.lower() in MEDIA_TYPES and not p.name.startswith(".")}
