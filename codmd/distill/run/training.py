"""One run from configuration to last checkpoint: assemble, resume, then update, log, preview and save."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import Tensor

from codmd import hub, models
from codmd.atomic import replacing
from codmd.distill.config.describe import describe
from codmd.distill.config.run_config import RunConfig
from codmd.distill.update.optimizer import NonFiniteRun

from .checkpoint import CheckpointStore, read_student
from .integrity import read_meta
from .job import Job, assemble
from .lock import only_run
from .log import RunLog, say
from .parallel import Processes, processes
from .preview import to_pixels, write_preview
from .resume import before_streak, resume, save, skipped_updates
from .roles import RANDOM
from .speed import Speed, forward_flops, peak_tflops
from .stop import stop_requests
from .trackers import Tracker, open_tracker
from .watch import LeftBand, Watch

RANDOM_WEIGHTS = "its teacher has random weights"
FIRST_VIDEO = "codmd train textures_tiny mode=teacher"


def run(config: RunConfig) -> int:
    """Trains until the last update, or until SIGTERM or Ctrl-C asks for an end, which first saves a checkpoint.

    Returns:
        The number of the signal that ended the run; 0 when all updates were made.

    Raises:
        ConfigError: the configuration cannot be used. CheckpointError: a checkpoint cannot be written or read.
        NonFiniteRun: too many updates in a row were not finite. LeftBand: `watch.stop_on` ended the run.
    """
    with processes(config.parallel) as team:
        try:
            return _train(config, team)
        finally:
            # Sharded networks keep their process groups in reference cycles, and a group that lives on into the
            # interpreter's end aborts the process there.
            gc.collect()


def _train(config: RunConfig, team: Processes) -> int:
    """:func:`run` among the processes of `team`, in a scope that ends before their group does."""
    with only_run(config.folder, team):
        job = assemble(config, team)
        if team.first:
            write_configuration(config)
        notes: list[str] = []
        store = CheckpointStore(config.folder / "checkpoints", team, config.checkpoint.keep_last, notes.append)
        saved = resume(config, job, store, team, notes)
        if untaught(config):
            notes.append(f"{RANDOM_WEIGHTS}: the numbers test the loop and say nothing of a method")
        notes += undistilled(config)
        for note in notes:
            say(note, team)
        begun = job.trainer.update
        stopped = _updates(config, job, store, team, saved)
        if not stopped and config.mode == "teacher":
            export_teacher(config, job, store, team)
        if team.first:
            say(ended(config, job, store.paths()[0], begun, stopped), team)
        return stopped


def write_configuration(config: RunConfig) -> None:
    """The resolved configuration, every key with type, default and meaning: `config.yaml` in the run's folder."""
    with replacing(config.folder / "config.yaml") as partial:
        partial.write_text(describe(config) + "\n", "utf-8")


def _updates(config: RunConfig, job: Job, store: CheckpointStore, team: Processes, saved: int | None) -> int:
    """Makes the updates that are left, and saves; returns the signal that ended them."""
    trainer, stopped, begun = job.trainer, 0, job.trainer.update

    def tracker() -> Tracker | None:
        return open_tracker(config.log.tracker, config.folder, config.as_mapping(), begun)

    watch = watch_of(config, job, store, saved)
    with (
        stop_requests() as stop,
        naming_sound(store),
        RunLog(config.folder, team, trainer.update, job.updates, tracker, speed_of(config, job, team)) as log,
    ):
        while trainer.update < job.updates and not (stopped := max(team.gather(stop.signal))):
            due = is_due(trainer.update + 1, config.log.every, job.updates)
            skipped = skipped_updates(trainer)
            measured = trainer.cycle(measure_gradients=due)
            log.bar.update()
            if skipped_updates(trainer) != skipped:
                log.event(trainer.update, skipped=skipped_updates(trainer))
            if due:
                log.scalars(trainer.update, {**measured.scalars(), "skipped": sum(skipped_updates(trainer).values())})
            if config.log.preview_every and is_due(trainer.update, config.log.preview_every, job.updates):
                preview(config, job, team, log)
            saving = is_due(trainer.update, config.checkpoint.every, job.updates)
            leaving = ""
            if watch is not None and (saving or trainer.update % config.watch.every == 0):
                leaving = look(watch, trainer.update, team, log)
            if saving or (leaving and config.watch.stop_on != "nothing"):
                saved = save(config, job, store, team, watch)
            if leaving and config.watch.stop_on != "nothing":
                raise LeftBand(ended_by_watch(config, store, leaving))
        if saved != trainer.update:
            save(config, job, store, team, watch)
    return stopped


def watch_of(config: RunConfig, job: Job, store: CheckpointStore, saved: int | None) -> Watch | None:
    """The watch of this run, in the state of its checkpoint; None unless asked for."""
    if not config.watch.every or job.draw_teacher is None:
        return None
    watch = Watch(config.watch, lambda: preview_latents(job), job.draw_teacher())
    if saved is not None:
        newest = next((path for path in store.paths() if path.name.endswith(f"{saved:08d}")), None)
        watch.restore({} if newest is None else read_meta(newest).get("watch", {}))
    return watch


def look(watch: Watch, update: int, team: Processes, log: RunLog) -> str:
    """One look, in the log; says and returns what left its band, on every process as on the first."""
    reading, leaving = watch.look(update)
    log.watched(update, reading._asdict(), leaving)
    low, high = watch.settings.band
    left = " and ".join(f"{name} {getattr(reading, name):.3g}" for name in leaving)
    message = f"update {update}: {left} left the band of {low:g} to {high:g} times the teacher's" if left else ""
    message = team.share(message)
    if message:
        say(message, team)
    return message


def ended_by_watch(config: RunConfig, store: CheckpointStore, leaving: str) -> str:
    """Rolls back if asked to; what the run says at its end."""
    best = store.processes.share(store.best())
    if best is None:
        return f"{leaving}. No checkpoint before was looked at; a smaller checkpoint.every keeps one"
    if config.watch.stop_on == "end":
        return f"{leaving}. The best checkpoint is {best}; the same command goes on from here"
    store.roll_back(best)
    return (
        f"{leaving}. Rolled back to the best checkpoint, {best}, which `codmd sample {config.folder}` takes; later "
        "ones are set aside. Change the recipe before going on from it"
    )


def speed_of(config: RunConfig, job: Job, team: Processes) -> Speed:
    """Counts what the networks of a run do; FLOPs where the device's rate is known."""
    roles = (getattr(job.trainer, name, None) for name in ("teacher", "student", "critic", "model", "resting"))
    samples = (config.teacher if config.mode == "teacher" else config.distill).batch_size
    peak = config.log.peak_tflops or peak_tflops(team.device)
    # Processes that share a sample share its arithmetic.
    flops = forward_flops(config.model) / config.parallel.context if peak and team.first else None
    networks = [network for network in roles if network is not None]
    return Speed(networks, samples, team.data_size, team.device, flops, peak)


def ended(config: RunConfig, job: Job, checkpoint: Path, begun: int, stopped: int) -> str:
    """The last lines of a run: its results, and the next commands.

    Args:
        checkpoint: its newest.
        begun: updates made before this process began.
        stopped: the signal that ended it, 0 for none.
    """
    made = f"{job.trainer.update} of {job.updates} updates, {checkpoint}"
    if stopped:
        return f"stopped by {signal.Signals(stopped).name}: {made}; the same command continues"
    finished = "finished before, nothing to do" if begun >= job.updates else "finished"
    if config.mode == "teacher":
        model = config.folder / "model"
        return f"{finished}: {made}, {model}; next: codmd train CONFIG model.weights={model}"
    if untaught(config):
        return f"{finished}: {made}; {RANDOM_WEIGHTS}, so there is nothing to see; a first video: {FIRST_VIDEO}"
    prompts = "" if config.data.kind == "textures" else " --prompts PROMPTS"
    return f"{finished}: {made}; next: codmd sample {config.folder}{prompts} --out VIDEOS"


def untaught(config: RunConfig) -> bool:
    """Whether a distillation has a teacher of random weights: it tests the loop alone."""
    return config.mode == "distill" and config.frozen.options.weights == RANDOM


def undistilled(config: RunConfig) -> list[str]:
    """What is to be said of the high-noise expert that makes the first steps of a low-noise student, from a folder."""
    weights = config.frozen.options.weights
    if config.distill.expert != "low" or weights == RANDOM or hub.is_repository(weights):
        return []
    known = models.adapter(config.model.name).student_sigmas(Path(weights))
    if known == config.distill.sigmas:
        return []
    kind = f"a student's of other steps, {known}" if known else "no student's"
    return [f"the high-noise expert of {weights} is {kind}: distil it first, then give its pipeline as model.weights"]


@contextmanager
def naming_sound(store: CheckpointStore) -> Iterator[None]:
    """A run that ends because updates are not finite names the checkpoint from before them."""
    try:
        yield
    except NonFiniteRun as error:
        sound = store.sound()
        raise NonFiniteRun(f"{error}; {before_streak(sound)}" if sound else str(error)) from error


def is_due(update: int, every: int, last: int) -> bool:
    """Whether something that happens `every` so many updates, and at the last one, happens at this one."""
    return update % every == 0 or update == last


def preview(config: RunConfig, job: Job, team: Processes, log: RunLog) -> None:
    """The fixed samples as video; drawn by all processes, written by the first."""
    latents = preview_latents(job)
    if team.first:
        pixels = to_pixels(latents, job.decode)
        folder = config.folder / "previews"
        write_preview(folder, log.tracker, job.trainer.update, latents, pixels, config.log.fps, job.preview_prompts)


def preview_latents(job: Job) -> Tensor:
    """Samples of the fixed prompts and noise, of the running average where there is one."""
    average = job.trainer.average
    with nullcontext() if average is None else average.applied():
        return job.draw_preview()


def export_teacher(config: RunConfig, job: Job, store: CheckpointStore, team: Processes) -> None:
    """Writes the trained teacher as a model that the option `weights` reads: `model` in the run's folder."""
    if team.first:
        weights = read_student(store.paths()[0], ema=job.trainer.average is not None)
        with replacing(config.folder / "model") as partial:
            job.model.save_state(partial, weights)
    team.share(None)
