"""Trackers, rates and the printed configuration of a run."""

from __future__ import annotations

import functools
import json
import sys
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from train_cases import QUIET, TOY, curve, train

from codmd import cli
from codmd.distill.config.describe import described
from codmd.distill.config.run_config import read_config
from codmd.distill.run.speed import Speed, forward_flops
from codmd.distill.run.trackers import caption_of, grouped, open_tracker
from codmd.sample.video import write_latents

PACKAGED = {"toy": (), "textures_tiny": (), "wan_1.3b": ("lora.rank=8",)}


INTERFACES = {
    "wandb": {
        "init": "project name dir config id resume",
        "run.log": "data",
        "run.define_metric": "name step_metric",
        "run.finish": "",
        "Video": "data_or_path caption format",
        "Image": "data_or_path",
    },
    "mlflow": {
        "start_run": "run_id run_name",
        "log_params": "params",
        "log_metrics": "metrics step",
        "log_artifact": "local_path artifact_path",
        "log_text": "text artifact_file",
        "log_image": "image artifact_file",
        "end_run": "",
    },
}
"""What the stand-ins have: functions and the parameters that they take."""


class StandIn:
    """Notes every call on a library; refuses one that `INTERFACES` has not."""

    def __init__(self, library, calls, place=""):
        self.interface, self.library, self.calls, self.place = INTERFACES[library], library, calls, place
        self.id, self.info = "r1", SimpleNamespace(run_id="r1")

    def __getattr__(self, name):
        return functools.partial(self.call, self.place + name, self.interface[self.place + name].split())

    def call(self, function, parameters, /, *args, **kwargs):
        given = dict(zip(parameters, args, strict=False)) | kwargs
        assert len(args) <= len(parameters)
        assert set(given) <= set(parameters)
        self.calls.append((function, given))
        return StandIn(self.library, self.calls, "run.")


def told(tracker, tmp_path):
    """Numbers, a video with its prompts and a picture."""
    file = tmp_path / "step_00000003.mp4"
    file.write_bytes(b"mp4")
    tracker.scalars({"loss/loss": 0.5}, 3)
    tracker.video("preview/samples", file, np.zeros((2, 4, 4, 3), np.uint8), 8, "1.1 a cat", 3)
    tracker.picture("preview/frame_relation", np.zeros((4, 4, 3), np.uint8), 3)
    tracker.close()


@pytest.fixture
def calls(request, monkeypatch):
    monkeypatch.setitem(sys.modules, request.param, StandIn(request.param, calls := []))
    return calls


@pytest.mark.parametrize("calls", ["wandb"], indirect=True)
def test_wandb_is_told_everything_and_a_continued_run_is_the_same_one(tmp_path, calls):
    for _ in range(2):
        told(open_tracker("wandb", tmp_path, {"seed": 3}, 2), tmp_path)
    begun = [given for name, given in calls if name == "init"]
    assert [given["id"] for given in begun] == [None, "r1"]
    assert begun[0]["config"] == {"seed": 3}
    logged = [given["data"] for name, given in calls if name == "run.log"]
    assert {"update": 3, "loss/loss": 0.5} in logged
    assert all(entry["update"] == 3 for entry in logged)
    video = next(given for name, given in calls if name == "Video")
    assert video == {"data_or_path": str(tmp_path / "step_00000003.mp4"), "caption": "1.1 a cat", "format": "mp4"}


@pytest.mark.parametrize("calls", ["mlflow"], indirect=True)
def test_mlflow_is_told_everything_and_a_continued_run_is_the_same_one(tmp_path, calls):
    for _ in range(2):
        told(open_tracker("mlflow", tmp_path, {"distill": {"shift": 3.0}}, 2), tmp_path)
    names = [name for name, _ in calls]
    assert [given["run_id"] for name, given in calls if name == "start_run"] == [None, "r1"]
    assert names.count("log_params") == 1
    assert ("log_params", {"params": {"distill.shift": "3.0"}}) in calls
    assert ("log_metrics", {"metrics": {"loss/loss": 0.5}, "step": 3}) in calls
    assert ("log_text", {"text": "1.1 a cat", "artifact_file": "preview/samples/step_00000003.md"}) in calls
    assert names.count("end_run") == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_real_library_takes_it_offline(tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true",
                       "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri()}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    if name == "wandb":
        pytest.importorskip("PIL")
    tracker = open_tracker(name, tmp_path, {"seed": 3}, 0)
    for function, parameters in INTERFACES[name].items():
        real = tracker.run if function.startswith("run.") else sys.modules[name]
        assert set(parameters.split()) <= set(signature(getattr(real, function.removeprefix("run."))).parameters)
    told(tracker, tmp_path)
    made = "wandb/offline-run-*/files/media/videos/preview/*.mp4" if name == "wandb" else "mlruns/*/*/metrics/loss/loss"
    assert list(tmp_path.glob(made))


def test_a_tracker_that_is_not_installed_is_said_before_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("codmd.train_command.find_spec", lambda name: None)
    train(*TOY, "log.tracker=wandb", f"out={tmp_path / 'run'}", status=1)
    assert "log.tracker: wandb is not installed; pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["dmd", "rcm", "scm"])
def test_only_rates_and_memory_are_of_the_group_speed(tmp_path, method):
    options = (
        ["diversity_weight=0.1"] if method == "dmd" else [f"method={method}", "convention=rcm", "relation_weight=0"]
    )
    options = [f"distill.{option}" for option in [*options, "consistency.warmup=0"]]
    if method != "dmd":
        options += latents_of(tmp_path / "data")
    train(*TOY, QUIET, f"out={tmp_path / 'run'}", "updates=2", "log.every=1", *options)
    names = {name for line in curve(tmp_path / "run") for name in line} - {"update"}
    assert not [name for name in names if grouped(name).startswith("speed/")]


def latents_of(folder):
    folder.mkdir()
    for number in range(4):
        latents = torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(number))
        write_latents(folder / f"clip-{number}.safetensors", latents, "a prompt", number)
    return ["data.kind=latents", f"data.path={folder}"]


def test_prompts_of_a_tiled_video_have_their_places():
    assert caption_of(["a", "b", "c"], 2) == "1.1 a  \n1.2 b  \n2.1 c  "
    assert caption_of([], 4) == ""


# Rates


def test_forwards_with_a_gradient_count_three_times_in_the_arithmetic():
    network, frozen = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
    speed = Speed([network, frozen], samples=8, processes=2, device=torch.device("cpu"), flops=1e12, peak=4.0)
    x = torch.zeros(5, 3)
    network(x)
    frozen(x)
    with torch.no_grad():
        network(x)
    found = speed.scalars(seconds=0.5, updates=2)
    assert (found["samples_per_second"], found["forwards_per_second"]) == (16.0, 30.0)
    assert found["mfu"] == pytest.approx(1e12 * (5 * 3 + 5 + 5) / 1.0 / 4e12)
    assert found["peak_memory_gb"] > 0.05
    assert speed.scalars(0.5, 1)["forwards_per_second"] == 0


def test_the_flops_of_a_network_are_counted_with_its_attention():
    toy = read_config("toy").model
    size, width, blocks, frequencies = 8 * 6, 256, 3, 16
    expected = 2 * (2 * frequencies * width + size * width + blocks * 2 * width * width + width * size)
    assert forward_flops(toy) == expected
    wan = read_config("wan_tiny", ["data.path=p"]).model
    one, two, four = (forward_flops(wan.changed({"frames": n, "config": "tiny"}, "model")) for n in (2, 4, 8))
    tokens, layers, wide = 2 * 4 * 4, 2, 48
    assert four - 3 * two + 2 * one == 24 * layers * wide * tokens**2  # what grows with the square of the tokens


def test_a_run_with_a_known_rate_logs_its_share(tmp_path):
    train(*TOY, QUIET, f"out={tmp_path}", "updates=2", "log.peak_tflops=1e-3")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["mfu"] < 1000 and line["forwards_per_second"] > 0 for line in lines if "loss" in line)


# The configuration on paper


@pytest.mark.parametrize("name", PACKAGED)
def test_every_key_of_a_configuration_has_a_type_a_default_and_a_meaning(name):
    config = read_config(name, PACKAGED[name], complete=False)
    for key, _, text in described(config):
        kind, _, meaning = text.partition("; ")
        assert " default " in kind or kind.endswith(", required"), (key, text)
        assert meaning, key


def test_print_shows_resolved_values_and_a_run_keeps_them(tmp_path, capsys):
    assert cli.main(["train", "textures_tiny", "distill.shift=5", f"out={tmp_path}", "--print"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"model.weights: {tmp_path}/teacher/model" in "\n".join(printed)
    (line,) = [line for line in printed if line.startswith("distill.shift:")]
    assert line == "distill.shift: 5.0  # number, default 3.0; flow-matching shift of the training levels"
    assert list(tmp_path.iterdir()) == []
    train(*TOY, QUIET, f"out={tmp_path}", "updates=1")
    kept = (tmp_path / "config.yaml").read_text("utf-8").splitlines()
    (line,) = [line for line in kept if line.startswith("log.tracker:")]
    assert line.startswith("log.tracker: none  # tensorboard | wandb | mlflow | none, default tensorboard; where")
