"""The relation term on real pixels: a Wan teacher, its DMD and CoDMD students, and the differences between them.

    python -m benchmarks.convergence [--stage teacher|students|measure|all] [--seeds 1 2] [--minutes 9] [KEY=VALUE ...]
                                     [--work DIR] [--out DIR] [--jobs N] [--videos N] [--tiny]

`codmd train` trains everything (benchmarks/convergence.yaml: 9 million parameters, pans and zooms over photographs): a
teacher, then for every seed a DMD and a CoDMD student that differ in `relation_weight` alone, side by side on one GPU.
What is complete in `--work` stays, what is not is continued; after `--minutes` runs save and the command ends with
status 75: start it again. `measure` compares 4-step samples with the teacher's 50 steps of guidance and writes
convergence.json, .md and .png.

On an H200, estimated and not yet measured: teacher 4 minutes, four students together 6, measures 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import convergence_report
from benchmarks import whole_network as network
from benchmarks.convergence_measures import measure
from codmd.cli import INTERRUPTED
from codmd.distill.config.run_config import RunConfig, differences, read_config
from codmd.distill.config.typed import ConfigError
from codmd.distill.run.integrity import CheckpointError, read_meta
from codmd.train_command import STOPPED

HERE = Path(__file__).resolve().parent
CONFIG, NETWORK = HERE / "convergence.yaml", HERE / "convergence_network.json"
STAGES = ("teacher", "students", "measure")
UNFINISHED = 75
MEASURE_S = 120
"""What measuring is taken to last, of the time that a command has which also trained."""
STOPPED_BY_US = (STOPPED, INTERRUPTED, -signal.SIGTERM)
"""How `codmd train` ends on SIGTERM: after a checkpoint, or before its first update."""

TINY = (
    "model.frames=4", "model.height=8", "model.width=8", "model.compute=float32", "updates=4", "teacher.updates=12",
    "teacher.batch_size=4", "teacher.warmup=2", "distill.batch_size=4", "distill.critic_updates=1", "log.every=2",
)  # fmt: skip
"""Overrides of `--tiny`; the network is the packaged one of `textures_tiny`."""


@dataclass(frozen=True)
class Run:
    """One training: its name, what `codmd train` gets after the configuration's name, and the same, read."""

    name: str
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def updates(self) -> int:
        return self.config.teacher.updates if self.config.mode == "teacher" else self.config.updates

    def finished(self) -> bool:
        """Whether its last checkpoint is there, and the teacher's exported weights.

        Raises:
            SystemExit: it was made with other settings.
        """
        checkpoint = self.config.folder / "checkpoints" / f"step_{self.updates:08d}"
        try:
            meta = read_meta(checkpoint)
        except CheckpointError:
            return False
        changed = differences(meta["config"], self.config.as_mapping())
        if changed:
            raise SystemExit(f"error: {checkpoint} was made with other settings ({changed[0]}); give another --work")
        return self.config.mode != "teacher" or (self.config.folder / "model" / "config.json").is_file()


def plan(
    work: Path, seeds: Sequence[int], changes: Sequence[str], tiny: bool
) -> tuple[Run, dict[tuple[str, int], Run]]:
    """The teacher's run, and the students' by arm and seed.

    Raises:
        SystemExit: naming what is wrong with the changes.
    """
    work = work.resolve()
    shared = (
        f"model.weights={work / 'teacher' / 'model'}",
        f"model.config={'${packaged}/textures_network.json' if tiny else NETWORK}",
        *(TINY if tiny else ()),
        *changes,
    )

    def run(name: str, *own: str, of: Sequence[str] = shared) -> Run:
        overrides = (*of, *own)
        return Run(name, overrides, read_config(str(CONFIG), overrides))

    students = {}
    try:
        without_students = [change for change in shared if not change.startswith("updates=")]
        teacher = run("teacher", f"out={work}", "mode=teacher", of=without_students)
        for seed in seeds:
            for arm, own in {"dmd": ("distill.relation_weight=0",), "codmd": ()}.items():
                name = f"{arm}-{seed}"
                students[arm, seed] = run(name, f"out={work / name}", f"seed={seed}", *own)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    if not teacher.config.distill.uses_relation:
        raise SystemExit("error: distill: the relation term is off, so that all students would be DMD's")
    return teacher, students


def train(runs: Sequence[Run], work: Path, jobs: int, deadline: float) -> list[str]:
    """Starts or continues what is not finished, `jobs` at a time, and stops it at `deadline` (`time.monotonic`).

    Returns:
        Names of the runs that are not finished then.

    Raises:
        SystemExit: a run failed; the end of its log is in the message.
    """
    waiting = [run for run in runs if not run.finished()]
    with children() as active:
        while (waiting or active) and time.monotonic() < deadline:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                print(f"{run.name}: {run.updates} updates, log in {work / run.name}.txt", flush=True)
                active[run.name] = start(run, work)
            for name, process in list(active.items()):
                if process.poll() is not None:
                    del active[name]
                    check_end(name, process.returncode, work, allowed=(0,))
            time.sleep(0.1)
        stop(active)
        for name, process in active.items():
            check_end(name, process.returncode, work, allowed=(0, *STOPPED_BY_US))
    return [run.name for run in runs if not run.finished()]


def check_end(name: str, status: int, work: Path, allowed: Collection[int]) -> None:
    """Ends the command with the last lines of a run's log unless its status is allowed."""
    if status not in allowed:
        end = (work / f"{name}.txt").read_text(errors="replace")[-2000:]
        raise SystemExit(f"error: {name} ended with status {status}:\n{end}")


def start(run: Run, work: Path) -> subprocess.Popen[bytes]:
    """`codmd train` as a process of its own, its output in a file beside the run's folder."""
    work.mkdir(parents=True, exist_ok=True)
    # Of networks this small a second thread slows the CPU; beside a GPU threads cut the videos out of photographs.
    environment = {"OMP_NUM_THREADS": "4" if torch.cuda.is_available() else "1", **os.environ}
    with open(work / f"{run.name}.txt", "ab") as log:
        command = [sys.executable, "-m", "codmd", "train", str(CONFIG), *run.overrides]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@contextmanager
def children() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Processes by name, none of which outlives the block, whether it ends, fails, or is asked to end by SIGTERM."""
    active: dict[str, subprocess.Popen[bytes]] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield active
    finally:
        stop(active)
        signal.signal(signal.SIGTERM, before)


def stop(active: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Asks the processes to save and waits for their ends."""
    for process in active.values():
        process.terminate()
    for process in active.values():
        process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to the configuration of all runs")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="one DMD and one CoDMD student each")
    parser.add_argument("--minutes", type=float, default=9, help="after which training saves and the command ends (9)")
    parser.add_argument("--jobs", type=int, help="students trained at a time (all on a GPU, 1 on a CPU)")
    parser.add_argument("--videos", type=int, help="measured for every student and the teacher (504; 8 tiny)")
    parser.add_argument("--work", type=Path, help="folder of the runs (runs/convergence)")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results/<gpu>-<date>)")
    parser.add_argument("--tiny", action="store_true", help="a tiny network on the CPU, to check that everything runs")
    options = parser.parse_intermixed_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    device = network.pick_device(options.tiny)
    if len(set(options.seeds)) != len(options.seeds):
        parser.error(f"--seeds: got {options.seeds}; expected different ones")
    work = options.work or Path("runs/convergence-tiny" if options.tiny else "runs/convergence")
    teacher, students = plan(work, options.seeds, options.overrides, options.tiny)
    stages = STAGES if options.stage == "all" else (options.stage,)
    jobs = options.jobs or (len(students) if device.type == "cuda" else 1)
    if stages[0] != "teacher" and not teacher.finished():
        raise SystemExit("error: there is no finished teacher; begin with --stage teacher")
    trained_before = all(run.finished() for run in (teacher, *students.values()))
    for stage, runs in (("teacher", [teacher]), ("students", list(students.values()))):
        missing = train(runs, work, jobs, deadline) if stage in stages else []
        if missing:
            print(f"not finished: {', '.join(missing)}; the same command continues them")
            return UNFINISHED
    if len(stages) > 1 and not trained_before and time.monotonic() > deadline - MEASURE_S:
        print("trained, but too little time is left to measure; the same command measures")
        return UNFINISHED
    if "measure" in stages:
        absent = [run.name for run in students.values() if not run.finished()]
        if absent:
            raise SystemExit(f"error: not finished: {', '.join(absent)}; run --stage students first")
        videos = options.videos or (8 if options.tiny else 504)
        configs = {key: run.config for key, run in students.items()}
        found, pictures = measure(teacher.config, configs, options.seeds, videos, device)
        found = {**network.environment(device, "benchmarks.convergence", argv), "tiny": options.tiny, **found}
        text = convergence_report.markdown(found)
        print(text)
        out = network.results_folder(options.out, found, options.tiny)
        network.write(out, "convergence", found, text, convergence_report.draw(found, pictures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
