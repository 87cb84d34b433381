"""The sections around the recipe in a run's configuration: each a dataclass that checks its own values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from codmd import models

from .recipe import check_count, check_decays, check_number
from .typed import ConfigError, nearest, structured


@dataclass(frozen=True)
class ModelSettings:
    """An adapter of `codmd.models.REGISTRY` and its options, in the type that the adapter declares."""

    name: str
    options: Any

    @classmethod
    def from_mapping(cls, values: object, where: str) -> ModelSettings:
        """The section `model:`: a name, and beside it the options of that adapter."""
        if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
            raise ConfigError(f"{where}.name: not given; expected one of {', '.join(models.REGISTRY)}")
        name = values["name"]
        if name not in models.REGISTRY:
            raise ConfigError(f"{where}.name: got {name!r}; {nearest(name, models.REGISTRY)}")
        options = {key: value for key, value in values.items() if key != "name"}
        return cls(name, structured(models.options_class(name), options, where))

    def changed(self, changes: Mapping[str, Any], where: str) -> ModelSettings:
        """The same adapter with some options changed."""
        return self.from_mapping({"name": self.name, **dataclasses.asdict(self.options), **changes}, where)


@dataclass(frozen=True)
class TeacherSettings:
    """Training of a teacher by flow matching (`mode: teacher`).

    Attributes:
        updates: optimizer steps.
        weights: what the teacher starts from, an option of the model; "random" for a fresh one.
        batch_size, micro_batch: as in the recipe.
        shift: flow-matching shift of the training levels.
        lr: highest learning rate, after a linear warm-up, before a cosine decay to 0.
        warmup: updates of the warm-up.
        betas, weight_decay, grad_clip, ema_decay, max_nonfinite: as in the recipe.
        drop_condition: share of samples that train without their condition, for guidance.
    """

    updates: int = 10_000
    weights: str = "random"
    batch_size: int = 64
    micro_batch: int | None = None
    shift: float = 3.0
    lr: float = 1e-3
    warmup: int = 200
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    ema_decay: float | None = None
    max_nonfinite: int = 10
    drop_condition: float = 0.1

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "micro_batch", "max_nonfinite"):
            check_count(name, getattr(self, name), 1)
        check_count("warmup", self.warmup, 0)
        for name in ("shift", "lr", "grad_clip"):
            check_number(name, getattr(self, name), positive=True)
        check_number("weight_decay", self.weight_decay, positive=False)
        check_decays("betas", self.betas)
        if self.ema_decay is not None:
            check_decays("ema_decay", (self.ema_decay,))
        if not 0 <= self.drop_condition <= 1:
            raise ValueError(f"drop_condition: got {self.drop_condition}; expected a share from 0 to 1")


@dataclass(frozen=True)
class DataSettings:
    """Conditions of the student; the videos of a teacher.

    Attributes:
        kind: "none" (an unconditional model), "prompts" (a file of them, with or without images, encoded as they
            come), "embeddings" (the folder that `codmd encode` wrote), "latents" (a folder of `codmd sample --latents`)
            or "textures" (pans and zooms over photographs). The last two are videos, which a teacher, rcm and scm learn
            from.
        path: of the file or folder.
        embeddings: of "latents": what `codmd encode` wrote for their prompts; empty for an unconditional model.
        zoom: of "textures": pixels of a photograph per pixel of a video.
    """

    kind: Literal["none", "prompts", "embeddings", "latents", "textures"] = "none"
    path: str = ""
    embeddings: str = ""
    zoom: float = 4.0

    def __post_init__(self) -> None:
        needs = self.kind in ("prompts", "embeddings", "latents")
        if needs != bool(self.path):
            raise ValueError(
                f"path: got {self.path!r}; data of kind {self.kind!r} {'needs' if needs else 'has'} "
                f"{'one' if needs else 'none'}"
            )
        if self.embeddings and self.kind != "latents":
            raise ValueError(f"embeddings: got {self.embeddings!r}; data of kind {self.kind!r} has none beside it")
        check_number("zoom", self.zoom, positive=True)


@dataclass(frozen=True)
class ParallelSettings:
    """The layout of networks over the processes that torchrun started.

    Attributes:
        shard_size: processes that share one copy of the weights (FSDP2); None for all of them. Fewer than all make
            a hybrid mesh: sharded within groups of that size, replicated between them.
        context: consecutive processes that hold the same samples: inside the networks each computes its part of the
            tokens (Ulysses), at the losses each has the whole latents. For videos whose activations fill one GPU.
        compute: dtype of the gathered weights of a sharded network; gradients are reduced in float32.
        reshard: free gathered weights between forward and backward; false is faster and takes the memory.
        offload_teacher: keep the teacher's shards in host memory.
        timeout_minutes: after which a process that waits for the others gives up.
        threads: of the CPU, for each process; None leaves PyTorch's choice. Networks of few parameters are fastest
            on one, and a busy machine slows several threads that wait for each other far more than one.
    """

    shard_size: int | None = None
    context: int = 1
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    reshard: bool = True
    offload_teacher: bool = False
    timeout_minutes: float = 30.0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_count("shard_size", self.shard_size, 1)
        check_count("context", self.context, 1)
        check_count("threads", self.threads, 1)
        check_number("timeout_minutes", self.timeout_minutes, positive=True)


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written.

    Attributes:
        every: updates between checkpoints; one more is written at the end.
        keep_last: how many of the newest stay.
    """

    every: int = 100
    keep_last: int = 3

    def __post_init__(self) -> None:
        for name in ("every", "keep_last"):
            check_count(name, getattr(self, name), 1)


@dataclass(frozen=True)
class WatchSettings:
    """Early warnings, on the samples of previews beside the teacher's of the same prompts and noise.

    Attributes:
        every: updates between looks, besides one before every checkpoint; 0 looks never.
        band: lowest and highest ratio to the teacher's value that is no warning.
        stop_on: what a measure that leaves its band does to the run: "nothing" but a warning, "end" after a
            checkpoint, or "rollback": end with the best checkpoint as the newest, later ones set aside.
    """

    every: int = 0
    band: tuple[float, float] = (0.8, 1.25)
    stop_on: Literal["nothing", "end", "rollback"] = "nothing"

    def __post_init__(self) -> None:
        check_count("every", self.every, 0)
        low, high = self.band
        if not 0 < low < 1 < high < math.inf:
            raise ValueError(f"band: got ({low}, {high}); expected a number in (0, 1) and a finite one above 1")
        if self.stop_on != "nothing" and not self.every:
            raise ValueError(f"stop_on: {self.stop_on!r} needs looks; set every")


@dataclass(frozen=True)
class LogSettings:
    """Log, tracker and previews of a run.

    Attributes:
        every: updates between lines of the log and points of the tracker.
        preview_every: updates between previews; 0 writes none.
        preview_prompts: for conditional models; empty takes the first of the data.
        preview_samples: videos of a preview where no prompts count them.
        fps: of preview videos.
        tracker: where the log, the previews and the configuration go beside the JSON lines.
        peak_tflops: of the device, for the model FLOPs utilisation (MFU); null takes that of a known GPU.
    """

    every: int = 10
    preview_every: int = 0
    preview_prompts: tuple[str, ...] = ()
    preview_samples: int = 4
    fps: int = 8
    tracker: Literal["tensorboard", "wandb", "mlflow", "none"] = "tensorboard"
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        for name in ("every", "preview_samples", "fps"):
            check_count(name, getattr(self, name), 1)
        check_count("preview_every", self.preview_every, 0)
        check_number("peak_tflops", self.peak_tflops, positive=True)
