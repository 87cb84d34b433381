"""What the relation term and the options of the loop do, with seeds and spread.

    python -m benchmarks.comparison --size toy [--seeds 71 72 73 74 75] [--updates 400] [--samples 1000]
                                    [--arms dmd codmd ...] [--jobs N] [--work DIR] [--out DIR] [--minutes M]

Arms (benchmarks/comparison/arms.py) at equal network forwards, one CPU thread a run, seed by seed. What is finished in
`--work` stays, what is not is continued at its last quarter; a command that is interrupted, or ends after `--minutes`
with status 75, is started again. Pages and JSON are written from whatever is finished, at the end and on Ctrl-C.
A run takes about half a minute of CPU time, all of them 45 minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from codmd import __version__
from codmd.atomic import replacing
from codmd.cli import above, integer_in
from codmd.demo.command import available_cores
from codmd.demo.pool import run_jobs
from codmd.demo.study import Options, obtain_teacher
from codmd.demo.teacher import TeacherConfig

from . import page, toy
from .arms import ARMS, UNTRAINED, forwards_per_update
from .study import differences

UNFINISHED = 75
SEEDS = (71, 72, 73, 74, 75)


def tasks_of(args: argparse.Namespace) -> list[toy.Run]:
    """Every run: the main arms, then the sensitivity; each seed by seed, so that whatever is finished is paired."""
    arms = [arm for arm in (*UNTRAINED, *ARMS) if arm in args.arms]
    order = [(arm, seed) for seed in args.seeds for arm in arms]
    order.sort(key=lambda task: page.group_of(task[0]) != "main")
    return [toy.Run(arm, seed, args.work, args.updates, args.samples) for arm, seed in order]


def prepare(args: argparse.Namespace) -> None:
    """The work folder with the teacher; refuses one of other settings.

    Raises:
        SystemExit: the folder belongs to other settings.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    settings, path = {"updates": args.updates, "samples": args.samples}, args.work / "settings.json"
    if path.exists() and (before := json.loads(path.read_text("utf-8"))) != settings:
        raise SystemExit(f"error: {args.work} was made with {before}, not {settings}; give another --work")
    path.write_text(json.dumps(settings), "utf-8")
    if not (args.work / "teacher.safetensors").exists():
        options = Options((), 0, 0, toy.BASE, TeacherConfig(steps=args.teacher_steps), 1, True, False)
        teacher, _, _ = obtain_teacher(options)
        teacher.save(args.work / "teacher.safetensors")


def write(args: argparse.Namespace, tasks: Sequence[toy.Run]) -> None:
    """Pages and JSON of what is finished."""
    outcomes = [json.loads(task.outcome_path.read_text("utf-8")) for task in tasks if task.outcome_path.exists()]
    dmd = forwards_per_update(ARMS["dmd"].recipe(toy.BASE))
    record: dict[str, Any] = {
        "settings": {
            "command": f"python -m benchmarks.comparison --size {args.size}",
            "codmd": __version__,
            "torch": torch.__version__,
            "seeds": args.seeds,
            "updates": args.updates,
            "samples": args.samples,
            "forwards": dmd * args.updates,
            "runs": len(tasks),
        },
        "differences": differences(outcomes),
        "outcomes": outcomes,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    kept = [{name: value for name, value in o.items() if name not in ("scenes", "paths")} for o in outcomes]
    texts = {
        "comparison.json": json.dumps({**record, "outcomes": kept}, indent=1) + "\n",
        "comparison.md": page.report(record),
        "comparison.html": page.document(record),
    }
    for name, text in texts.items():
        with replacing(args.out / name) as path:
            path.write_text(text, "utf-8")
    print(f"{len(outcomes)} of {len(tasks)} runs are finished: {args.out / 'comparison.md'}, comparison.html")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("toy",), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", choices=(*UNTRAINED, *ARMS), default=(*UNTRAINED, *ARMS))
    parser.add_argument("--updates", type=integer_in(toy.PARTS, 1_000_000), default=400, help="of 4-step DMD (400)")
    parser.add_argument("--samples", type=integer_in(toy.KEPT, 1_000_000), default=1000)
    parser.add_argument("--teacher-steps", type=integer_in(1, 1_000_000), default=TeacherConfig().steps)
    parser.add_argument("--jobs", type=integer_in(1, 1024), default=available_cores(), help="runs at a time")
    parser.add_argument("--minutes", type=above(0), help="after which the command ends, to be started again")
    parser.add_argument("--work", type=Path, default=Path("runs/comparison-toy"))
    parser.add_argument("--out", type=Path, default=Path("runs/comparison-toy/report"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)
    prepare(args)
    tasks = tasks_of(args)
    timer = None
    if args.minutes:
        timer = threading.Timer(60 * args.minutes, _interrupt)
        timer.daemon = True
        timer.start()
    interval = 0.2 if sys.stderr.isatty() else 30.0
    status = 0
    try:
        with tqdm(total=sum(task.total for task in tasks), unit="update", mininterval=interval) as bar:
            run_jobs(tasks, args.jobs, bar.update, toy.run)
    except KeyboardInterrupt:
        status = UNFINISHED
    if timer is not None:
        timer.cancel()
    write(args, tasks)
    return status


def _interrupt() -> None:
    import _thread

    _thread.interrupt_main()


if __name__ == "__main__":
    raise SystemExit(main())
