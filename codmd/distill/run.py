"""One run from configuration to last checkpoint: assemble, resume, then update, log, preview and save."""

from __future__ import annotations

import gc
import os
import shutil
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from codmd import __version__

from .checkpoint import CheckpointStore, load, read_student, resolve
from .integrity import read_meta
from .job import Job, Trainer, assemble
from .log import RunLog
from .outside import only_run, stop_requests
from .parallel import Processes, processes
from .preview import to_pixels, write_preview
from .settings import RunConfig, differences
from .typed import ConfigError

PACKAGES = ("diffusers", "triton", "peft")


def run(config: RunConfig) -> bool:
    """Trains until the last update, or until SIGTERM asks for an end, which first saves a checkpoint.

    Returns:
        Whether all updates were made.

    Raises:
        ConfigError: the configuration cannot be used. CheckpointError: a checkpoint cannot be written or read.
        NonFiniteRun: too many updates in a row were not finite.
    """
    with processes(config.parallel) as team:
        try:
            return _train(config, team)
        finally:
            # Sharded networks keep their process groups in reference cycles, and a group that lives on into the
            # interpreter's end aborts the process there.
            gc.collect()


def _train(config: RunConfig, team: Processes) -> bool:
    """:func:`run` among the processes of `team`, in a scope that ends before their group does."""
    with only_run(config.folder, team), stop_requests() as stop:
        job = assemble(config, team)
        trainer = job.trainer
        notes: list[str] = []
        store = CheckpointStore(config.folder / "checkpoints", team, config.checkpoint.keep_last, notes.append)
        saved = resume(config, job, store, team, notes)
        with RunLog(config.folder, team, trainer.update, job.updates, config.log.tensorboard) as log:
            for note in notes:
                log.say(note)
            while trainer.update < job.updates and not any(team.gather(stop.is_set())):
                due = is_due(trainer.update + 1, config.log.every, job.updates)
                skipped = skipped_updates(trainer)
                measured = trainer.cycle(measure_gradients=due)
                log.bar.update()
                if skipped_updates(trainer) != skipped:
                    log.event(trainer.update, skipped=skipped_updates(trainer))
                if due:
                    log.scalars(
                        trainer.update, {**measured.scalars(), "skipped": sum(skipped_updates(trainer).values())}
                    )
                if config.log.preview_every and is_due(trainer.update, config.log.preview_every, job.updates):
                    preview(config, job, team, log)
                if is_due(trainer.update, config.checkpoint.every, job.updates):
                    saved = save(config, job, store, team)
            if saved != trainer.update:
                save(config, job, store, team)
        finished = trainer.update >= job.updates
        if config.mode == "teacher" and finished:
            export_teacher(config, job, store, team)
        return finished


def is_due(update: int, every: int, last: int) -> bool:
    """Whether something that happens `every` so many updates, and at the last one, happens at this one."""
    return update % every == 0 or update == last


def skipped_updates(trainer: Trainer) -> dict[str, int]:
    """Updates that the guards have skipped, by network."""
    return {name: optimizer.skipped for name, optimizer in trainer.optimizers.items()}


def save(config: RunConfig, job: Job, store: CheckpointStore, team: Processes) -> int:
    """Writes everything that training depends on; returns the update it belongs to."""
    trainer = job.trainer
    record = {
        "mode": config.mode,
        "position": None if job.positions is None else job.positions.position,
        "nonfinite": {name: [o.skipped, o.in_a_row] for name, o in trainer.optimizers.items()},
        "processes": team.size,
        "versions": {"codmd": __version__, "torch": str(torch.__version__), **{p: _version(p) for p in PACKAGES}},
        "config": config.as_mapping(),
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
    load(path, trainer.tensors(), team)
    elastic = restore_random_states(path, trainer, team, meta["processes"])
    trainer.update = meta["step"]
    for name, optimizer in trainer.optimizers.items():
        optimizer.skipped, optimizer.in_a_row = meta["nonfinite"][name]
    if job.positions is not None and meta["position"] is not None:
        job.positions.position = meta["position"]
    notes.append(f"continuing from {path}")
    notes += [f"changed since: {line}" for line in differences(meta["config"], config.as_mapping())]
    notes += [f"saved by {meta['processes']} processes, continued by {team.size}"] if elastic else []
    return trainer.update


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


def preview(config: RunConfig, job: Job, team: Processes, log: RunLog) -> None:
    """Samples of the running average where there is one; drawn by all processes, written by the first."""
    average = job.trainer.average
    with nullcontext() if average is None else average.applied():
        latents = job.draw_preview()
    if team.first:
        pixels = to_pixels(latents, job.decode)
        folder = config.folder / "previews"
        write_preview(folder, log.writer, job.trainer.update, latents, pixels, config.log.fps)


def export_teacher(config: RunConfig, job: Job, store: CheckpointStore, team: Processes) -> None:
    """Writes the trained teacher as a model that the option `weights` reads: `model` in the run's folder."""
    if team.first:
        weights = read_student(store.paths()[0], ema=job.trainer.average is not None)
        target, partial = config.folder / "model", config.folder / ".model.partial"
        _remove(partial)
        job.model.save_state(partial, weights)
        _remove(target)
        os.rename(partial, target)
    team.share(None)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
