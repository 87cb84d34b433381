"""docs/architecture.md names files and symbols that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
PATH = re.compile(r"`((?:[\w.]+/)+[\w.]+\.(?:py|h|md))`((?:: (?:`[\w.]+`(?:, )?)+)?)")
NAMED = [
    (path, symbol) for path, symbols in PATH.findall(PAGE) for symbol in re.findall(r"`([\w.]+)`", symbols) or [""]
]


def defines(text: str, symbol: str) -> bool:
    """Whether ``text`` defines a function, class, struct, constant or field of that name."""
    return bool(re.search(rf"(\b(def|class|struct) {symbol}\b|^\s*{symbol}\b[^=\n(]*[:=]|\b{symbol}\()", text, re.M))


def test_the_page_names_enough_to_be_a_map():
    assert len(NAMED) > 20
    assert len(re.findall(r"^## ", PAGE, re.M)) == 5


@pytest.mark.parametrize("path, symbol", NAMED, ids=[f"{path}:{symbol}" for path, symbol in NAMED])
def test_what_the_page_names_is_there(path, symbol):
    assert (ROOT / path).is_file()
    assert not symbol or defines((ROOT / path).read_text(), symbol)


def test_a_missing_symbol_is_seen():
    assert not defines("def other(): ...", "symbol")


def test_the_rooms_of_the_table_exist():
    rooms = re.findall(r"`([\w/]+/)`", "".join(re.findall(r"^\| (.*?) \|", PAGE, re.M)))
    assert len(rooms) > 8
    for room in rooms:
        assert (ROOT / room).is_dir() or (ROOT / "codmd" / room).is_dir(), room


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)", PAGE))
def test_links_lead_somewhere(target):
    assert (ROOT / "docs" / target).exists()
