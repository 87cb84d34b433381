"""The page of a study: one HTML file with its videos inside."""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path

from codmd.cli import CommandError

from . import FORMAT, QUESTIONS, VERSION
from .study import MEDIA_TYPES, Study

LARGEST = 300 * 2**20
"""Bytes of video that a browser still opens without trouble in one page."""


def render(study: Study) -> str:
    """The page as text; sides and folder names appear in it only inside the study's opaque key.

    Raises:
        CommandError: the videos are too large for one page.
    """
    size = sum(path.stat().st_size for pair in study.pairs for path in (pair.left, pair.right))
    if size > LARGEST:
        fitting = max(1, len(study.pairs) * LARGEST // size)
        raise CommandError(
            f"{len(study.pairs)} pairs hold {size / 2**20:.0f} MiB of video, more than the {LARGEST // 2**20} MiB of "
            f"one page; draw fewer with --pairs {fitting}"
        )
    description = {
        "format": FORMAT,
        "version": VERSION,
        "study": study.identity,
        "key": study.key,
        "questions": QUESTIONS,
        "pairs": [
            {"name": pair.name, "prompt": pair.prompt, "types": [_media_type(pair.left), _media_type(pair.right)]}
            for pair in study.pairs
        ],
    }
    videos = [
        f'<script type="text/plain" id="video-{number}-{side}">{base64.b64encode(path.read_bytes()).decode()}</script>'
        for number, pair in enumerate(study.pairs)
        for side, path in (("left", pair.left), ("right", pair.right))
    ]
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    before, _, rest = page.partition("<!--study-->")
    between, _, after = rest.partition("<!--videos-->")
    embedded = json.dumps(description).replace("<", "\\u003c")  # a prompt cannot close the script element
    parts = (before, f'<script type="application/json" id="study">{embedded}</script>', between, *videos, after)
    return "\n".join(parts)


def _media_type(path: Path) -> str:
    return MEDIA_TYPES[path.suffix.lower()]
