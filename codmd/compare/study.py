"""Pairs the videos of two folders and decides, by seed, the order of pairs and who stands on which side."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from codmd.cli import CommandError
from codmd.files import samples_in, short_names

MEDIA_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}
"""What browsers play."""

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
        prompts: prompt by name; others are read off the name, "{prompt}-{number}".

    Returns:
        the study, and the names that only one of the folders holds.

    Raises:
        CommandError: no folder, no pair, or videos that are damaged (every one is named).
    """
    name_a, name_b = short_names([a, b])
    ours, theirs = _videos(a), _videos(b)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise CommandError(f"{a} and {b} have no video of the same name; found {len(ours)} and {len(theirs)}")
    chooser = random.Random(seed)
    chooser.shuffle(common)
    names = common[:limit]
    damaged = [f"{p}: {why}" for name in names for p in (ours[name], theirs[name]) if (why := damage(p))]
    if damaged:
        raise CommandError("damaged videos:\n  " + "\n  ".join(damaged))
    a_left = [i % 2 == 0 for i in range(len(names))]
    if chooser.random() < 0.5:
        a_left = [not side for side in a_left]
    chooser.shuffle(a_left)
    pairs = []
    for name, left in zip(names, a_left, strict=True):
        sides = (ours[name], theirs[name]) if left else (theirs[name], ours[name])
        pairs.append(Pair(name, prompts.get(name, prompt_of(name)), *sides))
    sides_by_name = {pair.name: "a" if left else "b" for pair, left in zip(pairs, a_left, strict=True)}
    secret = json.dumps({"a": name_a, "b": name_b, "left": sides_by_name}).encode()
    identity = hashlib.sha256(secret).hexdigest()[:16]
    return Study(pairs, base64.b64encode(secret).decode(), identity), sorted(ours.keys() ^ theirs.keys())


def prompt_of(name: str) -> str:
    """The prompt in a file's name "{prompt}-{number}"; the name itself where there is no number."""
    return re.sub(r"-\d+$", "", name)


def damage(path: Path) -> str | None:
    """Why a browser cannot play this file, as far as its container tells; None when it is whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if path.suffix.lower() == ".webm":
            return None if head.startswith(EBML) else "is not a webm file"
        if head[4:8] != b"ftyp":
            return "is empty" if size == 0 else "is not an mp4 file"
        position, kinds = 0, set()
        while position < size:
            file.seek(position)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            elif length == 0:
                length = size - position
            kinds.add(kind)
            position += max(length, 8)
    if position != size or b"moov" not in kinds:
        return "is truncated"
    return None


def _videos(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder")
    files = sorted(samples_in(folder).iterdir())
    return {p.stem: p for p in files if p.suffix.lower() in MEDIA_TYPES and not p.name.startswith(".")}
