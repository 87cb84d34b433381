"""Self-contained HTML pages: one look, pictures embedded, no script and nothing fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence

STYLE = """
:root{color-scheme:light dark;--back:#f6f7f9;--page:#fff;--text:#202124;--soft:#5f6368;--line:#e8eaed;--mark:#fdf3f4;
--edge:#d1495b;--faint:#80868b}
@media(prefers-color-scheme:dark){:root{--back:#111315;--page:#1b1d20;--text:#e8eaed;--soft:#a9afb6;--line:#34383d;
--mark:#3a2328;--edge:#e0707f;--faint:#8b9199}}
body{margin:0;background:var(--back);color:var(--text);
font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;overflow-wrap:break-word}
main{max-width:1080px;margin:0 auto;padding:2.5rem 2rem 4rem;background:var(--page);box-shadow:0 0 24px #0001}
@media(max-width:700px){main{padding:1.2rem 1rem 3rem}h1{font-size:1.4rem!important}}
h1{font-size:1.8rem;margin:0 0 .5rem;line-height:1.25}
h2{font-size:1.2rem;margin:2.4rem 0 .6rem}h3{font-size:1rem;margin:1.6rem 0 .3rem}
.verdict{font-size:1.1rem;padding:.8rem 1.1rem;border-left:4px solid var(--edge);background:var(--mark);
margin:.8rem 0 1.4rem}
figure{margin:1rem 0}figcaption,.note,summary{color:var(--soft);font-size:.86rem}
.scroll{overflow-x:auto}
figure img{width:100%;min-width:760px;height:auto;background:#fff;border-radius:4px}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
td:first-child,th:first-child{text-align:left}
tr.strong td{background:var(--mark);font-weight:600}tr.faint td{color:var(--faint)}
.text td{text-align:left;vertical-align:top}.text th{text-align:left}
.text td:first-child{color:var(--soft);width:min(14rem,40%)}
dt{font-weight:600}dd{margin:0 0 .5rem;color:var(--soft)}
.beside{display:flex;flex-wrap:wrap;gap:1rem}
.beside figure{flex:1 1 260px;max-width:520px;margin:.4rem 0}
.beside video,.beside img{width:100%;min-width:0;border-radius:4px;background:#000}
"""


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>
{body}
</main></body></html>
"""


def figure(png: bytes, caption: str) -> str:
    """A picture embedded in the page, with its caption as alternative text."""
    image, text = base64.b64encode(png).decode(), html.escape(caption)
    picture = f'<img alt="{text}" src="data:image/png;base64,{image}">'
    return f'<figure><div class="scroll">{picture}</div><figcaption>{text}</figcaption></figure>'


def beside(films: Sequence[tuple[str, str, bytes]]) -> str:
    """Films that play beside each other, again and again: (caption, MIME type, content) of each."""
    parts = []
    for caption, kind, content in films:
        source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        film = f'<video src="{source}" controls autoplay loop muted playsinline></video>'
        if kind.startswith("image/"):
            film = f'<img src="{source}" alt="{html.escape(caption)}">'
        parts.append(f"<figure>{film}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="beside">{"".join(parts)}</div>'


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    row_class: Callable[[Sequence[str]], str] = lambda row: "",
    meanings: Sequence[tuple[str, str]] = (),
) -> str:
    """A table of text cells.

    Args:
        row_class: names a row's class: "", "strong" or "faint".
        meanings: titles of columns and what they mean: shown over the title, and to be opened under the table.
    """
    tips = dict(meanings)
    tip = {cell: f' title="{html.escape(tips[cell])}"' for cell in header if cell in tips}
    head = "".join(f"<th{tip.get(cell, '')}>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body += f'<tr class="{row_class(row)}">{cells}</tr>'
    under = f"<details><summary>What these measures are</summary>{definitions(meanings)}</details>" if meanings else ""
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>{under}'


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of running text, aligned left; no head where `header` is empty."""
    head = f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="text">{head}{body}</table></div>'


def definitions(terms: Sequence[tuple[str, str]]) -> str:
    """Terms and what they mean."""
    entries = (f"<dt>{html.escape(term)}</dt><dd>{html.escape(meaning)}.</dd>" for term, meaning in terms)
    return f"<dl>{''.join(entries)}</dl>"
