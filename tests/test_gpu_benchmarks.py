"""The measurements of whole networks must work on their first GPU: every line that a CPU can run, runs here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmarks import (
    attention,
    convergence,
    convergence_measures,
    convergence_report,
    sampling_time,
    schedules,
    training_step,
    whole_network,
)
from codmd import backends, cli
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.data.textures import Textures
from codmd.distill.run.log import read_log
from codmd.distill.update.objective import Scores, distillation_loss
from codmd.distill.update.trainer import Distiller
from codmd.metrics import PairedDifference

pytestmark = pytest.mark.usefixtures("one_thread")


def results(folder, name):
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / f"{name}.md").read_text().startswith("# ")
    return json.loads((folder / f"{name}.json").read_text())


# A training cycle


def test_both_schedules_run_and_their_forwards_times_and_ratio_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "NAMES", ("native", "flash"))
    assert training_step.main(["--tiny", "--out", str(tmp_path)]) == 0
    found = results(tmp_path, "training_step")
    ours, published = found["schedules"].values()
    assert (ours["forwards_per_cycle"], published["forwards_per_cycle"]) == (38.5, 50.0)
    assert found["average_forwards"] == 38.5
    assert found["ratio_of_forwards"] == 0.77
    totals = [
        sum(lap["seconds"] for lap in found["laps"] if lap["schedule"] == name) / (2 * found["rounds"])
        for name in found["schedules"]
    ]
    assert [ours["cycle_s"], published["cycle_s"]] == pytest.approx(totals)
    assert found["ratio"] == pytest.approx(totals[0] / totals[1])
    assert {name: row["updates_per_cycle"] for name, row in ours["phases"].items()} == {
        "student": 1, "critic, shared sample": 1, "critic": 4
    }  # fmt: skip
    assert {name: row["forwards"] for name, row in published["phases"].items()} == {"student": 10, "critic": 8}
    critic = [lap["exit_step"] for lap in found["laps"] if lap["schedule"] == "codmd" and lap["phase"] == "critic"]
    assert all(critic.count(step) == 2 * found["rounds"] for step in range(4))
    share = ours["loss_s"] / ours["phases"]["student"]["mean_s"]
    assert ours["loss_share_of_student_update"] == pytest.approx(share)
    assert found["loss_backend"] in {backends.load(name)[0].__name__ for name in ("cpp", "reference")}
    native, flash = found["attention"]
    assert min(native["forward_s"], native["train_s"]) > 0
    assert "flash-attn" in flash["reason"] or flash["forward_s"] > 0
    assert found["torch"] == torch.__version__
    assert found["command"] == f"python -m benchmarks.training_step --tiny --out {tmp_path}"
    assert "not judged at this size" in (tmp_path / "training_step.md").read_text()


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
def test_two_cycles_draw_the_students_exit_steps_around_their_mean(steps):
    sigmas = tuple(1 - step / steps for step in range(steps))
    for schedule in schedules.schedules(DistillConfig(sigmas=sigmas, critic_updates=2 * steps + 1)):
        fresh = schedule.config.critic_updates - schedule.config.share_rollout
        for number in range(0, 2 * (steps // 2), 2):
            pair = [schedules.exit_steps(schedule, number + i) for i in range(2)]
            assert all(len(exits) == 1 + fresh for exits in pair)
            if steps % 2 == 0:
                assert sum(exits[0] for exits in pair) == steps - 1
    assert sorted(schedules.exit_steps(schedule, number)[0] for number in range(steps)) == list(range(steps))


def test_the_plain_losses_are_those_of_the_library():
    config = DistillConfig(guidance=3.5, convention="codmd", relation_weight=0.5)
    sample, fake, real, uncond = (torch.randn(3, 4, 2, 6, 8) for _ in range(4))
    scores = Scores(real + 0.3 * fake, real, uncond)
    found = []
    for loss in (schedules.plain_loss, distillation_loss):
        leaf = sample.clone().requires_grad_()
        total = loss(leaf, scores, config).total
        found.append((total.detach().double(), *torch.autograd.grad(total, leaf)))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-3, atol=1e-7)


def test_an_update_that_was_skipped_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(
        schedules.MeasuredDistiller, "_loss", lambda self, *given: replace_total(Distiller._loss(self, *given))
    )
    with pytest.raises(SystemExit, match="nothing was measured"):
        training_step.main(["--tiny", "--out", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def replace_total(loss):
    return replace(loss, total=loss.total * float("nan"))


def test_memory_and_shares_of_given_laps_reach_the_page_and_the_picture(tmp_path):
    laps = []
    for schedule, scale in (("codmd", 1.0), ("CoDMD's own loop", 2.0)):
        for phase, seconds, count in (("student", 8.0, 1), ("critic, shared sample", 3.0, 1), ("critic", 5.0, 4)):
            if scale == 1 or phase != "critic, shared sample":
                lap = schedules.Lap(schedule, phase, 1, scale * seconds, 8, 40 * 10**9, 50 * 10**9)
                laps += [lap] * count
    summary = training_step.summarize(laps, {"codmd": 0.004, "CoDMD's own loop": 0.02}, cycles=1)
    assert summary["ratio"] == pytest.approx(31 / 56)
    assert summary["schedules"]["codmd"]["loss_share_of_student_update"] == pytest.approx(0.0005)
    found = {
        **whole_network.environment(torch.device("cpu"), "benchmarks.training_step", []), **summary, "tiny": False,
        "configuration": "wan_1.3b", "latents": [21, 16, 60, 104], "parameters": 1_419_000_000, "rounds": 1,
        "gradient_checkpointing": True, "tflop_per_forward": 283.0, "average_forwards": 38.5,
        "loss_backend": "codmd.kernels",
        "attention": [{"attention": "sage", "forward_s": 0.5, "forward_tflop_s": 566.0, "reason": "no backward pass"}],
    }  # fmt: skip
    text = training_step.markdown(found)
    assert "0.554 of the time of CoDMD's own loop (goal 0.75: met)" in text
    assert "0.0500% of a student update (goal below 0.1%: met)" in text
    assert "| codmd | student | 1 | 8.000 | 8.000 | 8.00 | 40.0 | 50.0 |" in text
    assert "| sage | 0.500 | 566.0 |  | no backward pass |" in text
    whole_network.write(tmp_path, "training_step", found, text, training_step.draw(found))
    results(tmp_path, "training_step")


def test_the_flops_of_a_forward_pass_are_those_of_its_matrices(tmp_path):
    config = whole_network.wan_recipe("wan_1.3b", [], True, tmp_path)
    text = whole_network.random_text(config.model, True)
    network, size = config.model.options.network(), config.model.options
    dim = network["num_attention_heads"] * network["attention_head_dim"]
    tokens, patch = size.frames * size.height * size.width // 4, 4
    block = 2 * tokens * (6 * dim * dim + 2 * dim * network["ffn_dim"]) + 4 * tokens * tokens * dim
    block += 2 * text.shape[1] * 2 * dim * dim + 4 * tokens * text.shape[1] * dim
    ends = 2 * tokens * patch * 2 * 16 * dim
    embedding = 2 * (network["freq_dim"] * dim + 7 * dim * dim) + 2 * text.shape[1] * dim * (network["text_dim"] + dim)
    expected = network["num_layers"] * block + ends + embedding
    assert whole_network.forward_flops(config.model, text) == expected


# Sampling


@pytest.fixture
def _compiled_by_tracing_alone(monkeypatch):
    compile_blocks = WanTransformer3DModel.compile_repeated_blocks
    monkeypatch.setattr(
        WanTransformer3DModel, "compile_repeated_blocks", lambda self, **kw: compile_blocks(self, backend="eager", **kw)
    )


@pytest.mark.usefixtures("_compiled_by_tracing_alone")
def test_four_steps_cost_four_forwards_and_fifty_with_guidance_a_hundred(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "NAMES", ("native", "_native_flash", "nonsense"))
    assert sampling_time.main(["--tiny", "--out", str(tmp_path)]) == 0
    found = results(tmp_path, "sampling_time")
    names = [(row["attention"], row["mode"]) for row in found["rows"]]
    assert names[:4] == [(name, mode) for name in ("native", "_native_flash") for mode in ("eager", "compiled")]
    assert names[4:] == [("nonsense", "eager")]  # what is refused is not asked for again
    assert "expected one of" in found["rows"][4]["reason"]
    for row in found["rows"][:2]:
        assert (row["few"]["forwards"], row["many"]["forwards"]) == (4, 100)
        assert found["ratios"][row["mode"]] == row["many"]["s"] / row["few"]["s"]
    assert "many" not in found["rows"][2]
    compiled = [row["few"]["s"] for row in found["rows"][:4] if row["mode"] == "compiled"]
    assert found["fastest_compiled_s"] == min(compiled)


def test_without_time_nothing_is_timed_and_the_page_says_so(tmp_path):
    assert sampling_time.main(["--tiny", "--out", str(tmp_path), "--budget", "-1"]) == 0
    found = results(tmp_path, "sampling_time")
    assert {row["reason"] for row in found["rows"]} == {"out of time"}
    assert "No compiled network could be timed." in (tmp_path / "sampling_time.md").read_text()


def test_the_sampling_goal_is_judged_by_the_fastest_compiled_network():
    rows = [
        {"attention": "native", "mode": "eager", "few": {"s": 1.0}, "many": {"s": 26.0}},
        {"attention": "native", "mode": "compiled", "few": {"s": 2.0}, "many": {"s": 48.0}},
        {"attention": "flash", "mode": "compiled", "few": {"s": 1.6}},
    ]
    found = {**sampling_time.summarize(rows), "tiny": False, "few_steps": 4, "many_steps": 50}
    assert found["ratios"] == {"eager": 26.0, "compiled": 24.0}
    text = sampling_time.conclusion(found)
    assert "1.600 s with the fastest attention backend (goal 1.5 s: missed)" in text
    assert "26.0x eager, 24.0x compiled" in text


# Errors


@pytest.mark.parametrize("main", [training_step.main, sampling_time.main, convergence.main])
def test_without_a_gpu_the_message_says_what_runs_here(main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny"):
        main([])


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (training_step.main, ["--config", "toy"], "expected a wan"),
        (training_step.main, ["distill.gidance=3"], "gidance"),
        (training_step.main, ["distill.guidance=null"], "distill.guidance"),
        (sampling_time.main, ["--config", "nowhere.yaml"], "nowhere.yaml"),
        (convergence.main, ["distill.relation_weight=0"], "relation term is off"),
        (convergence.main, ["distill.nonsense=0"], "nonsense"),
        (convergence.main, ["--stage", "students"], "begin with --stage teacher"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(main, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["--tiny", "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_results_go_to_a_folder_of_the_gpu_and_the_day():
    found = {"device": "NVIDIA H200", "date": "2000-01-31"}
    assert whole_network.results_folder(None, found, False) == Path("benchmarks/results/nvidia-h200-2000-01-31")
    assert whole_network.results_folder(Path("x"), found, False) == Path("x")
    assert whole_network.results_folder(None, found, True) == Path("runs/tiny")


# Convergence


class Finished:
    """A process that ran `codmd train` in this one."""

    def __init__(self, run):
        self.returncode = cli.main(["train", str(convergence.CONFIG), *run.overrides])

    def poll(self):
        return self.returncode


@pytest.fixture
def small(tmp_path):
    """Overrides of the tiny study: a network of one block, a few updates."""
    network = json.loads(convergence.NETWORK.read_text())
    network |= {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "text_dim": 16}
    path = tmp_path / "network.json"
    path.write_text(json.dumps(network))
    return [f"model.config={path}", "teacher.updates=3", "updates=2", "model.frames=3", "log.every=1"]


@pytest.mark.every
def test_stages_train_what_is_missing_and_measure_every_arm_and_seed(tmp_path, small, monkeypatch):
    started = []
    monkeypatch.setattr(convergence, "start", lambda run, *_: started.append(run.name) or Finished(run))
    arguments = ["--tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--videos", "4", *small]
    assert convergence.main([*arguments, "--stage", "teacher"]) == 0
    with pytest.raises(SystemExit, match="run --stage students first"):
        convergence.main([*arguments, "--stage", "measure"])
    assert convergence.main([*arguments, "--minutes", "1.9"]) == convergence.UNFINISHED  # trained, not measured
    assert not (tmp_path / "out").exists()
    assert convergence.main([*arguments, "--minutes", "1.9"]) == 0
    assert started == ["teacher", "dmd-1", "codmd-1", "dmd-2", "codmd-2"]
    assert convergence.main([*arguments, "--stage", "students"]) == 0
    assert len(started) == 5

    found = results(tmp_path / "out", "convergence")
    arms = [(outcome["arm"], outcome["seed"]) for outcome in found["outcomes"]]
    assert arms == [(arm, seed) for seed in (1, 2) for arm in convergence_measures.ARMS]
    for outcome in found["outcomes"]:
        assert set(outcome["metrics"]) == {*convergence_measures.COLUMNS, "static"}
        assert len(outcome["motion"]) == 4
    weights = [
        convergence.read_meta(tmp_path / "work" / name / "checkpoints" / "step_00000002")["config"]["distill"]
        for name in ("dmd-1", "codmd-1")
    ]
    assert [recipe.pop("relation_weight") for recipe in weights] == [0, 0.1]
    assert weights[0] == weights[1]
    assert found["evaluations"] == {"teacher": 100, "student": 4}
    assert found["milliseconds"]["teacher"] > found["milliseconds"]["student"] > 0
    assert str(tmp_path) not in json.dumps(found["configuration"])
    with pytest.raises(SystemExit, match=r"other settings \(distill.temperature: 0.1 -> 0.2\)"):
        convergence.main([*arguments, "--stage", "students", "distill.temperature=0.2"])


class Clock:
    """Stands still until `late` says so."""

    def __init__(self, late):
        self.late = late

    def monotonic(self):
        return 1.0 if self.late() else 0.0

    def sleep(self, _seconds):
        time.sleep(0.2)


@pytest.mark.every
def test_a_run_that_is_out_of_time_saves_and_goes_on_where_it_stopped(tmp_path, small, monkeypatch):
    log = tmp_path / "teacher" / "log.jsonl"
    many, _ = convergence.plan(tmp_path, [1], [*small, "teacher.updates=100000"], True)
    monkeypatch.setattr(convergence, "time", Clock(lambda: log.exists() and len(log.read_bytes().splitlines()) > 2))
    assert convergence.train([many], tmp_path, 1, 0.5) == ["teacher"]
    (checkpoint,) = (tmp_path / "teacher" / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step_"))
    assert stopped > 2
    few, _ = convergence.plan(tmp_path, [1], [*small, f"teacher.updates={stopped + 2}"], True)
    assert convergence.train([few], tmp_path, 1, float("inf")) == []
    assert [line["update"] for line in read_log(log) if "loss" in line] == list(range(1, stopped + 3))
    assert "continuing from" in (tmp_path / "teacher.txt").read_text()


def test_a_run_that_fails_ends_the_command_with_the_end_of_its_log(tmp_path, monkeypatch):
    def fail(run, work):
        (work / f"{run.name}.txt").write_text("out of memory")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(convergence, "start", fail)
    with pytest.raises(SystemExit, match=r"teacher ended with status 3:\nout of memory"):
        convergence.main(["--tiny", "--work", str(tmp_path), "--stage", "teacher"])


def test_no_run_outlives_a_command_that_is_asked_to_end(tmp_path, monkeypatch):
    started = []

    def sleeper(run, work):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1]

    class Impatient(Clock):
        def sleep(self, _seconds):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(convergence, "start", sleeper)
    monkeypatch.setattr(convergence, "time", Impatient(lambda: False))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        convergence.main(["--tiny", "--work", str(tmp_path), "--stage", "teacher"])
    for process in started:
        assert process.wait(timeout=60) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_measures_tell_frozen_pale_and_equal_videos_apart():
    data = Textures((8, 12, 16, 16), 8, zoom=3.0)
    moving = [number for number, caption in enumerate(data.captions) if "pan" in caption]
    videos, others = (data.videos(moving, range(start, start + len(moving))) for start in (0, 100))
    teacher = convergence_measures.inspected(videos, data)

    equal = convergence_measures.distances(teacher, teacher)
    assert equal["std_ratio"] == equal["saturation_ratio"] == 1
    assert equal["motion"] == equal["speed"] == equal["rank_relation"] == equal["static_difference"] == 0
    frozen = convergence_measures.distances(
        convergence_measures.inspected(others[:, :1].expand_as(others).contiguous(), data), teacher
    )
    fresh = convergence_measures.distances(convergence_measures.inspected(others, data), teacher)
    assert frozen["static"] == 1
    assert frozen["static_difference"] > 0.8 > 0.2 > abs(fresh["static_difference"])
    for measure in ("relation_energy", "spearman_energy", "motion", "speed"):
        assert frozen[measure] > 3 * fresh[measure], measure
    pale = convergence_measures.distances(convergence_measures.inspected(0.5 * videos, data), teacher)
    assert pale["std_ratio"] == pytest.approx(0.5)
    assert pale["saturation_ratio"] < 0.7


def made_up(dmd, codmd):
    """A record whose measures are those given, one value a seed, and 1 for the other arms."""
    outcomes = []
    for seed in range(len(dmd)):
        for arm in convergence_measures.ARMS:
            value = {"dmd": dmd, "codmd": codmd}.get(arm, [1.0] * len(dmd))[seed]
            metrics = dict.fromkeys([*convergence_measures.COLUMNS, "static"], value)
            outcomes.append({"arm": arm, "seed": seed, "metrics": metrics, "motion": [0.1, 0.9]})
    return {"seeds": list(range(len(dmd))), "outcomes": outcomes}


def test_the_verdict_names_what_the_term_does_in_either_direction():
    helps, harms, mixed = (
        convergence_report.verdict(made_up([2.0, 3.0], after)) for after in ([1.5, 2.5], [2.5, 3.5], [1.5, 3.5])
    )
    assert "nearer to the teacher on every seed: cosine -20%; Spearman -20%" in helps
    assert "further from it on every seed: nothing" in helps
    assert "further from it on every seed: cosine +20%" in harms
    assert "seeds that disagree: cosine +0%" in mixed
    assert "2 seeds agree on a measure once in 2 times" in helps
    assert "unlike, so that distances" in helps
    assert "One seed cannot tell" in convergence_report.verdict(made_up([2.0], [1.0]))
    assert "std ratio (from 1)" in harms.split("every seed")[2]
    assert convergence_report.judge(PairedDifference(0.0, 0.0, 0, 2), 1.0) == "mixed"
    assert convergence_report.judge(PairedDifference(-0.02, 0.0, 2, 2), 1.0) == "nearer"
    assert convergence_report.judge(PairedDifference(-0.02, 0.0, 2, 2), 3.0) == "mixed"
