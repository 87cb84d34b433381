"""Self-contained HTML pages: one look, pictures embedded, no script and nothing fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence

STYLE = """
body{margin:0;background:#f6f7f9;color:#202124;font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.5rem 2rem 4rem;background:#fff;box-shadow:0 0 24px #0001}
h1{font-size:1.8rem;margin:0 0 .5rem}h2{font-size:1.2rem;margin:2.4rem 0 .6rem}h3{font-size:1rem;margin:1.6rem 0 .3rem}
.verdict{font-size:1.1rem;padding:.8rem 1.1rem;border-left:4px solid #d1495b;background:#fdf3f4;margin:.8rem 0 1.4rem}
figure{margin:1rem 0}figure img{width:100%;height:auto}figcaption,.note{color:#5f6368;font-size:.86rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .6rem;text-align:right;border-bottom:1px solid #e8eaed}
th{font-weight:600;color:#5f6368;vertical-align:bottom}td:first-child,th:first-child{text-align:left}
tr.strong td{background:#fdf3f4;font-weight:600}tr.faint td{color:#80868b}
.text td{text-align:left;vertical-align:top}.text th{text-align:left}
.text td:first-child{color:#5f6368;width:min(14rem,40%)}
dt{font-weight:600}dd{margin:0 0 .5rem;color:#5f6368}
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
    return f'<figure><img alt="{text}" src="data:image/png;base64,{image}"><figcaption>{text}</figcaption></figure>'


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    row_class: Callable[[Sequence[str]], str] = lambda row: "",
) -> str:
    """A table of text cells; `row_class` names a row's class: "", "strong" or "faint"."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body += f'<tr class="{row_class(row)}">{cells}</tr>'
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of running text, aligned left; no head where `header` is empty."""
    head = f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="text">{head}{body}</table>'


def definitions(terms: Sequence[tuple[str, str]]) -> str:
    """Terms and what they mean."""
    entries = (f"<dt>{html.escape(term)}</dt><dd>{html.escape(meaning)}.</dd>" for term, meaning in terms)
    return f"<dl>{''.join(entries)}</dl>"
