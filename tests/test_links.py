"""Links between the Markdown pages lead to files and headings that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels/README.md"]
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def links(text: str) -> list[tuple[str, str]]:
    """(path, anchor) of every relative link outside of code."""
    prose = re.sub(r"^ *```.*?^ *```|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)
    return LINK.findall(prose)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, anchor in links(page.read_text("utf-8")):
        target = page if not path else page.parent / path
        assert target.exists(), f"{path} of {page}"
        assert not anchor or anchor in anchors(target.read_text("utf-8")), f"{path}#{anchor} of {page}"


def test_a_broken_link_is_seen():
    assert links("see [a](b.md#c-d), [e](https://f.org) and `[g](h)`") == [("b.md", "c-d")]
    assert anchors("# A `b`: c\n```\n# no heading\n```\n") == {"a-b-c"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_code_and_formulas_in_lists_are_indented_as_the_site_needs(page):
    assert not re.search(r"^ {1,3}(\||```|\$\$)", page.read_text("utf-8"), re.MULTILINE)


def test_formulas_are_drawn_without_a_script():
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    drawn = hooks.on_page_content('<p>a <span class="arithmatex">\\(x_0 &lt; 1\\)</span></p>')
    assert "<msub><mi>x</mi><mn>0</mn></msub>" in drawn
    assert "arithmatex" not in drawn
