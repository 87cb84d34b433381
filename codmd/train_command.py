"""Distil a video teacher into a few steps, or train a tiny teacher first, from one configuration file."""

from __future__ import annotations

import argparse
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from codmd.cli import CommandError
from codmd.extras import needing

if TYPE_CHECKING:
    from codmd.distill.config.run_config import RunConfig

HELP = "distil a video model into a few steps, from a configuration file"
STOPPED = 128 + signal.SIGTERM
"""Status of a run that SIGTERM ended; 130 after Ctrl-C."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd train`."""
    parser.add_argument(
        "config", metavar="CONFIG", help="a YAML file, or the name of a packaged one: toy, wan_1.3b, ..."
    )
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="changes, such as seed=3, anywhere on the line"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    instead.add_argument("--print", action="store_true", help="print every key: value, type, default, meaning")
    instead.add_argument("--plan", action="store_true", help="print memory and communication on 1 to 128 GPUs")


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0 when all updates were made, else 128 and the signal that ended the run after a checkpoint.

    Raises:
        CommandError: the configuration cannot be used, or the run could not go on; the message says what to do.
    """
    with needing("train"):
        return _run(*config_first([args.config, *args.overrides]), args)


def _run(source: str, overrides: list[str], args: argparse.Namespace) -> int:
    from codmd.distill.config.run_config import find_config, read_config, without_environment
    from codmd.distill.config.typed import ConfigError

    try:
        path = find_config(source)
        config = read_config(source, overrides, complete=not (args.plan or args.dry_run or args.print))
    except ConfigError as error:
        raise CommandError(str(error)) from error

    if config.log.tracker in ("wandb", "mlflow") and find_spec(config.log.tracker) is None:
        raise CommandError(f"log.tracker: {config.log.tracker} is not installed; pip install {config.log.tracker}")
    if args.print:
        from codmd.distill.config.describe import describe

        print(describe(config))
        return 0

    from codmd.distill.plan.dry_run import dry_run
    from codmd.distill.run.integrity import CheckpointError
    from codmd.distill.run.training import run as run_training
    from codmd.distill.run.watch import LeftBand
    from codmd.distill.update.optimizer import NonFiniteRun

    try:
        if args.plan:
            return _plan(config)
        if args.dry_run:
            print(dry_run(config))
            return 0
        stopped = run_training(config)
        return 128 + stopped if stopped else 0
    except (ConfigError, CheckpointError, LeftBand, NonFiniteRun) as error:
        raise CommandError(without_environment(str(error), path, overrides)) from error


def _plan(config: RunConfig) -> int:
    from codmd.distill.plan.page import describe

    try:
        print(describe(config))
    except ValueError as error:
        raise CommandError(f"--plan: {error}") from error
    return 0


def config_first(words: list[str]) -> tuple[str, list[str]]:
    """CONFIG and the overrides: CONFIG is the first word that is no `key=value`, or else the first of all."""
    config = next((word for word in words if "=" not in word or Path(word).is_file()), words[0])
    place = words.index(config)
    return config, words[:place] + words[place + 1 :]
