"""Pages that people read: explained where it stands, in the dark, on a phone, with films that play."""

from __future__ import annotations

import re
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
from chromium import browse, find_browser
from matplotlib.figure import Figure

from codmd import page
from codmd.demo.figures import curves
from codmd.inspect.clips import read_clip
from codmd.inspect.figures import from_zero_or_cut
from codmd.inspect.measures import measure
from codmd.inspect.pairs import compare
from codmd.inspect.report import Inspection, render, verdict


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A clip of H.264 and its reference, of which the clip is a frozen copy."""
    folder, measured = tmp_path_factory.mktemp("films"), []
    frames = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8).repeat(6, 0)
    moving = np.stack([np.roll(frame, 3 * i, 1) for i, frame in enumerate(frames)])
    for name, content in (("clip", frames), ("reference", moving)):
        imageio.imwrite(folder / f"{name}.mp4", content, fps=8, codec="libx264", macro_block_size=2)
        measured.append(measure(folder / f"{name}.mp4", read_clip(folder / f"{name}.mp4", None)))
    return compare(*measured)


def test_a_table_explains_its_columns_where_it_stands():
    text = page.table(("clip", "order"), [("a", "1")], meanings=[("order", 'the "order" of frames')])
    assert '<th title="the &quot;order&quot; of frames">order</th>' in text
    assert re.search(r"</table></div><details><summary>What these measures are</summary><dl><dt>order</dt>", text)
    assert "<details>" not in page.table(("clip",), [("a",)])


def test_a_clip_plays_beside_its_reference_and_the_verdict_is_a_sentence(pair):
    found = Inspection([pair.clip], [pair], [], {})
    said = verdict(found)
    assert said.startswith("0 of 1 clips look like their references to these measures, 1 differs visibly (1 frozen")
    assert said.count(".") == 1
    text = render(found, pictures=1)
    assert f'<p class="verdict">{said}</p>' in text
    assert text.index("verdict") < text.index("<h2>")
    captions = re.findall(
        r'<video src="data:video/mp4;base64,[^"]{100,}" controls[^>]*></video><figcaption>(\w+)<', text
    )
    assert captions == ["clip", "reference"]


def test_films_stop_where_a_page_would_grow_too_large(pair, monkeypatch):
    monkeypatch.setattr("codmd.inspect.report.MOST_FILM", 100)
    assert "<video" not in render(Inspection([pair.clip], [pair], [], {}), pictures=1)


@pytest.mark.parametrize(
    ("values", "low", "cut"), [((1.0, 4.0), 0, False), ((0.96, 0.99), 0.96, True), ((-0.2, 0.3), -0.2, False)]
)
def test_a_vertical_axis_begins_at_zero_or_is_marked_as_cut(values, low, cut):
    axis = Figure().subplots()
    axis.plot(values)
    from_zero_or_cut(axis)
    assert axis.get_ylim()[0] == pytest.approx(low, abs=0.03)
    assert ("cut" in [text.get_text() for text in axis.texts]) == cut


def test_a_term_that_is_off_is_no_line():
    outcome = SimpleNamespace(curves={"update": [1, 2], "relation_frame": [0.1, 0.2], "relation_batch": [0.0, 0.0]})
    figure = curves(SimpleNamespace(of=lambda arm: [outcome]))
    labels = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert labels == ["frames"]


@pytest.mark.skipif(find_browser() is None, reason="no Chromium")
def test_a_phone_and_the_dark_are_served(tmp_path, pair):
    (tmp_path / "report.html").write_text(render(Inspection([pair.clip], [pair], [], {}), 1), "utf-8")
    colours = {}
    with browse(find_browser(), tmp_path) as tab:
        for scheme in ("light", "dark"):
            tab._call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            tab._call("Emulation.setEmulatedMedia", features=media)
            tab.open(tmp_path / "report.html")
            assert tab.js("document.documentElement.scrollWidth") == 390
            assert tab.js("document.querySelector('figure img').getBoundingClientRect().width") >= 760
            colours[scheme] = tab.js("getComputedStyle(document.querySelector('main')).backgroundColor")
        tab.wait("[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
        assert tab.errors == []
    assert colours["light"] != colours["dark"]
