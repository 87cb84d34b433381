"""Early warnings on fixed samples: bands, the log, the best checkpoint, and runs that end or roll back."""

from __future__ import annotations

import math

import pytest
import torch
from test_train_output import read_events
from train_cases import ALONE, QUIET, RECORD, TOY, curve, train

from codmd import cli
from codmd.distill.config.run_config import read_config
from codmd.distill.config.sections import WatchSettings
from codmd.distill.config.typed import ConfigError
from codmd.distill.run import training
from codmd.distill.run.checkpoint import CheckpointStore, read_student
from codmd.distill.run.integrity import read_meta
from codmd.distill.run.log import read_log
from codmd.distill.run.watch import Reading, Watch, read


def samples(seed=0):
    return torch.randn(6, 5, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_ratios_are_of_spread_motion_and_relations():
    teacher = samples()
    assert read(teacher, teacher) == pytest.approx((1, 1, 1))
    louder = read(2 * teacher, teacher)
    assert louder == pytest.approx((2, 2, 1), rel=1e-5)
    frozen = read(teacher[:, :1].expand_as(teacher), teacher)
    assert frozen.frame_difference_ratio == 0
    assert frozen.relation_ratio == pytest.approx(0, abs=1e-6)
    image = read(2 * teacher[:, :1], teacher[:, :1])
    assert math.isnan(image.frame_difference_ratio)
    assert math.isnan(image.relation_ratio)
    assert image.distance == pytest.approx(math.log(2), rel=1e-5)


def test_the_distance_is_the_root_mean_square_of_logarithms():
    assert Reading(2.0, 0.5, 1.0).distance == pytest.approx(math.log(2) * math.sqrt(2 / 3))
    assert Reading(1.0, 1.0, 1.0).distance == 0
    assert Reading(1.0, 0.0, 1.0).distance is None
    assert Reading(math.inf, 1.0, 1.0).distance is None


def scaled(watch, factors):
    """What leaves at each look, with the student the teacher times a factor."""
    found = []
    for update, factor in enumerate(factors, 1):
        watch.draw = lambda factor=factor: factor * watch.teacher
        found.append(watch.look(update)[1])
    return found


def test_only_what_was_inside_its_band_leaves_it_and_only_once():
    watch = Watch(WatchSettings(every=1), samples, samples())
    left = scaled(watch, [0.5, 0.9, 1.2, 1.3, 1.0, 1.4])
    assert left == [[], [], [], ["std_ratio", "frame_difference_ratio"], [], []]
    assert watch.left == {"std_ratio": 4, "frame_difference_ratio": 4}
    again = Watch(WatchSettings(every=1), samples, samples())
    again.restore(watch.record(6))
    assert scaled(again, [1.5]) == [[]]
    fresh = Watch(WatchSettings(every=1), samples, samples())
    fresh.restore({"entered": ["std_ratio"], "left": {}})
    assert scaled(fresh, [1.5]) == [["std_ratio"]]


def test_a_record_has_a_distance_only_of_its_own_update():
    watch = Watch(WatchSettings(every=1), samples, samples())
    assert watch.record(0)["distance"] is None
    watch.look(3)
    assert watch.record(3)["distance"] == pytest.approx(0)
    assert watch.record(4)["distance"] is None


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, ALONE, 2, pytest.fail)
    distances = {1: 0.5, 2: 0.1, 3: 0.4, 4: None, 5: 0.3}
    for step, distance in distances.items():
        watch = {"distance": distance, "entered": [], "left": {}}
        store.save(step, {"student.weight": torch.full((2,), float(step))}, {**RECORD, "watch": watch})
    assert [path.name[-1] for path in store.paths()] == ["5", "4", "2"]
    assert store.best() == tmp_path / "step_00000002"
    store.roll_back(store.best())
    assert [path.name for path in store.paths()] == ["step_00000002"]
    assert (tmp_path / "aside_step_00000005").is_dir()
    store.save(3, {"student.weight": torch.zeros(2)}, {**RECORD, "watch": {}})
    assert store.best() == tmp_path / "step_00000002"


WATCHED = [*TOY, "watch.every=1", "checkpoint.every=1", "checkpoint.keep_last=1", "log.preview_samples=4"]


@pytest.fixture
def growing(monkeypatch):
    """Students whose fixed samples are the teacher's times a factor that grows, nearest to 1 at update 2."""
    jobs = []
    assemble = training.assemble

    def kept(*arguments):
        jobs.append(assemble(*arguments))
        return jobs[-1]

    monkeypatch.setattr(training, "assemble", kept)
    monkeypatch.setattr(
        training, "preview_latents", lambda job: 0.82 * 1.1 ** jobs[-1].trainer.update * job.draw_teacher()
    )


def test_a_run_logs_where_a_measure_leaves_and_goes_on(tmp_path, growing, capsys):
    train(*WATCHED, f"out={tmp_path}", "updates=6")
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "watch" in line]
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.get("left_band") for line in lines] == [
        None, None, None, None, ["std_ratio", "frame_difference_ratio"], None
    ]  # fmt: skip
    assert lines[4]["watch"]["std_ratio"] == pytest.approx(0.82 * 1.1**5, rel=1e-4)
    assert "update 5: std_ratio 1.32 and frame_difference_ratio 1.32 left the band of 0.8 to 1.25" in (
        capsys.readouterr().err
    )
    events = read_events(tmp_path / "tensorboard")
    assert [event.step for event in events.Scalars("fixed_samples/std_ratio")] == [1, 2, 3, 4, 5, 6]
    marked = {name for name in events.Tags()["scalars"] if name.endswith("_left_band")}
    assert (
        marked == {f"fixed_samples/{name}_left_band" for line in lines for name in line.get("left_band", [])} != set()
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000006"]


def test_a_run_that_ends_names_the_best_and_the_same_command_goes_on(tmp_path, growing, capsys):
    line = [*WATCHED, QUIET, "watch.stop_on=end", f"out={tmp_path}", "updates=6"]
    train(*line, status=1)
    message = capsys.readouterr().err
    assert "update 5: std_ratio 1.32" in message
    assert "step_00000002; the same command goes on" in message
    assert read_meta(tmp_path / "checkpoints" / "step_00000005")["watch"]["left"]["std_ratio"] == 5
    train(*line)
    assert len(curve(tmp_path)) == 6


def test_a_run_that_rolls_back_leaves_the_best_as_its_newest(tmp_path, growing, capsys):
    train(*WATCHED, QUIET, "watch.stop_on=rollback", f"out={tmp_path}", "updates=6", status=1)
    assert "Rolled back to the best checkpoint" in capsys.readouterr().err
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["aside_step_00000005", "step_00000002"]
    newest, best = read_student(tmp_path), read_student(folder / "step_00000002")
    assert all(torch.equal(newest[name], best[name]) for name in best)
    train(*WATCHED, QUIET, f"out={tmp_path}", "updates=4")
    assert [line["update"] for line in curve(tmp_path)] == [1, 2, 3, 4]


def test_watching_does_not_change_training(tmp_path):
    train(*TOY, QUIET, "updates=4", f"out={tmp_path / 'plain'}")
    train(*WATCHED, QUIET, "updates=4", f"out={tmp_path / 'watched'}")
    assert curve(tmp_path / "watched") == curve(tmp_path / "plain")


def test_the_dry_run_says_what_is_watched_and_what_makes_no_sense_is_refused(tmp_path, capsys):
    assert cli.main(["train", "toy", "--dry-run", "watch.every=5", "watch.stop_on=end", f"out={tmp_path / 'run'}"]) == 0
    assert "watch: every 5, then end" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"watch\.stop_on: 'end' needs looks"):
        read_config("toy", ["watch.stop_on=end"])
    with pytest.raises(ConfigError, match=r"watch\.every: watches students"):
        read_config("textures_tiny", ["mode=teacher", "watch.every=5"])
