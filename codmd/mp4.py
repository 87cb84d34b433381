"""An mp4 file by its boxes (ISO/IEC 14496-12): whether it is whole, how it is coded, how many pictures it shows."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from pathlib import Path

LARGEST_INDEX, MOST_PICTURES = 2**26, 2**20
"""Bytes of the index and pictures of a track, beyond which a file is not what it says."""

DAMAGED = "has a damaged index"


class BadMovie(ValueError):
    """The file is not a whole mp4 with a video track; the message says why, without the path."""


@dataclass(frozen=True)
class Movie:
    """What the index of an mp4 file says of its first video track.

    Attributes:
        codec: four characters, say "avc1" for H.264 or "mp4v" for MPEG-4 Part 2.
        shown: pictures that a player shows. A cut without encoding (`ffmpeg -ss ... -c copy`) keeps those from the
            key frame before the cut on, and an edit list that leaves them out.
    """

    codec: str
    shown: int


def read_movie(path: Path) -> Movie:
    """Reads the index of an mp4 file; the pictures themselves are not decoded.

    Raises:
        BadMovie: it is empty, no mp4, truncated, without a video track, or its index is damaged.
        OSError: it cannot be read.
    """
    index = _index(path)
    try:
        movie = dict(_boxes(index))
        for kind, content in _boxes(index):
            track = dict(_boxes(content)) if kind == b"trak" else {}
            media = dict(_boxes(track.get(b"mdia", b"")))
            if media.get(b"hdlr", b"")[8:12] == b"vide":
                table = dict(_boxes(dict(_boxes(media[b"minf"]))[b"stbl"]))
                codec = table[b"stsd"][12:16].decode("ascii")
                edits = dict(_boxes(track.get(b"edts", b""))).get(b"elst")
                times = _times(table)
                if edits is None:
                    return Movie(codec, len(times))
                return Movie(codec, _shown(times, edits, _timescale(media[b"mdhd"]) / _timescale(movie[b"mvhd"])))
    except (KeyError, struct.error, UnicodeDecodeError, ZeroDivisionError) as error:
        raise BadMovie(DAMAGED) from error
    raise BadMovie("has no video track")


def _index(path: Path) -> bytes:
    """The content of the box "moov", once every box of the file is known to end inside it."""
    size, index, position = path.stat().st_size, None, 0
    with path.open("rb") as file:
        if file.read(12)[4:8] != b"ftyp":
            raise BadMovie("is empty" if size == 0 else "is not an mp4 file")
        while position < size:
            file.seek(position)
            header = file.read(16)
            length, kind, start = int.from_bytes(header[:4], "big"), header[4:8], 8
            if length == 1:
                length, start = int.from_bytes(header[8:16], "big"), 16
            elif length == 0:
                length = size - position
            if kind == b"moov" and length <= LARGEST_INDEX:
                file.seek(position + start)
                index = file.read(max(0, length - start))
            position += max(length, 8)
    if position != size or index is None:
        raise BadMovie("is truncated")
    return index


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of every box in the content of another."""
    position = 0
    while position < len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        if not 8 <= length <= len(content) - position:
            raise BadMovie(DAMAGED)
        yield kind, content[position + 8 : position + length]
        position += length


def _timescale(header: bytes) -> int:
    """Units a second, of "mvhd" or "mdhd"."""
    return int(struct.unpack_from(">I", header, 20 if header[:1] == b"\1" else 12)[0])


def _runs(table: bytes) -> list[int]:
    """The values of "stts" or "ctts", which are stored as (count, value)."""
    runs = [struct.unpack_from(">Ii", table, 8 + 8 * i) for i in range(struct.unpack_from(">I", table, 4)[0])]
    if sum(count for count, _ in runs) > MOST_PICTURES:
        raise BadMovie(DAMAGED)
    return list(chain.from_iterable(repeat(value, count) for count, value in runs))


def _times(table: dict[bytes, bytes]) -> list[int]:
    """When each picture is shown, in units of the track, before any edit."""
    durations = _runs(table[b"stts"])
    decoded = list(accumulate(durations, initial=0))[:-1]
    if b"ctts" not in table:
        return decoded
    return [time + delay for time, delay in zip(decoded, _runs(table[b"ctts"]), strict=False)]


def _shown(times: list[int], edits: bytes, units: float) -> int:
    """Pictures inside the edits; `units` of the track are one of the movie, in which the edits' durations are given."""
    layout, size = (">QqI", 20) if edits[:1] == b"\1" else (">IiI", 12)
    count = 0
    for i in range(struct.unpack_from(">I", edits, 4)[0]):
        duration, start, _ = struct.unpack_from(layout, edits, 8 + size * i)
        if start >= 0:  # -1 is a pause
            count += sum(start <= time < start + duration * units for time in times)
    return count
