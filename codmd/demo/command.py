"""Distil a 50-step toy video teacher into a few steps, with and without the relation term, and compare the two."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from codmd.cli import CommandError, above, at_least, integer_in
from codmd.extras import needing

HELP = "distil a toy video teacher with DMD and with CoDMD on the CPU, and write a report"
FULL = {"seeds": 5, "updates": 600, "samples": 2000}
QUICK = {"seeds": 1, "updates": 300, "samples": 1000}
QUICK_TEACHER_STEPS = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd demo`."""
    parser.add_argument("--out", type=Path, default=Path("codmd-demo"), help="folder for the report (codmd-demo)")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, short training, under a minute: a check, not a result"
    )
    parser.add_argument("--seed", type=integer_in(0, 2**31), default=51, help="first seed (51)")
    parser.add_argument(
        "--seeds", type=integer_in(1, 100), help=f"number of seeds ({FULL['seeds']}; {QUICK['seeds']} with --quick)"
    )
    parser.add_argument(
        "--lambda", dest="relation_weight", type=at_least(0), default=0.1, help="weight of the relation term (0.1)"
    )
    parser.add_argument(
        "--temperature", type=above(0), default=0.1, help="softmax temperature of the relation term (0.1)"
    )
    parser.add_argument(
        "--frame-weight", type=at_least(0), default=1.0, help="weight of the relation between frames (1)"
    )
    parser.add_argument(
        "--batch-weight", type=at_least(0), default=0.0, help="weight of the relation between samples (0)"
    )
    parser.add_argument("--steps", type=integer_in(1, 8), default=4, help="sampling steps of the student (4)")
    parser.add_argument(
        "--updates",
        type=integer_in(1, 1_000_000),
        help=f"student updates of each run ({FULL['updates']}; {QUICK['updates']} with --quick)",
    )
    parser.add_argument(
        "--threads", type=integer_in(1, 1024), default=available_cores(), help="runs at a time (one per core)"
    )
    parser.add_argument("--no-cache", action="store_true", help="train the teacher anew and do not keep it")


def available_cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(args: argparse.Namespace) -> int:
    """Runs the demo and prints its result; returns the exit status.

    Raises:
        CommandError: the output folder cannot be used, a package is missing, or a run failed.
    """
    with needing("demo"):
        from codmd.distill.config.recipe import DistillConfig
        from codmd.distill.update.schedule import sampling_sigmas
        from codmd.output import OutputError, building, check_output

        from .pool import JobFailed
        from .report import write_report
        from .study import Options, run_study
        from .summary import TOO_SHORT, console_summary
        from .teacher import TeacherConfig

    sizes = QUICK if args.quick else FULL
    teacher = TeacherConfig(steps=QUICK_TEACHER_STEPS) if args.quick else TeacherConfig()
    options = Options(
        seeds=range(args.seed, args.seed + (args.seeds or sizes["seeds"])),
        updates=args.updates or sizes["updates"],
        samples=sizes["samples"],
        distill=DistillConfig(
            sigmas=sampling_sigmas(args.steps, teacher.shift),
            shift=teacher.shift,
            relation_weight=args.relation_weight,
            temperature=args.temperature,
            batch_weight=args.batch_weight,
            frame_weight=args.frame_weight,
        ),
        teacher=teacher,
        threads=args.threads,
        use_cache=not args.no_cache,
        quick=args.quick,
    )
    try:
        check_output(args.out, "demo")
        study = run_study(options)
        with building(args.out) as folder:
            write_report(folder, study)
    except (OutputError, JobFailed, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"\n{console_summary(study.summary)}")
    if args.quick:
        print(TOO_SHORT)
    print(f"Report: {args.out / 'report.html'}")
    return 0
