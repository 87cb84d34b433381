"""Distil a video teacher into a few steps, or train a tiny teacher first, from one configuration file."""

from __future__ import annotations

import argparse

from codmd.cli import CommandError

HELP = "distil a video model into a few steps, from a configuration file"
STOPPED = 143


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `codmd train`."""
    parser.add_argument(
        "config", metavar="CONFIG", help="a YAML file, or the name of a packaged one: toy, wan_1.3b, ..."
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes, such as distill.batch_size=8")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    instead.add_argument("--plan", action="store_true", help="print memory and communication on 1 to 128 GPUs")


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0 when all updates were made, 143 when SIGTERM ended the run after a checkpoint.

    Raises:
        CommandError: the configuration cannot be used, or the run could not go on; the message says what to do.
    """
    try:
        from codmd.distill.checkpoint import CheckpointError
        from codmd.distill.dry_run import dry_run
        from codmd.distill.guard import NonFiniteRun
        from codmd.distill.run import run as run_training
        from codmd.distill.settings import ConfigError, read_config
    except ModuleNotFoundError as error:
        raise CommandError(f"needs the package {error.name}; install it with: pip install 'codmd[train]'") from error
    try:
        config = read_config(args.config, args.overrides, complete=not args.plan)
        if args.plan:
            from codmd.distill.plan import describe

            print(describe(config))
            return 0
        if args.dry_run:
            print(dry_run(config))
            return 0
        return 0 if run_training(config) else STOPPED
    except (ConfigError, CheckpointError, NonFiniteRun) as error:
        raise CommandError(str(error)) from error
