"""The demo: its data, the teacher's cache, parallel runs, the report, and what an interruption leaves behind."""

import base64
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from codmd import cli, metrics, output
from codmd.demo import command, pool, teacher
from codmd.demo.arc import ArcConfig, ArcVideo
from codmd.demo.experiment import ARMS, MEASURES, Job, Settings, run_job
from codmd.demo.summary import difference_table, summarize, verdict
from codmd.demo.teacher import TeacherConfig
from codmd.distill.config.recipe import DistillConfig
from codmd.models.toy import ToyConfig, ToyDenoiser

TINY = TeacherConfig(steps=3, batch_size=8, model=ToyConfig(width=16, blocks=1))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "codmd"


def random_teacher(seed=0):
    """A teacher that has learnt nothing but whose output is not constant."""
    torch.manual_seed(seed)
    model = ToyDenoiser()
    for block in model.blocks:
        nn.init.normal_(block.down.weight, std=0.02)
    return model


def tiny_settings(folder, **recipe):
    path = folder / "teacher.safetensors"
    random_teacher().save(path)
    return Settings(str(path), ArcConfig(), DistillConfig(batch_size=8, **recipe), updates=3, samples=40, log_every=2)


# Data


def test_an_arc_video_moves_on_its_scenes_circle_at_one_of_the_speeds():
    config = replace(ArcConfig(), noise=0.0)
    data = ArcVideo(config)
    videos = data.sample(500, torch.Generator().manual_seed(0))
    scene, path = data.project(videos)
    torch.testing.assert_close(path.norm(dim=2), torch.full((500, 8), config.radius))
    assert set(scene.tolist()) == set(range(config.scenes))
    angle = torch.atan2(path[..., 1], path[..., 0]).diff(dim=1)
    turn = torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi
    allowed = torch.tensor([s * v for v in config.speeds for s in (-1, 1)])
    nearest = (turn.mean(dim=1, keepdim=True) - allowed).abs().min(dim=1)
    assert float(nearest.values.max()) < 1e-5
    assert torch.bincount(nearest.indices).min() > 50
    torch.testing.assert_close(turn, turn[:, :1].expand_as(turn), atol=1e-5, rtol=0)


def test_scenes_depend_on_their_seed_and_samples_on_the_generator():
    first, again, other = ArcVideo(), ArcVideo(), ArcVideo(replace(ArcConfig(), seed=1))
    draw = [v.sample(4, torch.Generator().manual_seed(2)) for v in (first, again, other)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0], first.sample(4, torch.Generator().manual_seed(3)))


# The teacher and its cache


def test_flow_matching_teaches_the_teacher():
    config = replace(TINY, batch_size=128, warmup=20, model=ToyConfig(width=64, blocks=2))
    trained, untrained = (teacher.train_teacher(replace(config, steps=n), lambda: None) for n in (150, 1))
    x0 = ArcVideo().sample(1000, torch.Generator().manual_seed(9))
    noise, sigma = torch.randn_like(x0), torch.full((1000,), 0.5)

    def error(model):
        with torch.no_grad():
            return float((model.predict_x0(model.add_noise(x0, noise, sigma), sigma) - x0).square().mean())

    assert error(trained) < 0.6 * error(untrained)


def test_a_stored_teacher_comes_back_bit_for_bit_and_only_for_its_configuration(cache):
    model = teacher.train_teacher(TINY, lambda: None)
    warnings = []
    teacher.store(model, TINY, warnings.append)
    loaded = teacher.load_cached(TINY, warnings.append)
    assert loaded is not None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert teacher.load_cached(replace(TINY, steps=4), warnings.append) is None
    assert teacher.load_cached(replace(TINY, arc=replace(ArcConfig(), seed=1)), warnings.append) is None
    assert warnings == []
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def replace_by_text(path):
    path.write_text("not a teacher")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, replace_by_text, empty])
def test_a_damaged_cache_file_is_detected_reported_and_replaced(damage):
    teacher.store(teacher.train_teacher(TINY, lambda: None), TINY, pytest.fail)
    path = teacher.cache_path(TINY)
    damage(path)
    warnings = []
    assert teacher.load_cached(TINY, warnings.append) is None
    assert len(warnings) == 1
    assert "will be trained again" in warnings[0]
    assert str(path) in warnings[0]
    teacher.store(teacher.train_teacher(TINY, lambda: None), TINY, pytest.fail)
    assert teacher.load_cached(TINY, pytest.fail) is not None


def test_a_failed_save_leaves_the_earlier_file_and_no_other(cache, monkeypatch):
    model = teacher.train_teacher(TINY, lambda: None)
    teacher.store(model, TINY, pytest.fail)
    before = teacher.cache_path(TINY).read_bytes()

    def disk_full(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("codmd.models.toy.save_file", disk_full)
    warnings = []
    teacher.store(model, TINY, warnings.append)
    assert "could not be cached" in warnings[0]
    assert "No space left" in warnings[0]
    assert [path.read_bytes() for path in cache.iterdir()] == [before]


def test_a_cache_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    warnings = []
    teacher.store(ToyDenoiser(TINY.model), TINY, warnings.append)
    assert "could not be cached" in warnings[0]


def test_training_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    teacher.train_teacher(TINY, lambda: None)
    assert torch.equal(torch.rand(1), expected)


# Runs


def test_a_run_repeats_in_every_digit_and_reports_its_progress(tmp_path):
    settings, counts = tiny_settings(tmp_path), []
    first = run_job(Job("codmd", 3, settings), counts.append)
    torch.rand(7)
    assert run_job(Job("codmd", 3, settings), lambda count: None) == first
    assert sum(counts) == settings.updates
    assert first.curves["update"] == [2, 3]
    assert set(first.metrics) == set(MEASURES)
    assert run_job(Job("codmd", 4, settings), lambda count: None).metrics != first.metrics


def test_the_arms_differ_by_the_relation_term_alone(tmp_path):
    def metrics_of(arm, **recipe):
        return run_job(Job(arm, 1, tiny_settings(tmp_path, **recipe)), lambda count: None).metrics

    assert metrics_of("codmd", relation_weight=0.0) == metrics_of("dmd", relation_weight=0.0)
    assert metrics_of("codmd", relation_weight=5.0) != metrics_of("dmd", relation_weight=5.0)
    assert metrics_of("dmd", relation_weight=5.0) == metrics_of("dmd", relation_weight=0.0)


def test_fresh_data_lies_at_the_floor(tmp_path):
    settings = replace(tiny_settings(tmp_path), samples=500)
    floor = run_job(Job("data", 1, settings), lambda count: None).metrics
    untrained = run_job(Job("teacher_few", 1, settings), lambda count: None).metrics
    assert abs(floor["relation_energy"]) < 0.02 < untrained["relation_energy"]
    assert floor["std_ratio"] == pytest.approx(1, abs=0.05)


def test_a_run_that_diverges_says_so_and_what_to_try(tmp_path):
    settings = tiny_settings(tmp_path, student_lr=1e30)
    with pytest.raises(FloatingPointError, match=r"codmd, seed 1: .* at student update 2; try a smaller --lambda"):
        run_job(Job("codmd", 1, settings), lambda count: None)


def test_processes_return_outcomes_in_order_and_equal_to_a_run_here(tmp_path):
    jobs = [Job(arm, 1, tiny_settings(tmp_path)) for arm in ("codmd", "data", "dmd")]
    counts = []
    outcomes = pool.run_jobs(jobs, 2, counts.append)
    assert outcomes == [run_job(job, lambda count: None) for job in jobs]
    assert sum(counts) == 6


def test_a_failing_run_ends_all_others_and_travels_to_the_caller(tmp_path):
    endless = replace(tiny_settings(tmp_path), updates=10**9)
    lost = replace(endless, teacher_path=str(tmp_path / "lost.safetensors"))
    started = []
    spawn = pool.multiprocessing.get_context("spawn").Process.start

    def remember(process):
        started.append(process)
        spawn(process)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multiprocessing.context.SpawnProcess.start", remember)
        with pytest.raises(pool.JobFailed, match=r"lost\.safetensors"):
            pool.run_jobs([Job("dmd", 1, endless), Job("dmd", 1, lost)], 2, lambda count: None)
    assert len(started) == 2
    assert not any(process.is_alive() for process in started)


# Summary and report


@pytest.fixture
def outcomes(tmp_path):
    """Every arm at two seeds, tiny."""
    settings = tiny_settings(tmp_path)
    return [run_job(Job(arm, seed, settings), lambda count: None) for arm in ARMS for seed in (1, 2)]


def summary_with(outcomes, dmd, codmd):
    for outcome in outcomes:
        if outcome.arm in ("dmd", "codmd"):
            outcome.metrics["relation_energy"] = (dmd if outcome.arm == "dmd" else codmd)[outcome.seed - 1]
    return summarize(outcomes, 4, dict.fromkeys(ARMS))


def test_the_verdict_and_the_table_say_what_was_measured_in_either_direction(outcomes):
    helps = summary_with(outcomes, dmd=(0.2, 0.4), codmd=(0.1, 0.2))
    assert "lowers the relation energy distance of the 4-step student: -50% on average, lower on 2 of 2" in verdict(
        helps
    )
    hurts = summary_with(outcomes, dmd=(0.2, 0.2), codmd=(0.4, 0.1))
    assert "does not lower the relation energy distance" in verdict(hurts)
    assert "+25% on average, lower on 1 of 2 seeds" in verdict(hurts)
    row = difference_table(hurts)[1][0]
    assert row == ["relation energy distance", "+0.050 ± 0.150", "+25%", "1 of 2 seeds"]


def test_closeness_of_the_std_ratio_counts_not_its_size(outcomes):
    for outcome in outcomes:
        outcome.metrics["std_ratio"] = {"dmd": 0.8, "codmd": 1.1}.get(outcome.arm, 1.0)
    difference = summarize(outcomes, 4, dict.fromkeys(ARMS)).differences["std_ratio"]
    assert difference.mean == pytest.approx(-0.1)
    assert difference.lower == 2


class Resources(HTMLParser):
    """Collects what a page would load."""

    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


@pytest.fixture
def cached_teacher():
    """A cached (untrained) teacher, so that the command trains none."""
    teacher.store(random_teacher(), TeacherConfig(), pytest.fail)


@pytest.mark.usefixtures("cached_teacher")
def test_the_command_writes_a_self_contained_report_whose_numbers_are_the_runs(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setitem(command.QUICK, "samples", 100)
    arguments = ["demo", "--quick", "--seeds", "2", "--updates", "4", "--steps", "2", "--out", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert str(out / "report.html") in printed
    assert "CoDMD, 2 steps" in printed
    assert "too short to judge the term" in printed

    names = {"demo", "relations", "trajectories", "measures", "speeds", "curves"}
    assert {path.name for path in out.iterdir()} == {f"{n}.png" for n in names} | {"report.html", "results.json"}
    page = (out / "report.html").read_text("utf-8")
    assert '<p class="verdict">A --quick run shows that everything works; it is too short to judge' in page
    parser = Resources()
    parser.feed(page)
    assert parser.tags.count("img") == len(names)
    assert "script" not in parser.tags
    for source in parser.sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")

    results = json.loads((out / "results.json").read_text("utf-8"))
    assert results["settings"]["seeds"] == [51, 52]
    assert results["verdict"] in page.replace("&#x27;", "'")
    for arm in ARMS:
        runs = [run["metrics"] for run in results["runs"] if run["arm"] == arm]
        assert len(runs) == 2
        for measure, statistic in results["arms"][arm]["measures"].items():
            values = [run[measure] for run in runs]
            assert statistic["mean"] == pytest.approx(statistics.fmean(values))
            assert statistic["std"] == pytest.approx(statistics.stdev(values))
            assert f"{statistic['mean']:.3f} ± {statistic['std']:.3f}".replace("-0.000", "0.000") in page
    assert [results["arms"][arm]["network_evaluations"] for arm in ARMS] == [0, 50, 2, 2, 2]
    assert results["arms"]["teacher"]["milliseconds_per_sample"] > results["arms"]["dmd"]["milliseconds_per_sample"]
    assert not re.search(r"/(home|root|tmp|work)/", page.split("<main>")[1].replace("data:image", ""))


# Output folder and interruption


def test_an_earlier_demo_is_replaced_only_by_a_complete_one(tmp_path):
    out = tmp_path / "out"
    with output.building(out) as folder:
        (folder / output.MARKER).write_text("first")
    output.check_output(out, "demo")
    with pytest.raises(KeyboardInterrupt), output.building(out) as folder:  # noqa: PT012
        (folder / output.MARKER).write_text("half of the second")
        raise KeyboardInterrupt
    assert (out / output.MARKER).read_text() == "first"
    with output.building(out) as folder:
        (folder / output.MARKER).write_text("third")
    assert (out / output.MARKER).read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_demo_left_is_removed_but_not_that_of_a_living_one(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getppid()):
        (tmp_path / f".out.partial-{pid}").mkdir()
    with output.building(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", f".out.partial-{os.getppid()}"}


def start_demo(out, *options):
    """A demo that hears SIGINT, also where these tests run in the background of a shell that ignores it."""
    arguments = [sys.executable, "-m", "codmd", "demo", "--threads", "2", "--out", str(out), *options]
    return subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_until(stream, text):
    """Reads the demo's progress until `text` shows."""
    seen = b""
    while text not in seen:
        piece = os.read(stream.fileno(), 4096)
        assert piece, f"the demo ended before {text!r}: {seen.decode()}"
        seen += piece


def session_members(session):
    """Processes of that session that have not ended."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(sid) == session and state != "Z":
            members.append(int(entry.name))
    return members


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for child processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_report_no_half_file_and_no_process(how, cache, cached_teacher, tmp_path):
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    demo = start_demo(tmp_path / "out", "--updates", "1000000")
    read_until(demo.stderr, b"students:")
    time.sleep(2)
    assert demo.poll() is None
    os.kill(demo.pid, how)
    demo.wait()
    if how is not signal.SIGKILL:
        assert demo.returncode == cli.INTERRUPTED
        assert demo.stderr.read().endswith(b"codmd demo: interrupted\n")
    demo.stderr.close()
    deadline = time.monotonic() + 60
    while session_members(demo.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert session_members(demo.pid) == []
    assert not (tmp_path / "out").exists()
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def test_a_demo_interrupted_while_the_teacher_trains_caches_nothing(cache, tmp_path):
    demo = start_demo(tmp_path / "out", "--quick")
    read_until(demo.stderr, b"teacher:")
    os.kill(demo.pid, signal.SIGINT)
    demo.communicate()
    assert demo.returncode == cli.INTERRUPTED
    assert not cache.exists() or list(cache.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_the_relation_between_frames_is_what_the_report_measures():
    videos = ArcVideo().sample(20, torch.Generator().manual_seed(0))
    relation = metrics.frame_relations(videos)
    assert relation.shape == (20, 8, 8)
    torch.testing.assert_close(relation.diagonal(dim1=1, dim2=2), torch.ones(20, 8, dtype=torch.float64))
