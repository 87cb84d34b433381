"""One run's configuration: the recipe and everything around it, typed, checked and printable."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from codmd.models.lora import LoraOptions

from .recipe import DistillConfig, check_count
from .sections import (
    CheckpointSettings,
    DataSettings,
    LogSettings,
    ModelSettings,
    ParallelSettings,
    TeacherSettings,
    WatchSettings,
)
from .typed import ConfigError, leaves, nearest, structured

SHORTEST = 3
"""Characters of a value that is looked for in messages: fewer are part of everything."""
MISSING = "???"
"""A value that a configuration leaves to its reader."""
PACKAGED = resources.files("codmd") / "configs"


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on.

    Attributes:
        out: the run's folder.
        mode: "distill", or "teacher" to train the teacher first (in the folder `teacher` of `out`).
        seed: of weights, noise, exit steps and the order of the data.
        updates: student updates.
        resume: "auto" continues from the newest complete checkpoint of the run, if there is one; "none" starts
            anew and refuses a folder that has checkpoints; anything else is the path of a checkpoint.
        model: the adapter and its options; student and critic start as this teacher.
        teacher_model: options in which the frozen network differs: the teacher, with `lora` the shared base.
        lora: train low-rank adapters over one shared base instead of two whole networks; null for whole networks.
    """

    out: str
    model: ModelSettings
    mode: Literal["distill", "teacher"] = "distill"
    seed: int = 0
    updates: int = 1000
    resume: str = "auto"
    teacher_model: dict[str, Any] = field(default_factory=dict)
    lora: LoraOptions | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    data: DataSettings = field(default_factory=DataSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)

    def __post_init__(self) -> None:
        check_count("updates", self.updates, 1)
        check_count("seed", self.seed, 0)
        self._agree_on_expert()
        if not self.out:
            raise ValueError("out: got ''; expected the run's folder")
        if self.mode == "teacher" and self.data.kind != "textures":
            raise ValueError(
                f"mode: a teacher learns from videos, which data.kind {self.data.kind!r} has not; expected textures"
            )
        if self.mode == "teacher" and self.watch.every:
            raise ValueError("watch.every: watches students beside their teacher; expected 0 in mode teacher")
        if self.distill.method != "dmd" and self.mode == "distill" and self.data.kind not in ("latents", "textures"):
            raise ValueError(
                f"distill.method: {self.distill.method} learns from videos, which data.kind {self.data.kind!r} "
                "has not; expected latents or textures"
            )
        if self.distill.method != "dmd" and self.parallel.context > 1:
            raise ValueError(
                f"parallel.context: distill.method {self.distill.method} needs a tangent, which Ulysses does not "
                "carry; expected 1"
            )
        if self.lora is not None and self.parallel.offload_teacher:
            raise ValueError("parallel.offload_teacher: with lora the teacher is the shared base, which stays")
        if self.lora is not None and self.distill.critic_mixing > 0:
            raise ValueError(
                "distill.critic_mixing: the average of two adapters' factors is not that of their products"
            )
        self.model.changed(self.teacher_model, "teacher_model")

    def _agree_on_expert(self) -> None:
        """Makes `model` the expert that the recipe names."""
        expert, named = self.distill.expert or "", getattr(self.model.options, "expert", "")
        if expert and not hasattr(self.model.options, "expert"):
            raise ValueError(f"distill.expert: model {self.model.name} has no experts; expected null")
        if named not in ("", expert) or "expert" in self.teacher_model:
            raise ValueError("model.expert: distill.expert names it, for all networks of a run")
        if expert and self.mode == "teacher":
            raise ValueError("distill.expert: mode teacher trains one network for all levels; expected null")
        if expert and self.watch.every:
            raise ValueError("watch.every: watches whole students beside their teacher; expected 0 with distill.expert")
        if expert:
            object.__setattr__(self, "model", self.model.changed({"expert": expert}, "model"))

    @property
    def frozen(self) -> ModelSettings:
        """The network that is not trained: the teacher, with `lora` the base of the adapters."""
        return self.model.changed(self.teacher_model, "teacher_model")

    @property
    def folder(self) -> Path:
        """The folder of this run: `out`, or its folder `teacher`."""
        return Path(self.out) / "teacher" if self.mode == "teacher" else Path(self.out)

    def as_mapping(self) -> dict[str, Any]:
        """The configuration as it would stand in a file, with every default."""
        values = dataclasses.asdict(self)
        model = values.pop("model")
        return {**values, "model": {"name": model["name"], **model["options"]}}


def read_config(source: str, overrides: Sequence[str] = (), complete: bool = True) -> RunConfig:
    """The configuration of a YAML file, or of a packaged one by its bare name, with `key=value` overrides.

    Values may refer to others (`${out}`), to the environment (`${oc.env:HOME}`) and to the folder of the packaged
    files (`${packaged}`).

    Args:
        complete: refuse values that the file leaves to its reader (`???`); else they stay as they are.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not allowed.
    """
    path = find_config(source)
    try:
        return _read(path, overrides, complete)
    except ConfigError as error:
        raise ConfigError(without_environment(str(error), path, overrides)) from None


def without_environment(message: str, path: Path, overrides: Sequence[str]) -> str:
    """A message that says `${oc.env:NAME}` where it held the value of that variable, which may be a secret."""
    text = "\n".join([path.read_text("utf-8", "replace"), *overrides]) if path.is_file() else ""
    for name in set(re.findall(r"\$\{oc\.env:\s*(\w+)", text)):
        if len(value := os.environ.get(name, "")) >= SHORTEST:
            for shown in (repr(value), repr(value)[1:-1], value):
                message = message.replace(shown, f"${{oc.env:{name}}}")
    return message


def _read(path: Path, overrides: Sequence[str], complete: bool) -> RunConfig:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"override: got {override!r}; expected key=value")
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: holds a list; expected sections with keys")
        merged = OmegaConf.merge({"packaged": str(PACKAGED)}, loaded, OmegaConf.from_dotlist(list(overrides)))
        missing = sorted(OmegaConf.missing_keys(merged)) if complete else []
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    assert isinstance(values, dict)
    if values.get("mode") == "teacher" and any(override.startswith("updates=") for override in overrides):
        raise ConfigError("updates: counts the student's; those of a teacher are teacher.updates")
    problems = [not_given(key) for key in missing]
    try:
        config = structured(RunConfig, {name: value for name, value in values.items() if name != "packaged"})
    except ConfigError as error:
        known = tuple(f"{key}: " for key in missing)
        problems += [problem for problem in error.problems if not problem.startswith(known)]
    if problems:
        raise ConfigError(*problems)
    return config


def not_given(key: str) -> str:
    """The problem of a value that a configuration leaves to its reader (`???`)."""
    return f"{key}: not given; add {key}=... to the command"


def find_config(source: str) -> Path:
    """The file of a configuration: a path, or the bare name of a packaged one."""
    path = Path(source)
    if path.is_file():
        return path
    packaged = {entry.name.removesuffix(".yaml"): entry for entry in PACKAGED.iterdir() if entry.name.endswith(".yaml")}
    if source in packaged:
        return Path(str(packaged[source]))
    raise ConfigError(f"{source}: no such file, nor a packaged configuration; {nearest(source, sorted(packaged))}")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` of every leaf that two configurations (`as_mapping`) do not share."""
    old, new = dict(leaves(before)), dict(leaves(now))
    keys = [key for key in {**old, **new} if _plain(old.get(key)) != _plain(new.get(key))]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
