"""What a run leaves and shows: log, TensorBoard, previews, bar, and everything that a checkpoint must hold."""

from __future__ import annotations

import dataclasses
import json
import re

import imageio.v3 as imageio
import pytest
import torch
from train_cases import ALONE, QUIET, TOY, curve, train

from codmd.distill.run.checkpoint import tensors_of
from codmd.distill.run.integrity import read_meta
from codmd.distill.run.log import RunLog, read_log
from codmd.models.toy import ToyConfig, ToyDenoiser


@pytest.mark.parametrize("relation_weight", [0.0, 0.1])
def test_dmd_and_codmd_runs_log_what_to_watch(tmp_path, relation_weight):
    train(*TOY, f"out={tmp_path}", "updates=3", f"distill.relation_weight={relation_weight}", "log.preview_every=3")
    lines = curve(tmp_path)
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert all(line["std_ratio"] > 0 and line["frame_difference_ratio"] > 0 for line in lines)
    assert ("relation_to_dmd" in lines[0]) == (relation_weight > 0)
    assert all((line["relation_frame"] > 0) == (relation_weight > 0) for line in lines[1:])
    video = imageio.imread(tmp_path / "previews" / "step_00000003.mp4")
    assert video.shape[0] == 4
    events = read_events(tmp_path / "tensorboard")
    expected = {"loss/loss", "loss/critic", "watch/std_ratio", "gradient/student_grad_norm", "schedule/exit_step",
                "speed/seconds_per_update", "speed/samples_per_second", "speed/forwards_per_second",
                "speed/peak_memory_gb"}  # fmt: skip
    assert expected <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/loss")] == [1, 2, 3]
    assert events.Scalars("loss/loss")[1].value == pytest.approx(lines[1]["loss"])
    assert set(events.Tags()["images"]) == {"preview/samples", "preview/frame_relation", "preview/sample_relation"}
    assert events.Images("preview/samples")[0].encoded_image_string.startswith(b"GIF8")


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_the_log_of_a_continued_run_drops_what_was_lost_and_half_written(tmp_path):
    with RunLog(tmp_path, ALONE, 0, 5) as log:
        for update in (1, 2, 3):
            log.scalars(update, {"loss": torch.tensor(float(update))})
        log.scalars(4, {"loss": float("nan")})
    path = tmp_path / "log.jsonl"
    assert json.loads(path.read_text().splitlines()[3])["loss"] == "nan"
    path.write_text(path.read_text() + '{"update": 5, "lo')
    with RunLog(tmp_path, ALONE, 2, 5) as log:
        log.event(3, skipped={"student": 1})
    assert [line["update"] for line in read_log(path)] == [1, 2, 3]
    assert read_log(path)[2]["skipped"] == {"student": 1}


def test_a_checkpoint_records_configuration_versions_and_the_place_in_the_data(tmp_path):
    train(*TOY, QUIET, f"out={tmp_path}", "updates=1")
    meta = read_meta(tmp_path / "checkpoints" / "step_00000001")
    assert meta["config"]["distill"]["critic_updates"] == 2
    assert meta["versions"]["torch"] == torch.__version__
    assert (meta["processes"], meta["position"]) == (1, None)


def test_a_checkpoint_has_both_networks_both_optimizers_the_average_and_every_random_state(tmp_path):
    train(*TOY, QUIET, f"out={tmp_path}", "updates=1", "distill.ema_decay=0.9")
    newest = tmp_path / "checkpoints" / "step_00000001"
    saved = set(tensors_of(newest))
    weights = [name for name, _ in ToyDenoiser(ToyConfig(4, 4, 16, 1)).named_parameters()]
    expected = {f"{group}.{name}" for group in ("student", "critic", "ema") for name in weights}
    for network in ("student", "critic"):
        expected |= {f"{network}_optimizer.{w}.{key}" for w in weights for key in ("step", "exp_avg", "exp_avg_sq")}
    states = {"random.exit", "random.noise", "random.rank_00000.cpu"}
    states |= {"random.rank_00000.cuda"} if torch.cuda.is_available() else set()
    assert saved == expected | states


@pytest.mark.parametrize("length", [1, 2, 8])
def test_a_student_of_any_number_of_steps_trains_and_is_sampled(tmp_path, length):
    sigmas = [round(1 - i / 10, 1) for i in range(length)]
    train(*TOY, QUIET, f"out={tmp_path}", "updates=2", f"distill.sigmas={sigmas}", "log.preview_every=2")
    assert all(0 <= line["exit_step"] < length for line in curve(tmp_path))
    assert (tmp_path / "previews" / "step_00000002.mp4").is_file()


def test_the_bar_tells_loss_rate_and_time_left_on_the_first_process_alone(tmp_path, capsys):
    train(*TOY, QUIET, f"out={tmp_path}", "updates=3")
    bar = capsys.readouterr().err.rpartition("\r")[2]
    assert re.search(r"3/3 \[\d+:\d+<\d+:\d+, +[\d.]+(update/s|s/update), loss=[-\d.e]+\]", bar)
    other = dataclasses.replace(ALONE, rank=1, size=2)
    with RunLog(tmp_path / "other", other, 0, 3, lambda: pytest.fail("a tracker of its own")) as log:
        log.bar.update()
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "other").exists()


def test_the_preview_does_not_change_training(tmp_path):
    for name, every in (("with", 1), ("without", 0)):
        train(*TOY, QUIET, f"out={tmp_path / name}", "updates=3", f"log.preview_every={every}", "distill.ema_decay=0.5")
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
