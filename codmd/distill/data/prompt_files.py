"""Files of prompts: one a line, or JSON, JSON lines, CSV, each read as what it is; with an image each, or without."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from codmd.distill.config.typed import ConfigError

KEY, IMAGE_KEY = "prompt", "image"
"""Of objects, and the columns of tables, that hold the prompts and the paths of their first frames."""
Entry = tuple[str, str, str]
"""Place in the file, prompt, path of the image or an empty text."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, see `read_pairs`."""
    return read_pairs(path)[0]


def read_pairs(path: Path) -> tuple[list[str], list[Path]]:
    """The prompts of a UTF-8 file and, where it has them, the image of every prompt.

    Text has one a line, and empty lines are skipped; only a newline ends a line. `.json` has a list of texts, or of
    objects with a "prompt"; `.jsonl` one of these a line; `.csv` and `.tsv` a column "prompt". Objects and tables may
    also have an "image": a path, relative to the file's folder.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or not what its suffix says, has no prompt or an impossible
            one, an image for some prompts only, or one that is not there; names the file and the place.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}: line {line} is not UTF-8; save the file in that encoding") from error
    prompts, images, without = list[str](), list[Path](), ""
    try:
        for place, prompt, image in FORMATS.get(path.suffix.lower(), _lines)(text):
            if stripped := _possible(place, prompt).strip():
                prompts.append(stripped)
                images += [_existing(place, path.parent / image)] if image else []
                without = without or ("" if image else place)
        if images and without:
            raise ValueError(f'{without} has no "{IMAGE_KEY}", others have; expected one for every prompt, or none')
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not prompts:
        raise ConfigError(f"{path}: has no prompts; expected one a line")
    return prompts, images


def _existing(place: str, image: Path) -> Path:
    if not image.is_file():
        raise ValueError(f"{place}: {image}: no such file")
    return image


def _possible(place: str, prompt: str) -> str:
    """The prompt, unless no text encoder and no file can hold it."""
    if "\0" in prompt:
        raise ValueError(f"{place} has a NUL character, which no text has")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} has half a character (a lone surrogate), {prompt[error.start]!r}") from error
    return prompt


def _lines(text: str) -> Iterator[Entry]:
    return ((f"line {number}", line, "") for number, line in enumerate(text.split("\n"), 1))


def _json(text: str) -> Iterator[Entry]:
    content = json.loads(text)
    if not isinstance(content, list):
        raise ValueError(f"holds {type(content).__name__}; expected a list of prompts")
    return _entries("entry", content)


def _json_lines(text: str) -> Iterator[Entry]:
    return _entries("line", (json.loads(line) if line.strip() else "" for line in text.split("\n")))


def _entries(kind: str, values: Iterable[Any]) -> Iterator[Entry]:
    for number, value in enumerate(values, 1):
        prompt, image = (value.get(KEY), value.get(IMAGE_KEY, "")) if isinstance(value, dict) else (value, "")
        if not isinstance(prompt, str):
            raise ValueError(f'{kind} {number}: got {value!r:.60}; expected a text, or an object with a "{KEY}"')
        if not isinstance(image, str):
            raise ValueError(f'{kind} {number}: "{IMAGE_KEY}": got {image!r:.60}; expected a path')
        yield f"{kind} {number}", prompt, image


def _table(delimiter: str) -> Callable[[str], Iterator[Entry]]:
    def rows(text: str) -> Iterator[Entry]:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        if KEY not in (reader.fieldnames or ()):
            raise ValueError(f'has no column "{KEY}"; its columns are {", ".join(reader.fieldnames or ())}')
        return ((f"line {reader.line_num}", row[KEY] or "", row.get(IMAGE_KEY) or "") for row in reader)

    return rows


FORMATS = {".json": _json, ".jsonl": _json_lines, ".csv": _table(","), ".tsv": _table("\t")}
"""Suffix to reader; any other file is text."""
