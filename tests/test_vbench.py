"""`codmd vbench`: the published score from results files, and what it refuses."""

import json
import os

import pytest

from codmd import vbench
from codmd.cli import main

AVERAGES = {
    "subject_consistency": 0.96,
    "background_consistency": 0.97,
    "temporal_flickering": 0.99,
    "motion_smoothness": 0.98,
    "dynamic_degree": 0.75,
    "aesthetic_quality": 0.65,
    "imaging_quality": 0.68,
    "object_class": 0.88,
    "multiple_objects": 0.77,
    "human_action": 0.96,
    "color": 0.89,
    "spatial_relationship": 0.75,
    "scene": 0.45,
    "appearance_style": 0.22,
    "temporal_style": 0.24,
    "overall_consistency": 0.26,
}


def write_results(path, averages, videos=3):
    """A file as VBench writes it: {dimension: [average, one entry a video]}."""
    per_video = [{"video_path": f"v-{i}.mp4", "video_results": 0.5} for i in range(videos)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: [value, per_video] for name, value in averages.items()}))
    return path


def test_total_is_the_published_sum_worked_by_hand():
    quality = (
        (0.96 - 0.1462) / 0.8538
        + (0.97 - 0.2615) / 0.7385
        + (0.99 - 0.6293) / 0.3707
        + (0.98 - 0.706) / 0.2915
        + 0.5 * 0.75
        + 0.65
        + 0.68
    ) / 6.5
    semantic = (
        0.88 + 0.77 + 0.96 + 0.89 + 0.75 + 0.45 / 0.8222 + (0.22 - 0.0009) / 0.2846 + 0.24 / 0.364 + 0.26 / 0.364
    ) / 9
    result = vbench.score(AVERAGES)
    assert result.quality == pytest.approx(100 * quality)
    assert result.semantic == pytest.approx(100 * semantic)
    assert result.total == pytest.approx(100 * (4 * quality + semantic) / 5)
    assert result.dynamic_degree == pytest.approx(75)


@pytest.mark.parametrize(("end", "expected"), [("low", 0.0), ("high", 100.0)])
def test_the_ends_of_every_range_score_0_and_100(end, expected):
    result = vbench.score({name: getattr(d, end) for name, d in vbench.DIMENSIONS.items()})
    assert (result.quality, result.semantic, result.total) == pytest.approx((expected,) * 3)


@pytest.mark.parametrize("name", vbench.DIMENSIONS)
def test_one_dimension_moves_the_total_by_its_weight(name):
    dimension = vbench.DIMENSIONS[name]
    step = 0.01 if AVERAGES[name] < 0.5 else -0.01
    moved = vbench.score({**AVERAGES, name: AVERAGES[name] + step}).total - vbench.score(AVERAGES).total
    share = 4 / 5 / 6.5 if dimension.group == "quality" else 1 / 5 / 9
    half = 0.5 if name == "dynamic_degree" else 1
    assert moved == pytest.approx(100 * step * half * share / (dimension.high - dimension.low))


@pytest.mark.parametrize("removed", [["scene"], ["dynamic_degree", "color"]])
def test_missing_dimensions_are_refused_by_name(tmp_path, capsys, removed):
    path = write_results(tmp_path / "r.json", {k: v for k, v in AVERAGES.items() if k not in removed})
    assert main(["vbench", str(path), "--json", str(tmp_path / "scores.json")]) == 1
    captured = capsys.readouterr()
    assert str(path) in captured.err
    assert all(name in captured.err for name in removed)
    assert captured.out == ""
    assert not (tmp_path / "scores.json").exists()


def test_table_shows_own_and_published_totals_with_dynamic_degree_in_its_own_column(tmp_path, capsys):
    path = write_results(tmp_path / "student.json", AVERAGES)
    assert main(["vbench", str(path)]) == 0
    out = capsys.readouterr().out
    header, own, *_ = out.splitlines()
    result = vbench.score(AVERAGES)
    assert header.split("  ")[-1].strip() == "dynamic degree"
    values = (result.total, result.quality, result.semantic, result.dynamic_degree)
    assert own.split() == ["student.json", *(f"{v:.2f}" for v in values)]
    for published in ("84.46", "84.87", "83.38", "83.81", "82.81", "84.05", "83.69", "71.11", "86.11", "2606.21982"):
        assert published in out


def test_a_folder_is_one_model_with_a_file_for_each_dimension_and_spaces_in_names_count(tmp_path, capsys):
    for name, value in AVERAGES.items():
        write_results(tmp_path / "split" / f"{name}_eval_results.json", {name.replace("_", " "): value})
    (tmp_path / "split" / "all_full_info.json").write_text("[]")
    whole = write_results(tmp_path / "whole.json", AVERAGES)
    scores = tmp_path / "scores.json"
    assert main(["vbench", str(tmp_path / "split"), str(whole), "--json", str(scores), "--dimensions"]) == 0
    written = json.loads(scores.read_text())
    assert written["split"] == written["whole.json"]
    assert written["split"]["dimensions"] == AVERAGES
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("scene"))
    assert line.split() == ["scene", "45.00", "(54.73)", "45.00", "(54.73)"]


def test_files_of_one_folder_may_not_contradict_each_other(tmp_path, capsys):
    write_results(tmp_path / "a_eval_results.json", AVERAGES)
    write_results(tmp_path / "b_eval_results.json", {"scene": 0.46})
    assert main(["vbench", str(tmp_path)]) == 1
    assert "b_eval_results.json: scene is 0.46, another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        (b'{"scene": [0.4, "\xff"]}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
        ("\0", "not JSON"),
        ("[1, 2]", "holds a list"),
        ('{"scene": 0.4}', "'scene' is not [average, per video]"),
        ('{"scene": [true, []]}', "'scene' is not [average, per video]"),
        ('{"\\ud800\\u0000": [0.4, []]}', r"unknown dimensions: '\ud800\x00'"),
        ('{"scene": [1%s, []]}' % ("0" * 400), "'scene' has an integer too large"),
        ('{"scene": [1%s, []]}' % ("0" * 5000), "not JSON: Exceeds the limit"),
        (
            '{"scene": [0.4, []], "vividness": [0.4, []]}',
            "unknown dimensions: 'vividness' (VBench has subject_",
        ),
        ('{"temporal style": [0.1, []], "temporal_style": [0.2, []]}', "temporal_style is there twice, as 0.1 and 0.2"),
    ],
)
def test_bad_results_are_refused_with_the_file_and_the_reason(tmp_path, capsys, content, message):
    path = tmp_path / "r.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["vbench", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error


@pytest.mark.parametrize(
    ("name", "value"), [("overall_consistency", -0.013), ("subject_consistency", 1.0000001), ("appearance_style", -1.0)]
)
def test_cosines_may_be_negative_and_exceed_1_by_rounding(name, value):
    dimension = vbench.DIMENSIONS[name]
    moved = vbench.score({**AVERAGES, name: value}).total - vbench.score(AVERAGES).total
    share = 4 / 5 / 6.5 if dimension.group == "quality" else 1 / 5 / 9
    assert moved == pytest.approx(100 * share * (value - AVERAGES[name]) / (dimension.high - dimension.low))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("overall_consistency", 26.0, "got 26.0; expected a mean cosine, from -1 to 1"),
        ("temporal_style", -1.001, "got -1.001; expected a mean cosine, from -1 to 1"),
        ("scene", 45.0, "got 45.0; expected a share, from 0 to 1 and not in percent"),
        ("color", -0.013, "got -0.013; expected a share, from 0 to 1"),
        ("dynamic_degree", 1.0000001, "got 1.0000001; expected a share, from 0 to 1"),
        ("scene", float("nan"), "got nan; expected a share"),
        ("temporal_style", float("inf"), "got inf; expected a mean cosine"),
    ],
)
def test_averages_out_of_their_range_are_refused_with_what_they_should_be(tmp_path, capsys, name, value, expected):
    path = write_results(tmp_path / "r.json", {**AVERAGES, name: value})
    assert main(["vbench", str(path)]) == 1
    assert f"{path}: {name}: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "meant"),
    [("overal_consistency", "overall_consistency"), ("Colour", "color"), ("temporal flicker", "temporal_flickering")],
)
def test_a_misspelt_dimension_is_named_with_its_file_and_what_it_resembles(tmp_path, capsys, written, meant):
    averages = {written if name == meant else name: value for name, value in AVERAGES.items()}
    for name, value in averages.items():
        write_results(tmp_path / f"{name}_eval_results.json", {name: value})
    assert main(["vbench", str(tmp_path)]) == 1
    file = tmp_path / f"{written}_eval_results.json"
    name = written.replace(" ", "_")
    assert f"{file}: holds unknown dimensions: {name!r}, do you mean {meant}?" in capsys.readouterr().err


def test_every_bad_argument_is_named_in_one_go(tmp_path, capsys):
    good = write_results(tmp_path / "good.json", AVERAGES)
    (tmp_path / "empty").mkdir()
    assert main(["vbench", str(tmp_path / "absent.json"), str(good), str(tmp_path / "empty")]) == 1
    error = capsys.readouterr().err
    assert "absent.json: no such file" in error
    assert "empty: holds no VBench results" in error


def test_an_unwritable_place_for_the_scores_is_an_error_that_leaves_nothing(tmp_path, capsys):
    path = write_results(tmp_path / "r.json", AVERAGES)
    (tmp_path / "file").write_text("kept")
    assert main(["vbench", str(path), "--json", str(tmp_path / "file" / "scores.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["file", "r.json"]
