"""`codmd doctor`: which backend runs for which device, and why not another."""

from __future__ import annotations

import argparse

HELP = "show which backend runs for which device, and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`codmd doctor` takes no options."""


def run(args: argparse.Namespace) -> int:
    """Prints the description of the backends."""
    from codmd import backends

    print(backends.describe())
    return 0
