"""The comparison of recipes: equal cost, runs that continue bit for bit, and pages that say what the numbers say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.comparison import __main__ as command
from benchmarks.comparison import page, textures, toy
from benchmarks.comparison.arms import ARMS, arms_of, forwards_per_update, updates_of
from benchmarks.comparison.study import difference, differences
from benchmarks.comparison.toy import COLUMNS
from codmd.demo.arc import ArcVideo
from codmd.demo.pool import run_jobs
from codmd.models.toy import ToyDenoiser


@pytest.fixture(autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outcome(arm, seed, **values):
    metrics = {measure: 1.0 if column.best is None else column.best for measure, column in COLUMNS.items()}
    return {"arm": arm, "seed": seed, "updates": 8, "metrics": {**metrics, **values}, "curve": [metrics, metrics],
            "scenes": [0],
            "paths": [[[0.0, 0.0]] * 8]}  # fmt: skip


# Equal cost


def test_arms_of_dearer_updates_make_fewer():
    dmd, diverse, one = (updates_of(ARMS[arm], toy.BASE, 400) for arm in ("dmd", "diversity", "dmd_1"))
    assert dmd == updates_of(ARMS["codmd"], toy.BASE, 400) == 400
    assert diverse < dmd < one
    budget = 400 * forwards_per_update(ARMS["dmd"].recipe(toy.BASE))
    assert diverse * forwards_per_update(ARMS["diversity"].recipe(toy.BASE)) == pytest.approx(budget, rel=0.01)


def test_every_arm_with_the_relation_is_paired_with_the_same_recipe_without_it():
    guided = replace(toy.BASE, guidance=1.0)
    assert set(arms_of(guided)) - set(arms_of(toy.BASE)) == {"decoupled", "decoupled_codmd"}
    for arm in ARMS.values():
        recipe, other = arm.recipe(guided), ARMS[arm.against].recipe(guided)
        if recipe.uses_relation:
            assert not other.uses_relation
            relation = ("relation_weight", "temperature", "batch_weight", "relation_features")
            assert replace(recipe, **{name: getattr(other, name) for name in relation}) == other


# Runs


def tiny(folder, arm="codmd", seed=1):
    torch.manual_seed(0)
    model = ToyDenoiser()
    for block in model.blocks:
        torch.nn.init.normal_(block.down.weight, std=0.02)
    model.save(folder / "teacher.safetensors")
    return toy.Run(arm, seed, folder, updates=8, samples=32)


def test_a_run_that_was_cut_short_ends_with_the_digits_of_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "BASE", replace(toy.BASE, batch_size=4, critic_updates=1))
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = toy.run(tiny(tmp_path / "whole"), lambda count: None)

    class Cut(Exception):
        pass

    seen = []

    def cut(count):
        seen.append(count)
        if sum(seen) == 5:
            raise Cut

    task = tiny(tmp_path / "parts")
    with pytest.raises(Cut):
        toy.run(task, cut)
    assert task.state_path.exists()
    assert not task.outcome_path.exists()
    again = []
    assert toy.run(task, again.append) == whole
    assert again == [4, 1, 1, 1, 1]
    assert sum(again) == task.total == 8
    assert not task.state_path.exists()
    assert [point["update"] for point in whole["curve"]] == [2, 4, 6, 8]
    assert whole["curve"][-1]["video_energy"] == whole["metrics"]["video_energy"]
    assert toy.run(task, lambda count: None) == whole  # from its file


def test_the_command_writes_what_is_finished_and_says_what_is_not(tmp_path, capsys, monkeypatch):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    tiny(work)
    settings = {"size": "toy", "updates": 8, "samples": 32, "changes": []}
    (work / "settings.json").write_text(json.dumps(settings))
    for seed in (1, 2):
        for arm in ("data", "dmd", "codmd"):
            shift = {"dmd": 0.3, "codmd": 0.2, "data": 0.0}[arm] + 0.01 * seed
            text = json.dumps(outcome(arm, seed, video_energy=shift))
            if (arm, seed) != ("codmd", 2):
                (work / f"{arm}-{seed}.json").write_text(text)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_jobs", interrupted)
    line = ["--size", "toy", "--seeds", "1", "2", "--arms", "data", "dmd", "codmd", "--updates", "8", "--samples", "32",
            "--work", str(work), "--out", str(out)]  # fmt: skip
    assert command.main(line) == command.UNFINISHED
    text = (out / "comparison.md").read_text()
    assert f"**5 of 6 runs are finished; `python -m benchmarks.comparison {' '.join(line)}` continues the" in text
    record = json.loads((out / "comparison.json").read_text())
    assert record["differences"]["codmd"]["video_energy"]["pairs"] == 1
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    document = (out / "comparison.html").read_text()
    assert "<strong>CoDMD, frames</strong> against DMD, 1 seed" in document
    assert document.count("<svg") == 3
    assert "http" not in document.replace("http://www.w3.org", "")
    with pytest.raises(SystemExit, match="give another --work"):
        command.main([*line, "--updates", "16"])
    elsewhere = [*line, "--known", str(out / "comparison.json")]
    elsewhere[elsewhere.index(str(work))] = str(again := tmp_path / "again")
    again.mkdir()
    tiny(again)
    command.main(elsewhere)
    assert len(list(again.glob("*-[12].json"))) == 5
    record = json.loads((out / "comparison.json").read_text())
    assert record["settings"]["runs"] == 6
    assert (out / "comparison.html").read_text().count("<svg") == 3, "clips of the first seed are in the JSON"
    torch.nn.init.ones_(model := ToyDenoiser().output[1].weight)
    save_file({"output.1.weight": model}, again / "teacher.safetensors")
    with pytest.raises(SystemExit, match=r"--known .* was made with"):
        command.main(elsewhere)


def test_the_json_has_no_nan():
    assert command.numbers({"a": [float("nan"), 1.0], "b": "nan"}) == {"a": [None, 1.0], "b": "nan"}


def test_rcm_learns_from_the_teacher_s_videos_and_continues(tmp_path, monkeypatch):
    short = replace(ARMS["rcm_codmd"].changes["consistency"], warmup=2)
    arm = replace(ARMS["rcm_codmd"], changes={**ARMS["rcm_codmd"].changes, "consistency": short, "critic_updates": 1})
    monkeypatch.setitem(ARMS, "rcm_codmd", arm)
    monkeypatch.setattr(toy, "BASE", replace(toy.BASE, batch_size=4, critic_updates=1))
    monkeypatch.setattr(toy, "VIDEOS", 8)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    task = tiny(tmp_path / "whole", "rcm_codmd")
    whole = toy.run(task, lambda count: None)
    assert whole["curve"][-1]["update"] == task.total > 4
    part = tiny(tmp_path / "parts", "rcm_codmd")
    seen = []

    def cut(count):
        seen.append(count)
        if sum(seen) == task.total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run(part, cut)
    assert toy.run(part, lambda count: None) == whole


def test_a_worker_runs_what_it_is_given(tmp_path):
    task = tiny(tmp_path, "data")
    (found,) = run_jobs([task], 1, lambda count: None, toy.run)
    assert found["metrics"] == toy.run(task, lambda count: None)["metrics"]
    assert found["metrics"]["std_ratio"] == pytest.approx(1.0, abs=0.2)


# Statistics


def test_a_difference_is_paired_and_counts_distances_from_the_best_value():
    arm = {seed: outcome("codmd", seed, video_energy=0.1 * seed - 0.02, std_ratio=0.9) for seed in (1, 2, 3)}
    other = {seed: outcome("dmd", seed, video_energy=0.1 * seed, std_ratio=1.2) for seed in (1, 2, 3, 4)}
    found = difference(arm, other, "video_energy", None)
    assert (found.mean, found.better, found.pairs) == (pytest.approx(-0.02), 3, 3)
    assert found.relative == pytest.approx(-0.1)
    assert found.low == pytest.approx(-0.02)
    assert difference(arm, other, "std_ratio", 1.0).mean == pytest.approx(-0.1)
    assert difference(arm, {9: outcome("dmd", 9)}, "speed", None) is None


def test_the_verdict_says_where_the_term_does_not_help():
    seeds = (1, 2, 3, 4, 5)
    better = [outcome("dmd", s, video_energy=1.0, speed=0.1) for s in seeds]
    better += [
        outcome("codmd", s, video_energy=1.2 + 0.01 * (s - 3), speed=0.05, spearman=1.0 + 0.3 * (s - 3)) for s in seeds
    ]
    (sentence,) = page.verdicts(better, COLUMNS)
    assert "better in speed (-50%, 5 of 5)" in sentence
    assert "worse in videos (+20%, 0 of 5)" in sentence
    assert "Spearman" not in sentence
    few = [o for o in better if o["seed"] < 3]
    (sentence,) = page.verdicts(few, COLUMNS)
    assert "2 seeds: too few seeds to tell. Better on all of them in" in sentence
    assert "speed (-50%, 2 of 2)" in sentence
    assert "1 seed: a single seed tells nothing" in page.verdicts([o for o in few if o["seed"] == 1], COLUMNS)[0]
    assert set(differences(better, COLUMNS)) == {"codmd"}


def test_the_measures_of_fresh_data_are_near_their_best():
    data, draws = ArcVideo(), torch.Generator().manual_seed(3)
    found = toy.measured(data.sample(400, draws), data.sample(400, draws))
    for measure, column in COLUMNS.items():
        assert found[measure] == pytest.approx(column.best or 0.0, abs=0.12), measure


# Moving photographs


@pytest.mark.parametrize("arm", arms_of(replace(toy.BASE, guidance=1.0))[3:])
def test_a_run_on_photographs_is_the_arm_s_recipe_at_equal_cost(arm, tmp_path):
    task = textures.Run(arm, 7, tmp_path, 40, 84, ("distill.batch_size=8",))
    config = task.config
    base = replace(config.distill, **{name: getattr(toy.BASE, name) for name in ("sigmas", "relation_features")})
    expected = ARMS[arm].recipe(
        replace(base, decoupled=False, critic_mixing=0.0, diversity_weight=0.0, temperature=0.1)
    )
    assert config.distill == expected
    assert (config.seed, config.distill.batch_size, config.distill.guidance) == (7, 8, 0.5)
    assert config.updates == task.total == updates_of(ARMS[arm], expected_base(), 40)
    assert config.checkpoint.keep_last * config.checkpoint.every >= config.updates  # every quarter is measured
    assert not task.trained()


def expected_base():
    from codmd.distill.config.run_config import read_config

    return read_config("textures_tiny").distill


def test_photographs_want_two_samples_of_every_caption(capsys):
    with pytest.raises(SystemExit):
        command.main(["--size", "textures", "--samples", "60"])
    assert "--samples: got 60; expected at least 84" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--size", "toy", "distill.guidance=1"])
    assert "KEY=VALUE is for --size textures" in capsys.readouterr().err
