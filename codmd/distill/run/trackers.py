"""Trackers of a run's numbers and previews: TensorBoard, Weights & Biases, MLflow, or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from codmd.atomic import replacing
from codmd.distill.config.typed import leaves

GROUPS = {
    "loss": ("loss", "dmd", "relation_batch", "relation_frame", "critic", "consistency", "diversity"),
    "watch": ("relation_to_dmd", "std_ratio", "frame_difference_ratio", "skipped", "dropped"),
    "gradient": ("student_grad_norm", "critic_grad_norm", "grad_norm", "tangent_norm", "derivative_norm"),
    "schedule": ("relation_weight", "exit_step", "lr", "warmth", "steps"),
}
"""Group to the scalars in it; all others are of the group "speed"."""


class Tracker(Protocol):
    """The interface of a tracker; only the first process has one."""

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Numbers of one update, named `group/name`."""
        ...

    def video(self, name: str, file: Path, frames: np.ndarray, fps: int, caption: str, update: int) -> None:
        """A video: an mp4 file, the same as frames [T, H, W, 3] of uint8, and what it shows."""
        ...

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        """A picture [H, W, 3] of uint8."""
        ...

    def close(self) -> None:
        """Ends the run's part of it."""
        ...


def grouped(name: str) -> str:
    """`group/name` of a scalar."""
    return f"{next((group for group, names in GROUPS.items() if name in names), 'speed')}/{name}"


def open_tracker(name: str, folder: Path, config: Mapping[str, Any], start: int) -> Tracker | None:
    """The tracker of a run; None for "none".

    Args:
        name: of `TRACKERS`, or "none".
        folder: of the run.
        config: of the run, as `RunConfig.as_mapping`.
        start: updates made before; what was tracked after them is dropped where the tracker can.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    return None if name == "none" else TRACKERS[name](folder, config, start)


class TensorBoard:
    """Event files in `tensorboard`; videos are moving pictures, prompts are texts."""

    def __init__(self, folder: Path, config: Mapping[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        rows = "".join(f"| {key} | {value} |\n" for key, value in leaves(config))
        self.writer.add_text("configuration", f"| key | value |\n|---|---|\n{rows}", start)

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, update)

    def video(self, name: str, file: Path, frames: np.ndarray, fps: int, caption: str, update: int) -> None:
        import imageio.v3 as imageio
        from tensorboard.compat.proto.summary_pb2 import Summary

        # An image summary may hold a GIF, which TensorBoard plays; its own add_video needs a package more.
        gif = imageio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
        height, width = frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), update)
        if caption:
            self.writer.add_text(f"{name}/prompts", caption, update)

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        self.writer.add_image(name, pixels, update, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def _known_run(place: Path) -> str | None:
    """The tracker's name of the run that is continued."""
    return json.loads(place.read_text("utf-8"))["id"] if place.is_file() else None


def _keep_run(place: Path, name: str) -> None:
    with replacing(place) as partial:
        partial.write_text(json.dumps({"id": name}) + "\n", "utf-8")


class Wandb:
    """A run of Weights & Biases called as the folder; project and mode by WANDB_PROJECT (codmd) and WANDB_MODE."""

    def __init__(self, folder: Path, config: Mapping[str, Any], start: int) -> None:
        import os

        import wandb

        place = folder / "wandb_run.json"
        known = _known_run(place)
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "codmd"),
            name=str(folder),
            dir=str(folder),
            config=dict(config),
            id=known,
            resume="allow",
        )
        _keep_run(place, self.run.id)
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")  # a continued run writes earlier updates again

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        self.run.log({"update": update, **values})

    def video(self, name: str, file: Path, frames: np.ndarray, fps: int, caption: str, update: int) -> None:
        import wandb

        self.run.log({"update": update, name: wandb.Video(str(file), caption=caption, format="mp4")})

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        import wandb

        self.run.log({"update": update, name: wandb.Image(pixels)})

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """A run of MLflow called as the folder; where it goes by MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, folder: Path, config: Mapping[str, Any], start: int) -> None:
        import mlflow

        place = folder / "mlflow_run.json"
        known = _known_run(place)
        run = mlflow.start_run(run_id=known, run_name=None if known else str(folder))
        _keep_run(place, run.info.run_id)
        self.mlflow: Any = mlflow
        if known is None:
            mlflow.log_params({key: str(value)[:6000] for key, value in leaves(config)})

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        self.mlflow.log_metrics(dict(values), step=update)

    def video(self, name: str, file: Path, frames: np.ndarray, fps: int, caption: str, update: int) -> None:
        self.mlflow.log_artifact(str(file), name)
        if caption:
            self.mlflow.log_text(caption, f"{name}/{file.stem}.md")

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        self.mlflow.log_image(pixels, f"{name}/step_{update:08d}.png")

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def caption_of(prompts: Sequence[str], columns: int) -> str:
    """The prompts of a tiled video, one a line, with row and column from 1."""
    return "\n".join(f"{i // columns + 1}.{i % columns + 1} {prompt}  " for i, prompt in enumerate(prompts))
