"""Damaged files at the doors of `vbench`, `compare` and `sample`: an error of ours that names the file, or a result."""

import base64
import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codmd import vbench
from codmd.compare.command import table
from codmd.compare.tally import BadAnswers, read_ballots, tally
from codmd.mp4 import BadMovie, read_movie
from codmd.sample.names import recorded_prompts, vbench_jobs

RESULTS = {name: [round((d.low + d.high) / 2, 4), [{"video_path": "v-0.mp4"}]] for name, d in vbench.DIMENSIONS.items()}
KEY = {"a": "student", "b": "teacher", "left": {"cat-0": "a", "dog-0": "b"}}
ANSWERS = {
    "format": "codmd-compare-answers",
    "version": 1,
    "study": "0123",
    "key": base64.b64encode(json.dumps(KEY).encode()).decode(),
    "participant": "p",
    "exported": "2026-01-01T00:00:00Z",
    "answers": {"cat-0": {"quality": "left", "motion": "same"}, "dog-0": {"prompt": "right"}},
}
RECORD = {"sampler": "FewStep", "sigmas": [1.0, 0.5], "prompts": {"a cat": "a cat", "a _ 01234567": "a / b"}}
FULL_INFO = [{"prompt_en": "a cat", "dimension": ["scene"]}, {"prompt_en": "a dog", "dimension": ["color"]}]

TEXT = st.text(st.characters(), max_size=8)  # lone surrogates and NUL among them
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([10**400, -(10**400), 1e308])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


@st.composite
def replaced(draw, document):
    """A document with another value, or another name, somewhere in it."""
    document = copy.deepcopy(document)
    node = document
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or draw(st.booleans()):
            break
        node = node[key]
    if isinstance(node, dict) and draw(st.booleans()):
        node[draw(TEXT)] = node.pop(key)
    else:
        node[key] = draw(VALUES)
    return document


@st.composite
def files(draw, document):
    """Bytes like a document's: of another, of the same with a part replaced, cut or overwritten, or nested deeply."""
    kind = draw(st.sampled_from(["other", "replaced", "key", "cut", "overwritten", "nested", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=64))
    if kind == "nested":
        return (draw(st.sampled_from(["[", '{"a":', '{"key":['])) * draw(st.sampled_from([10, 2000, 100_000]))).encode()
    if kind == "other":
        return json.dumps(draw(VALUES)).encode()
    if kind == "replaced":
        return json.dumps(draw(replaced(document))).encode()
    if kind == "key" and "key" in document:
        secret = json.dumps(draw(replaced(KEY))).encode()
        return json.dumps({**document, "key": base64.b64encode(secret).decode()}).encode()
    whole = json.dumps(document).encode()
    start = draw(st.integers(0, len(whole)))
    if kind == "cut":
        return whole[:start]
    patch = draw(st.binary(max_size=6))
    return whole[:start] + patch + whole[start + len(patch) :]


def fuzz(document):
    """Runs a test on 200 files, the same every time."""

    def decorate(test):
        return settings(max_examples=200, deadline=None, derandomize=True, database=None)(
            given(content=files(document))(test)
        )

    return decorate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def outcome(read, *arguments, kind=ValueError):
    """(result, None) or (None, message of the error, which is of the documented kind)."""
    try:
        return read(*arguments), None
    except kind as error:
        return None, str(error)


@fuzz(RESULTS)
def test_vbench_results(folder, content):
    path = folder / "results.json"
    path.write_bytes(content)
    averages, message = outcome(vbench.read_results, path)
    if averages is None:
        assert str(path) in message
        return
    score, message = outcome(vbench.score, averages)
    if score is None:
        assert any(name in message for name in vbench.DIMENSIONS)
        return
    assert math.isfinite(score.total)
    vbench.table({"model": score}).encode()


@fuzz(ANSWERS)
def test_answers_of_a_comparison(folder, content):
    path = folder / "answers.json"
    path.write_bytes(content)
    ballots, message = outcome(read_ballots, [path], kind=BadAnswers)
    if ballots is None:
        assert str(path) in message
        return
    rates = tally(ballots)
    assert all(0 <= rate.low <= rate.rate <= rate.high <= 1 for rate in rates.values() if rate is not None)
    table(rates, ballots[0].names).encode()


@fuzz(RECORD)
def test_record_of_a_sample_folder(folder, content):
    path = folder / "sampling.json"
    path.write_bytes(content)
    prompts, message = outcome(recorded_prompts, folder)
    if prompts is None:
        assert str(path) in message
        return
    assert all(prompt.encode().decode() == prompt for prompt in prompts.values())


@fuzz(FULL_INFO)
def test_prompts_of_vbench(folder, content):
    path = folder / "VBench_full_info.json"
    path.write_bytes(content)
    jobs, message = outcome(vbench_jobs, path)
    if jobs is None:
        assert str(path) in message
        return
    assert all(len(f"{job.name}-00.mp4".encode()) <= 255 for job in jobs)


BOXES = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"elst", b"mvhd", b"mdhd", b"hdlr", b"stsd", b"stts"]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    boxes=st.recursive(
        st.tuples(st.sampled_from(BOXES), st.binary(max_size=32)),
        lambda inner: st.tuples(st.sampled_from(BOXES), st.lists(inner, max_size=4)),
        max_leaves=12,
    )
)
def test_index_of_a_movie(folder, boxes):
    def packed(box):
        kind, content = box
        content = content if isinstance(content, bytes) else b"".join(map(packed, content))
        return (len(content) + 8).to_bytes(4, "big") + kind + content

    path = folder / "movie.mp4"
    path.write_bytes(packed((b"ftyp", b"isom\0\0\0\0")) + packed((b"moov", [boxes])))
    movie, message = outcome(read_movie, path, kind=BadMovie)
    if movie is None:
        assert message in ("has no video track", "has a damaged index")
        return
    assert movie.shown >= 0
