"""Hooks of the site: pages from the top of the repository, links that lead out of docs/, formulas as MathML."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "kernels/README.md": "kernels.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from outside."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites relative links; those to files that the site does not have become plain text."""
    source = {inside: outside for outside, inside in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    depth = page.file.src_uri.count("/")

    def rewritten(found: re.Match[str]) -> str:
        picture, text, path, anchor = found[1], found[2], found[3], found[4] or ""
        target = (ROOT / source).parent.joinpath(path).resolve().relative_to(ROOT).as_posix()
        inside = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inside is None:
            return text
        return f"{picture}[{text}]({'../' * depth}{inside}{anchor})"

    return LINK.sub(rewritten, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(drawn, content)
