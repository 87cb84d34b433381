"""The state of a run beside its weights in a checkpoint: save, find, resume."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from codmd import __version__
from codmd.distill.config.run_config import RunConfig, differences
from codmd.distill.config.typed import ConfigError

from .checkpoint import CheckpointStore, is_sound, load, resolve
from .identity import check_identity
from .integrity import CheckpointError, read_meta
from .job import Job, Trainer
from .parallel import Processes
from .watch import Watch

PACKAGES = ("diffusers", "triton", "peft")


def skipped_updates(trainer: Trainer) -> dict[str, int]:
    """Updates that the guards have skipped, by network."""
    return {name: optimizer.skipped for name, optimizer in trainer.optimizers.items()}


def save(config: RunConfig, job: Job, store: CheckpointStore, team: Processes, watch: Watch | None = None) -> int:
    """Writes everything that training depends on; returns the update it belongs to."""
    trainer = job.trainer
    record = {
        "mode": config.mode,
        "position": None if job.positions is None else job.positions.position,
        "nonfinite": {name: [o.skipped, o.in_a_row] for name, o in trainer.optimizers.items()},
        "processes": team.size,
        "versions": {"codmd": __version__, "torch": str(torch.__version__), **{p: _version(p) for p in PACKAGES}},
        "config": config.as_mapping(),
        "identity": job.identity,
        "watch": {} if watch is None else watch.record(trainer.update),
    }
    store.save(trainer.update, {**trainer.tensors(), **random_states(trainer, team)}, record)
    return trainer.update


def resume(config: RunConfig, job: Job, store: CheckpointStore, team: Processes, notes: list[str]) -> int | None:
    """Continues from the checkpoint that `config.resume` means; returns its update, None for a fresh start."""
    path = find_checkpoint(config, store, team)
    if path is None:
        return None
    trainer, meta = job.trainer, read_meta(path)
    if meta["mode"] != config.mode:
        raise ConfigError(f"resume: {path} is of mode {meta['mode']}, this run of mode {config.mode}")
    check_identity(meta.get("identity", {}), job.identity, path, config.lora is not None)
    load(path, trainer.tensors(), team)
    elastic = restore_random_states(path, trainer, team, meta["processes"])
    trainer.update = meta["step"]
    for name, optimizer in trainer.optimizers.items():
        if name not in meta["nonfinite"]:
            raise CheckpointError(f"checkpoint {path}: nonfinite has no counts of the {name}")
        optimizer.skipped, optimizer.in_a_row = meta["nonfinite"][name]
    if job.positions is not None and meta["position"] is not None:
        job.positions.position = meta["position"]
    notes.append(f"continuing from {path}")
    notes += [f"changed since: {line}" for line in differences(meta["config"], config.as_mapping())]
    if not is_sound(path) and (sound := team.share(store.sound())):
        notes.append(f"saved among updates that were not finite; {before_streak(sound)}")
    notes += [f"saved by {meta['processes']} processes, continued by {team.size}"] if elastic else []
    return trainer.update


def before_streak(sound: Path) -> str:
    """Advice for continuing from the last checkpoint before updates were not finite."""
    return f"{sound} is from before them: resume={sound} out=ANOTHER_FOLDER"


def find_checkpoint(config: RunConfig, store: CheckpointStore, team: Processes) -> Path | None:
    """The checkpoint to continue from."""
    if config.resume == "auto":
        return store.newest()
    if config.resume == "none":
        if team.share(store.paths()):
            raise ConfigError(f'resume: {store.folder} has checkpoints; "auto" continues them, another out starts anew')
        return None
    path = resolve(Path(config.resume), team)
    newer = [other for other in team.share(store.paths()) if other.resolve() != path.resolve()]
    if newer and (path.parent.resolve() != store.folder.resolve() or newer[0] > path):
        raise ConfigError(
            f"resume: {store.folder} has checkpoints of its own; choose another out, or remove {newer[0]}"
        )
    return path


def random_states(trainer: Trainer, team: Processes) -> dict[str, Tensor]:
    """States of the run's generators, alike everywhere, and of this process's global ones."""
    states = {f"random.{name}": generator.get_state() for name, generator in trainer.generators().items()}
    own = f"random.rank_{team.rank:05d}"
    states[f"{own}.cpu"] = torch.get_rng_state()
    if team.device.type == "cuda":
        states[f"{own}.cuda"] = torch.cuda.get_rng_state(team.device)
    return states


def restore_random_states(path: Path, trainer: Trainer, team: Processes, saved_by: int) -> bool:
    """Restores the generators; returns whether this process's global ones are fresh, for want of a saved state."""
    states = random_states(trainer, team)
    fresh = saved_by != team.size
    if fresh:
        states = {name: state for name, state in states.items() if ".rank_" not in name}
    load(path, states, team)
    for name, generator in trainer.generators().items():
        generator.set_state(states[f"random.{name}"])
    own = f"random.rank_{team.rank:05d}"
    if f"{own}.cpu" in states:
        torch.set_rng_state(states[f"{own}.cpu"])
    if f"{own}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{own}.cuda"], team.device)
    return fresh


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
