"""What the relation term and the options of the loop do, with seeds and spread.

    python -m benchmarks.comparison --size toy | textures [--seeds N ...] [--updates N] [--samples N] [--arms NAME ...]
                                    [--jobs N] [--work DIR] [--known JSON] [--out DIR] [--minutes M] [KEY=VALUE ...]

Arms (benchmarks/comparison/arms.py) at equal network forwards, one CPU thread a run, seed by seed. What is finished in
`--work` stays, what is not is continued at its last quarter; a command that is interrupted, or ends after `--minutes`
with status 75, is started again. On another machine `--known docs/results/comparison.json` takes over the runs of that
file, if the teacher comes out the same there. Pages and JSON come from whatever is finished, at the end, on Ctrl-C and
on SIGTERM.
Toy: arc video, five seeds; a run takes about half a minute of CPU time, all of them 45 minutes. Textures: a tiny Wan on
moving photographs, three seeds; a run takes about 8 minutes (estimated), all of them hours. KEY=VALUE changes the
configuration of the textures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from codmd import __version__
from codmd.atomic import replacing
from codmd.cli import above, integer_in
from codmd.demo.command import available_cores
from codmd.demo.pool import run_jobs
from codmd.demo.study import Options, obtain_teacher
from codmd.demo.summary import Column
from codmd.demo.teacher import TeacherConfig
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.config.run_config import read_config

from . import page, textures, toy
from .arms import ARMS, UNTRAINED, arms_of, forwards_per_update
from .figures import training_curves
from .study import differences

UNFINISHED = 75


@dataclass(frozen=True)
class Size:
    """Defaults of a size, and its words."""

    seeds: tuple[int, ...]
    updates: int
    samples: int
    columns: dict[str, Column]
    subject: page.Subject


SIZES = {
    "toy": Size(
        (71, 72, 73, 74, 75), 400, 1000, toy.COLUMNS,
        page.Subject(
            "Comparison on arc video", "comparison", "as many fresh videos of the data",
            ", in the plane of the nearest scene; the grey circle is where the data's point moves",
            "rCM learns from 2,000 of the teacher's videos of fifty steps, which are outside the budget; its learning "
            "rates and times were found on another seed. Not here: decoupled guidance and saturation need a guided "
            "model of pixels (`--size textures`). ",
        ),
    ),
    "textures": Size(
        (71, 72, 73), 300, 252, textures.COLUMNS,
        page.Subject(
            "Comparison on moving photographs", "comparison_textures",
            "as many of the guided teacher's fifty steps from other noise", "", "",
        ),
    ),
}  # fmt: skip


Task = toy.Run | textures.Run


def tasks_of(args: argparse.Namespace) -> list[Any]:
    """Every run: the main arms, then the sensitivity; each seed by seed, so that whatever is finished is paired."""
    known = arms_of(base_of(args))
    arms = [arm for arm in known if not args.arms or arm in args.arms]
    order = [(arm, seed) for seed in args.seeds for arm in arms]
    order.sort(key=lambda task: page.group_of(task[0]) != "main")
    shared = (args.work, args.updates, args.samples)
    if args.size == "toy":
        return [toy.Run(arm, seed, *shared) for arm, seed in order]
    return [textures.Run(arm, seed, *shared, tuple(args.changes)) for arm, seed in order]


def base_of(args: argparse.Namespace) -> DistillConfig:
    """The recipe that arms change."""
    return toy.BASE if args.size == "toy" else read_config("textures_tiny", args.changes).distill


def prepare(args: argparse.Namespace) -> None:
    """The work folder with the teacher; refuses one of other settings.

    Raises:
        SystemExit: the folder belongs to other settings.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    settings = {"size": args.size, "updates": args.updates, "samples": args.samples, "changes": args.changes}
    path = args.work / "settings.json"
    if path.exists() and (before := json.loads(path.read_text("utf-8"))) != settings:
        raise SystemExit(f"error: {args.work} was made with {before}, not {settings}; give another --work")
    path.write_text(json.dumps(settings), "utf-8")
    if args.size == "textures":
        textures.train_teacher(args.work, args.changes)
    elif not (args.work / "teacher.safetensors").exists():
        options = Options((), 0, 0, toy.BASE, TeacherConfig(steps=args.teacher_steps), 1, True, False)
        teacher, _, _ = obtain_teacher(options)
        teacher.save(args.work / "teacher.safetensors")
    if args.known:
        take_over(args)


def write(args: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Pages and JSON of what is finished."""
    outcomes = [json.loads(task.outcome_path.read_text("utf-8")) for task in tasks if task.outcome_path.exists()]
    size, dmd = SIZES[args.size], forwards_per_update(ARMS["dmd"].recipe(base_of(args)))
    record: dict[str, Any] = {
        "settings": {
            "command": " ".join(["python -m benchmarks.comparison", *args.line]),
            "codmd": __version__,
            "torch": torch.__version__,
            "seeds": args.seeds,
            "updates": args.updates,
            "samples": args.samples,
            "forwards": dmd * args.updates,
            "runs": len(tasks),
            "teacher": teacher_of(args),
        },
        "differences": differences(outcomes, size.columns),
        "outcomes": outcomes,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    picture = training_curves(outcomes, size.columns)
    kept = [{name: value for name, value in o.items() if name not in ("scenes", "paths", "clips")} for o in outcomes]
    for entry, outcome in zip(kept, outcomes, strict=True):
        if "paths" in outcome and outcome["seed"] == min(args.seeds):  # a few kilobytes, which `--known` shows again
            entry["paths"] = outcome["paths"][: page.CLIPS]
    texts = {
        "json": json.dumps(numbers({**record, "outcomes": kept}), indent=1, allow_nan=False) + "\n",
        "md": page.report(record, size.columns, size.subject),
        "html": page.document(record, size.columns, size.subject, picture),
    }
    for kind, content in {"png": picture, **{kind: text.encode() for kind, text in texts.items()}}.items():
        with replacing(args.out / f"{size.subject.name}.{kind}") as path:
            path.write_bytes(content)
    print(f"{len(outcomes)} of {len(tasks)} runs are finished: {args.out / size.subject.name}.md and .html")


def numbers(value: Any) -> Any:
    """The same with None in the place of every NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: numbers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [numbers(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def take_over(args: argparse.Namespace) -> None:
    """Outcomes of a JSON that this command wrote, for runs that `--work` does not have.

    Raises:
        SystemExit: it was made with other settings, or from another teacher.
    """
    record = json.loads(args.known.read_text("utf-8"))
    before, now = (
        {name: known.get(name) for name in ("updates", "samples")} for known in (record["settings"], vars(args))
    )
    if before != now or not math.isclose(record["settings"]["teacher"], teacher_of(args), rel_tol=1e-4):
        raise SystemExit(f"error: --known {args.known} was made with {before}, or from another teacher, not {now}")
    for outcome in record["outcomes"]:
        path = args.work / f"{outcome['arm']}-{outcome['seed']}.json"
        if not path.exists():
            toy.write_outcome(path, outcome)


def teacher_of(args: argparse.Namespace) -> float:
    """Norm of the teacher's weights, of which machines differ in the last digits alone."""
    files = sorted((args.work / "teacher" / "model").glob("*.safetensors")) or [args.work / "teacher.safetensors"]
    return math.hypot(*(float(weight.double().norm()) for file in files for weight in load_file(file).values()))


def run_textures(tasks: Sequence[textures.Run], jobs: int, bar: tqdm) -> None:
    """Trains the students that are not trained, then measures every run."""
    made = dict.fromkeys((task for task in tasks if task.total), 0)

    def look() -> None:
        for task in made:
            if made[task] < task.total and (now := task.made()) > made[task]:
                bar.update(now - made[task])
                made[task] = now

    untrained = [task for task in made if not task.outcome_path.exists() and not task.trained()]
    textures.train_all({f"{t.arm}-{t.seed}": t.overrides for t in untrained}, tasks[0].work, jobs, look)
    for task in tasks:
        textures.measure(task)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", help="of textures_tiny")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="71 to 75, textures 71 to 73")
    parser.add_argument("--arms", nargs="+", choices=(*UNTRAINED, *ARMS), metavar="NAME", help="all that the size has")
    parser.add_argument("--updates", type=integer_in(toy.PARTS, 1_000_000), help="of 4-step DMD (400, textures 300)")
    parser.add_argument("--samples", type=integer_in(toy.KEPT, 1_000_000), help="measured (1000, textures 252)")
    parser.add_argument("--teacher-steps", type=integer_in(1, 1_000_000), default=TeacherConfig().steps)
    parser.add_argument("--jobs", type=integer_in(1, 1024), default=available_cores(), help="runs at a time")
    parser.add_argument("--minutes", type=above(0), help="after which the command ends, to be started again")
    parser.add_argument("--work", type=Path, help="of the runs (runs/comparison-SIZE)")
    parser.add_argument("--known", type=Path, help="a JSON of this command, whose runs are taken over")
    parser.add_argument("--out", type=Path, help="of the pages (runs/comparison-SIZE/report)")
    args = parser.parse_intermixed_args(argv)
    size = SIZES[args.size]
    if args.size == "toy" and args.changes:
        parser.error(f"{args.changes[0]}: KEY=VALUE is for --size textures")
    args.seeds, args.updates = args.seeds or list(size.seeds), args.updates or size.updates
    args.samples = args.samples or size.samples
    if args.size == "textures" and args.samples < textures.FEWEST:
        parser.error(f"--samples: got {args.samples}; expected at least {textures.FEWEST}, two of every caption")
    args.work = args.work or Path(f"runs/comparison-{args.size}")
    args.out = args.out or args.work / "report"
    args.line = list(sys.argv[1:] if argv is None else argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prepare(args)
    tasks = tasks_of(args)
    timer = threading.Timer(60 * (args.minutes or 0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    if args.minutes:
        timer.start()
    interval = 0.2 if sys.stderr.isatty() else 30.0
    status = 0
    try:
        with tqdm(total=sum(task.total for task in tasks), unit="update", mininterval=interval) as bar:
            if args.size == "toy":
                run_jobs(tasks, args.jobs, bar.update, toy.run)
            else:
                run_textures(tasks, args.jobs, bar)
    except KeyboardInterrupt:
        status = UNFINISHED
    timer.cancel()
    write(args, tasks)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
