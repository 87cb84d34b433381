"""`codmd compare`: the study's sides and pairs, its page in a real browser, and the tally of its answers."""

import base64
import errno
import json
import math
import os
import random
import re
from pathlib import Path

import pytest
import tiny_wan
from chromium import browse, find_browser
from clips import encode, pan

from codmd.cli import main
from codmd.compare.study import make_study, unplayable
from codmd.compare.tally import Vote, wilson, win_rate
from codmd.sample.names import jobs_of, without_seed

NAMES = ["a cup of coffee-0", "a <b>cat<!-- & <script> dog-0", "rocket-0", "portrait-1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of four videos each with the same names; those of "student" are shorter in time."""
    root = tmp_path_factory.mktemp("study")
    for name, photo in zip(NAMES, ("coffee", "chelsea", "rocket", "astronaut"), strict=True):
        encode(root / "teacher" / f"{name}.mp4", pan(photo, 2, 1, frames=8, width=128, height=96))
        encode(root / "student" / f"{name}.mp4", pan(photo, 0, 0, frames=6, width=128, height=96))
    return root / "teacher", root / "student"


def key_of(page):
    return json.loads(base64.b64decode(study_of(page)["key"]))


def study_of(page):
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', page, re.S)[1])


def make_page(folders, out, *options):
    assert main(["compare", *map(str, folders), "--out", str(out), *options]) == 0
    return out.read_text("utf-8")


# The study


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_sides_balance_for_every_seed_and_change_with_it(tmp_path, folders, count):
    source = next(folders[0].iterdir())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(count):
            (tmp_path / folder / f"v-{i}.mp4").symlink_to(source)
    sides = []
    for seed in range(20):
        study, _ = make_study(tmp_path / "a", tmp_path / "b", seed, None, {})
        left = [pair.left.parent.name == "a" for pair in study.pairs]
        assert abs(2 * sum(left) - count) == count % 2
        sides.append((tuple(left), tuple(pair.name for pair in study.pairs)))
    assert len(set(sides)) > (1 if count < 3 else 15)


def test_a_seed_gives_the_same_page_and_another_one_another(folders, tmp_path):
    first, again, other = (make_page(folders, tmp_path / "p.html", "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert study_of(first)["study"] != study_of(other)["study"]


def test_page_is_self_contained_and_blind_and_holds_every_video_on_its_side(folders, tmp_path):
    page = make_page(folders, tmp_path / "p.html")
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert "teacher" not in page
    assert "student" not in page
    study, key = study_of(page), key_of(page)
    assert (key["a"], key["b"]) == ("teacher", "student")
    for number, pair in enumerate(study["pairs"]):
        for side in ("left", "right"):
            is_a = (key["left"][pair["name"]] == "a") == (side == "left")
            embedded = re.search(f'id="video-{number}-{side}">([^<]*)<', page)[1]
            path = folders[0 if is_a else 1] / f"{pair['name']}.mp4"
            assert base64.b64decode(embedded) == path.read_bytes()


def test_prompts_come_from_the_names_or_from_a_file(folders, tmp_path):
    assert without_seed("a cat-12") == "a cat"
    assert without_seed("twenty-one") == "twenty-one"
    (tmp_path / "prompts.json").write_text(json.dumps({"rocket-0": "A rocket at dawn"}))
    page = make_page(folders, tmp_path / "p.html", "--prompts", str(tmp_path / "prompts.json"))
    prompts = {pair["name"]: pair["prompt"] for pair in study_of(page)["pairs"]}
    assert prompts["rocket-0"] == "A rocket at dawn"
    assert prompts["portrait-1"] == "portrait"


LONG = "A very long prompt of a black leather sofa, <b>seen</b> from above & at dusk, " * 3


def sampled(root, prompts, source, keep=True):
    """A folder as `codmd sample` writes it, with two seeds of every prompt."""
    jobs = jobs_of(prompts, range(2))
    (root / "videos").mkdir(parents=True)
    for job in jobs:
        for seed in job.seeds:
            (root / "videos" / f"{job.name}-{seed}.mp4").symlink_to(source)
    record = {"steps": 4, **({"prompts": {job.name: job.prompt for job in jobs}} if keep else {})}
    (root / "sampling.json").write_text(json.dumps(record, ensure_ascii=False), "utf-8")
    return root


@pytest.mark.parametrize("inside", ["", "videos"])
def test_people_read_the_whole_prompt_that_codmd_sample_recorded(folders, tmp_path, inside):
    prompts, source = [LONG, "A cat / a dog", "short"], folders[0] / "rocket-0.mp4"
    pair = [sampled(tmp_path / name, prompts, source, keep) / inside for name, keep in (("a", True), ("b", False))]
    page = make_page(pair, tmp_path / "p.html")
    shown = {pair["name"]: pair["prompt"] for pair in study_of(page)["pairs"]}
    assert sorted(shown.values()) == sorted(2 * prompts)
    assert not any(LONG in name for name in shown)
    assert LONG not in page  # "<b>" in it cannot become an element


def test_people_read_the_whole_prompt_of_what_codmd_sample_made(tmp_path):
    pipeline = tiny_wan.write_pipeline(tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text(f"{LONG.strip()}\na cat\n")
    size = ["--frames", "9", "--height", "32", "--width", "48", "--prompts", str(tmp_path / "prompts.txt")]
    for name, sigmas in (("a", "1,0.5"), ("b", "1,0.7")):
        assert main(["sample", str(pipeline), "--out", str(tmp_path / name), "--sigmas", sigmas, *size]) == 0
    page = make_page((tmp_path / "a", tmp_path / "b"), tmp_path / "p.html")
    assert {pair["prompt"] for pair in study_of(page)["pairs"]} == {LONG.strip(), "a cat"}


def test_two_prompts_of_one_video_are_refused_unless_people_are_told_which(folders, tmp_path, capsys):
    source = folders[0] / "rocket-0.mp4"
    pair = [sampled(tmp_path / name, ["cat"], source) for name in ("a", "b")]
    (pair[1] / "sampling.json").write_text(json.dumps({"prompts": {"cat": "a cat, in detail"}}))
    assert main(["compare", *map(str, pair), "--out", str(tmp_path / "p.html")]) == 1
    assert "from the prompt 'cat', the other from 'a cat, in detail'; say with --prompts" in capsys.readouterr().err
    (tmp_path / "prompts.json").write_text(json.dumps({"cat-0": "a cat", "cat-1": "a cat"}))
    page = make_page(pair, tmp_path / "p.html", "--prompts", str(tmp_path / "prompts.json"))
    assert {pair["prompt"] for pair in study_of(page)["pairs"]} == {"a cat"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("", "is empty"),
        ("[" * 100_000, "not JSON"),
        ("[]", "holds a list"),
        ('{"prompts": 3}', "prompts: expected"),
        ('{"prompts": {"cat": "\\ud800"}}', "prompts: expected {name: prompt}, prompts without NUL or lone surrogates"),
        ('{"prompts": {"cat": "a\\u0000"}}', "prompts: expected"),
    ],
)
def test_a_record_of_samples_that_is_none_is_named(folders, tmp_path, capsys, record, message):
    pair = [sampled(tmp_path / name, ["cat"], folders[0] / "rocket-0.mp4") for name in ("a", "b")]
    (pair[1] / "sampling.json").write_text(record)
    assert main(["compare", *map(str, pair), "--out", str(tmp_path / "p.html")]) == 1
    assert f"{pair[1] / 'sampling.json'}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_pairs_draws_that_many_by_the_seed(folders, tmp_path):
    drawn = {
        tuple(pair["name"] for pair in study_of(make_page(folders, tmp_path / "p.html", *options))["pairs"])
        for options in (["--pairs", "2", "--seed", str(seed)] for seed in range(8))
    }
    assert all(len(names) == 2 for names in drawn)
    assert len(drawn) > 3


# Bad input


def test_folders_without_common_names_and_missing_folders_are_errors_that_write_nothing(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "p.html"
    assert main(["compare", str(folders[0]), str(tmp_path / "empty"), "--out", str(out)]) == 1
    assert "no video of the same name; found 4 and 0" in capsys.readouterr().err
    assert main(["compare", str(folders[0]), str(tmp_path / "absent"), "--out", str(out)]) == 1
    assert "absent: no such folder" in capsys.readouterr().err
    assert main(["compare", str(folders[0]), str(folders[0]), "--out", str(out)]) == 1
    assert "the same path is given twice" in capsys.readouterr().err
    assert main(["compare", str(folders[0]), "--out", str(out)]) == 1
    assert "expected two" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["empty"]


def test_damaged_videos_are_all_named(folders, tmp_path, capsys):
    source = (folders[0] / "rocket-0.mp4").read_bytes()
    broken = {"empty": b"", "text": b"not a video at all", "cut": source[: len(source) // 2], "tail": source[:-40]}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, content in {**broken, "whole": source}.items():
            (tmp_path / folder / f"{name}.mp4").write_bytes(content if folder == "a" else source)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "p.html")]) == 1
    error = capsys.readouterr().err
    assert all(f"{tmp_path / 'a' / name}.mp4: is" in error for name in broken)
    assert "whole" not in error
    assert unplayable(folders[0] / "rocket-0.mp4") is None
    assert "ffmpeg" not in error
    assert not (tmp_path / "p.html").exists()


def test_videos_that_no_browser_plays_are_named_with_what_to_do(folders, tmp_path, capsys):
    frames = pan("rocket", 0, 0, frames=6, width=128, height=96)
    for name in ("a-0", "b-0"):
        encode(tmp_path / "old" / f"{name}.mp4", frames, codec="mpeg4")
        encode(tmp_path / "new" / f"{name}.mp4", frames, codec="libx265" if name == "b-0" else "libx264")
    out = tmp_path / "p.html"
    assert main(["compare", str(tmp_path / "new"), str(tmp_path / "old"), "--out", str(out)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines[1:3]) == [
        f"  {tmp_path / 'old' / name}.mp4: is coded as mp4v, which no browser plays" for name in ("a-0", "b-0")
    ]
    assert lines[3:] == ["  encode again what no browser plays: ffmpeg -i IN.mp4 -c:v libx264 -pix_fmt yuv420p OUT.mp4"]
    assert not out.exists()


def test_a_container_without_a_video_is_named(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x-0.mp4").write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x08moov")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "p.html")]) == 1
    assert "x-0.mp4: has no video track" in capsys.readouterr().err


def test_videos_in_one_folder_only_are_named_and_left_out(folders, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "rocket-0.mp4").symlink_to(folders[1] / "rocket-0.mp4")
    page = make_page((folders[0], tmp_path / "b"), tmp_path / "p.html")
    assert [pair["name"] for pair in study_of(page)["pairs"]] == ["rocket-0"]
    assert "portrait-1" in capsys.readouterr().err


def test_a_page_too_large_for_a_browser_is_refused_with_a_number_that_fits(folders, tmp_path, capsys, monkeypatch):
    size = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    monkeypatch.setattr("codmd.compare.render.LARGEST", size // 2)
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "p.html")]) == 1
    assert re.search(r"draw fewer with --pairs [12]\b", capsys.readouterr().err)


def test_a_full_disk_is_an_error_that_leaves_nothing(folders, tmp_path, capsys, monkeypatch):
    def full(path, *_):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "p.html")]) == 1
    assert "p.html: cannot be written: No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"rocket-0": 3}', '{"rocket-0": "\\ud800"}', '{"rocket-0": "\\u0000"}', "[" * 100_000]
)
def test_prompts_that_are_no_object_of_texts_are_refused(folders, tmp_path, capsys, content):
    (tmp_path / "prompts.json").write_text(content)
    options = ["--prompts", str(tmp_path / "prompts.json"), "--out", str(tmp_path / "p.html")]
    assert main(["compare", *map(str, folders), *options]) == 1
    assert "prompts.json:" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


# The page in a browser


@pytest.fixture
def page(folders, tmp_path):
    """The study's page, open in a headless browser."""
    if (browser := find_browser()) is None:
        pytest.skip("no Chromium on PATH and none named by CHROMIUM")
    make_page(folders, tmp_path / "study.html", "--seed", "3")
    with browse(browser, tmp_path) as tab:
        tab.open(tmp_path / "study.html")
        yield tab
        assert tab.errors == []


def pressed(page):
    """The answers shown as chosen, by question."""
    chosen = "[...document.querySelectorAll('.choices button[aria-pressed=true]')]"
    buttons = page.js(f"{chosen}.map(button => [button.closest('.question').id, button.value])")
    return {question.removeprefix("question-"): choice for question, choice in buttons}


def export(page):
    page.press("e")
    name, text = page.downloaded()
    content = json.loads(text)
    assert name == f"answers-{content['study']}-{content['participant']}.json"
    return content


def test_both_videos_play_and_the_prompt_is_shown_as_text(page):
    for side in ("left", "right"):
        page.wait(f"{side}.readyState >= 2 && {side}.videoWidth === 128 && {side}.currentTime > 0")
    shown = set()
    for _ in NAMES:
        shown.add(page.js("document.getElementById('prompt').textContent"))
        page.press("ArrowLeft", "ArrowLeft", "ArrowLeft", "Enter")
    assert shown == {without_seed(name) for name in NAMES}


def test_videos_start_again_together_when_both_have_ended(page):
    page.wait("left.ended || right.ended")
    page.wait("!left.ended && !right.ended && left.currentTime < 0.4 && right.currentTime < 0.4")


def test_votes_by_keyboard_are_recorded_exported_and_tallied(page, tmp_path, capsys):
    study = page.js("study")
    key = json.loads(base64.b64decode(study["key"]))
    for pair in study["pairs"]:  # quality: always A (the teacher); motion: always left; prompt: no difference
        teacher = "ArrowLeft" if key["left"][pair["name"]] == "a" else "ArrowRight"
        page.press(teacher, "ArrowLeft", "ArrowDown")
        expected = {"quality": teacher.removeprefix("Arrow").lower(), "motion": "left", "prompt": "same"}
        assert pressed(page) == expected
        page.press("Enter")
    assert page.js("!document.getElementById('finished').hidden && document.getElementById('pair').hidden")
    content = export(page)
    assert content["answers"].keys() == set(NAMES)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(content))
    assert main(["compare", "--tally", str(path), "--out", str(tmp_path / "tally.png")]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert rows["quality"][1:6] == ["4", "0", "0", "100.0", "%"]
    assert rows["motion"][1:6] == ["2", "0", "2", "50.0", "%"]  # as the sides balance
    assert rows["prompt"][1:6] == ["0", "4", "0", "50.0", "%"]
    assert (tmp_path / "tally.png").read_bytes().startswith(b"\x89PNG")


def test_reload_keeps_answers_place_and_participant(page):
    page.press("ArrowLeft", "ArrowDown", "ArrowRight", "Enter", "ArrowRight")
    before = export(page)
    page.reload()
    assert page.js("document.getElementById('count').textContent") == "Pair 2 of 4"
    assert pressed(page) == {"quality": "right"}
    after = export(page)
    assert {**after, "exported": None} == {**before, "exported": None}
    page.press("Backspace")
    assert pressed(page) == {"quality": "left", "motion": "same", "prompt": "right"}


def test_an_answer_can_be_changed_and_a_pair_is_left_only_when_complete(page):
    page.press("ArrowLeft", "Enter")
    assert page.js("document.getElementById('count').textContent") == "Pair 1 of 4"
    assert "answer all three" in page.js("document.getElementById('status').textContent")
    page.press("ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowRight")
    assert pressed(page) == {"quality": "right", "motion": "left", "prompt": "left"}
    page.press("Enter")
    assert page.js("document.getElementById('count').textContent") == "Pair 2 of 4"


def test_the_mouse_does_what_the_keys_do_and_leaves_enter_free(page):
    for question, choice in (("quality", "left"), ("motion", "same"), ("prompt", "right")):
        page.click(f"#question-{question} button[value={choice}]")
    assert pressed(page) == {"quality": "left", "motion": "same", "prompt": "right"}
    page.press("Enter")
    assert page.js("document.getElementById('count').textContent") == "Pair 2 of 4"
    page.click("#export")
    assert len(json.loads(page.downloaded()[1])["answers"]) == 1


def test_no_button_moves_when_a_video_has_loaded(page):
    places = "JSON.stringify([...document.querySelectorAll('button')].map(b => b.getBoundingClientRect()))"
    page.wait("left.readyState > 0 && right.readyState > 0")
    loaded = page.js(places)
    page.js("for (const video of sides) { video.removeAttribute('src'); video.load() }")
    page.wait("left.readyState === 0 && right.readyState === 0")
    assert page.js(places) == loaded


def test_buttons_are_reached_and_pressed_by_tab_and_enter(page):
    page.press("Tab")
    assert page.js("document.activeElement.value") == "left"
    page.press("Tab", "Enter")
    assert pressed(page) == {"quality": "same"}
    assert page.js("document.getElementById('count').textContent") == "Pair 1 of 4"


def test_a_browser_that_keeps_nothing_says_so(page, tmp_path):
    page.js("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
    page.press("ArrowLeft")
    assert "QuotaExceededError" in page.js("document.getElementById('warning').textContent")
    assert page.js("!document.getElementById('warning').hidden")
    assert list(export(page)["answers"].values()) == [{"quality": "left"}]


def test_a_video_that_cannot_be_played_is_said_and_can_be_passed(page):
    page.js("left.src = 'data:video/mp4;base64,AAAA'")
    page.wait("document.getElementById('status').textContent.includes('left video cannot be played')")
    page.press("Enter")
    assert page.js("document.getElementById('count').textContent") == "Pair 2 of 4"


# The tally


def ballot(path, answers, participant="p", exported="2026-01-01", study="s", left=None, names=("A", "B"), **changes):
    left = left or dict.fromkeys(answers, "a")
    key = base64.b64encode(json.dumps({"a": names[0], "b": names[1], "left": left}).encode()).decode()
    content = {
        "format": "codmd-compare-answers",
        "version": 1,
        "study": study,
        "key": key,
        "participant": participant,
        "exported": exported,
        "answers": answers,
    }
    path.write_text(json.dumps({**content, **changes}))
    return str(path)


def tallied(capsys, tmp_path, *paths):
    assert main(["compare", "--tally", *paths, "--out", str(tmp_path / "t.png")]) == 0
    rows = (line.split() for line in capsys.readouterr().out.splitlines())
    return {row[0]: list(map(int, row[1:4])) for row in rows if row and row[0] in ("quality", "motion", "prompt")}


def test_sides_are_undone_by_the_key(tmp_path, capsys):
    answers = {"x": {"quality": "left"}, "y": {"quality": "left"}, "z": {"quality": "right"}}
    path = ballot(tmp_path / "1.json", answers, left={"x": "a", "y": "b", "z": "b"})
    assert tallied(capsys, tmp_path, path)["quality"] == [2, 0, 1]


def test_the_latest_export_of_a_participant_counts_once_and_others_add(tmp_path, capsys):
    early = ballot(tmp_path / "1.json", {"x": {"quality": "left"}}, exported="2026-01-01")
    late = ballot(tmp_path / "2.json", {"x": {"quality": "right"}, "y": {"quality": "left"}}, exported="2026-01-02")
    other = ballot(tmp_path / "3.json", {"x": {"quality": "left"}}, participant="q")
    assert tallied(capsys, tmp_path, late, early, other)["quality"] == [2, 0, 1]


def test_wilson_interval_is_the_textbook_one():
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)


def test_interval_of_independent_votes_is_wilsons_and_copies_of_votes_do_not_narrow_it():
    votes = [Vote(f"p{i}", "quality", float(i < 14)) for i in range(20)]
    single = win_rate(votes)
    assert (single.wins, single.same, single.losses, single.rate) == (14, 0, 6, 0.7)
    assert (single.low, single.high) == pytest.approx(wilson(0.7, 19))  # the variance's n / (n - 1)
    copied = win_rate(votes * 8)
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high))


def test_interval_covers_the_truth_about_95_times_in_100_though_votes_of_a_pair_agree():
    draw, covered, runs = random.Random(0), 0, 600
    for _ in range(runs):
        votes = []
        for pair in range(40):
            taste = draw.betavariate(1.2, 0.8)  # mean 0.6
            votes += [Vote(str(pair), "quality", float(draw.random() < taste)) for _ in range(5)]
        rate = win_rate(votes)
        covered += rate.low <= 0.6 <= rate.high
    assert covered / runs == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / runs) + 0.01)


def test_unanimous_votes_on_few_pairs_leave_a_wide_interval():
    rate = win_rate([Vote(pair, "quality", 1.0) for pair in ("x", "y", "z") for _ in range(20)])
    assert (rate.low, rate.high) == pytest.approx(wilson(1.0, 3))
    alone = win_rate([Vote("x", "quality", score) for score in (1.0, 1.0, 0.0, 1.0)])
    assert (alone.low, alone.high) == pytest.approx(wilson(0.75, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not an export"),
        ({"version": 2}, "has version 2; expected 1"),
        ({"key": "!"}, "is damaged"),
        ({"key": 5}, "is damaged"),
        ({"key": base64.b64encode(b"[" * 100_000).decode()}, "is damaged"),
        ({"names": ("A", "\ud800")}, "is damaged"),
        ({"names": ("A", ["B"])}, "is damaged"),
        ({"participant": {"a": 1}}, "is damaged"),
        ({"answers": {"x": {"quality": "up"}}}, "unknown answer 'up'"),
        ({"answers": {"unknown": {"quality": "left"}}}, "is damaged: KeyError('unknown')"),
        ({"answers": []}, "is damaged"),
    ],
)
def test_bad_answers_are_refused_with_the_file_and_the_reason(tmp_path, capsys, changes, message):
    path = ballot(tmp_path / "1.json", **{"answers": {"x": {"quality": "left"}}, "left": {"x": "a"}, **changes})
    assert main(["compare", "--tally", path, "--out", str(tmp_path / "t.png")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert path in error
    assert not (tmp_path / "t.png").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"format": "\xff"}', b"\0"])
def test_answers_that_are_no_json_are_refused_with_the_file(tmp_path, capsys, content):
    (tmp_path / "1.json").write_bytes(content)
    assert main(["compare", "--tally", str(tmp_path / "1.json"), "--out", str(tmp_path / "t.png")]) == 1
    assert f"{tmp_path / '1.json'}: cannot be read" in capsys.readouterr().err


def test_names_with_signs_of_mathematics_are_written_as_they_are(tmp_path, capsys):
    names = ("cost_$5_{$x", r"\frac{1}$a_b$^")
    path = ballot(tmp_path / "1.json", {"x": {"quality": "left"}}, names=names)
    assert main(["compare", "--tally", path, "--out", str(tmp_path / "t.png")]) == 0
    assert f"{names[0]} against {names[1]}: 1 participant(s)" in capsys.readouterr().out
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_whose_name_is_not_utf8_makes_a_study_that_can_be_tallied(folders, tmp_path):
    odd = tmp_path / os.fsdecode(b"run\xff")
    odd.symlink_to(folders[0])
    page = make_page((odd, folders[1]), tmp_path / "p.html")
    assert key_of(page)["a"] == "run?"


def test_answers_to_different_comparisons_are_not_mixed(tmp_path, capsys):
    first = ballot(tmp_path / "1.json", {"x": {"quality": "left"}})
    second = ballot(tmp_path / "2.json", {"x": {"quality": "left"}}, names=("A", "C"))
    assert main(["compare", "--tally", first, second]) == 1
    assert "compares A with B" in (error := capsys.readouterr().err)
    assert "compares A with C" in error


def test_empty_and_missing_answers_are_errors(tmp_path, capsys):
    assert main(["compare", "--tally", ballot(tmp_path / "1.json", {})]) == 1
    assert "hold no answer yet" in capsys.readouterr().err
    assert main(["compare", "--tally", str(tmp_path / "absent.json")]) == 1
    assert "absent.json: cannot be read" in capsys.readouterr().err
