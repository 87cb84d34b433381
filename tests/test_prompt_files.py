"""Files of prompts: every kind read as what it is, only newlines end a line, and what cannot be is named."""

from __future__ import annotations

import json

import pytest

from codmd.distill.config.typed import ConfigError
from codmd.distill.data.prompt_files import read_prompts

ODD = "a fox\u2028runs\x85over\x0bthe\x0csnow\x1cand\x1don\x1e."
"""One prompt with every character that `str.splitlines` would cut it at."""


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_only_a_newline_ends_a_line(tmp_path):
    assert read_prompts(written(tmp_path, "p.txt", f"{ODD}\n\n  two boats \r\nlast")) == [ODD, "two boats", "last"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", json.dumps([ODD, "b, c"])),
        ("p.json", json.dumps([{"prompt": ODD, "seed": 1}, {"prompt": "b, c"}], indent=2)),
        ("p.jsonl", f"{json.dumps(ODD)}\n\n{json.dumps({'prompt': 'b, c'})}\n"),
        ("p.JSONL", f"{json.dumps(ODD)}\n{json.dumps('b, c')}"),
        ("p.csv", f'seed,prompt\n1,"{ODD}"\r\n2,"b, c"\n'),
        ("p.tsv", f"prompt\tseed\n{ODD}\t1\nb, c\t2\n"),
    ],
)
def test_a_file_of_another_kind_is_read_as_what_it_is(tmp_path, name, content):
    assert read_prompts(written(tmp_path, name, content)) == [ODD, "b, c"]


def test_a_quoted_cell_keeps_its_newline(tmp_path):
    assert read_prompts(written(tmp_path, "p.csv", 'prompt\n"one\ntwo"\n')) == ["one\ntwo"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "has no prompts"),
        ("p.txt", " \n\t\n", "has no prompts"),
        ("p.txt", "a\nb\0c\n", "line 2 has a NUL character"),
        ("p.txt", b"a\n\xed\xa0\x80\n", "line 2 is not UTF-8"),
        ("p.txt", "a".encode("utf-16"), "line 1 is not UTF-8"),
        ("p.json", r'["a", "\ud800 b"]', "entry 2 has half a character"),
        ("p.jsonl", '"a"\n"b', "Unterminated string"),
        ("p.json", '{"prompt": "a"}', "holds dict; expected a list"),
        ("p.json", "[" * 100_000, "recursion"),
        ("p.json", "[]", "has no prompts"),
        ("p.json", '["a", 3]', "entry 2: got 3; expected a text"),
        ("p.json", '[{"text": "a"}]', 'expected a text, or an object with a "prompt"'),
        ("p.jsonl", '"a"\n[1]\n', "line 2: got [1]"),
        ("p.csv", "text,seed\na,1\n", 'has no column "prompt"; its columns are text, seed'),
        ("p.csv", "", 'has no column "prompt"'),
        ("p.csv", 'prompt\n"a', "unexpected end of data"),
        ("p.csv", "prompt\n", "has no prompts"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_file_and_place(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(ConfigError) as error:
        read_prompts(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(ConfigError, match=rf"{path}: cannot be read"):
            read_prompts(path)
