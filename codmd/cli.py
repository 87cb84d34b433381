"""The `codmd` command: a registry of subcommands, each a module with HELP, add_arguments(parser) and run(args)."""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import NoReturn

COMMANDS = {
    "convert": "codmd.convert",
    "compare": "codmd.compare.command",
    "demo": "codmd.demo.command",
    "doctor": "codmd.doctor",
    "encode": "codmd.encode.command",
    "guidance": "codmd.guidance",
    "inspect": "codmd.inspect.command",
    "sample": "codmd.sample.command",
    "train": "codmd.train_command",
    "vbench": "codmd.vbench",
}
"""Subcommand to module. Their imports at module level stay light: what is heavy belongs inside `run`."""

INTERRUPTED = 130


class CommandError(Exception):
    """Ends a subcommand with status 1 and this message; raise it for what a user can mend."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` (sys.argv without the program by default), runs the subcommand, returns the exit status."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks: register-python-argcomplete codmd
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"codmd {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ncodmd {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def nearest(word: str, known: Iterable[str]) -> str:
    """A question that ends an error message: the known word that may be meant; empty without one."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class CommandParser(argparse.ArgumentParser):
    """The parser of `codmd` itself: a mistyped command is answered with the one that may be meant."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `ArgumentParser`'s; its own options take no values, so the first other word is the command."""
        words = sys.argv[1:] if args is None else args
        command = next((word for word in words if not word.startswith("-")), None)
        if command is not None and command not in COMMANDS:
            self.error(f"got {command!r}; expected one of {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
        return super().parse_known_args(args, namespace)


class IntermixedParser(argparse.ArgumentParser):
    """The parser of a subcommand: positional arguments may stand before, between and behind its options.

    A mistyped option is answered with the one that may be meant, whatever else is missing.
    """

    _in_pass = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `ArgumentParser`'s, intermixed; a parent parser calls no other method of its subcommands."""
        if self._in_pass:  # up to Python 3.11 intermixed parsing is two calls of this method
            return super().parse_known_args(args, namespace)
        for word in args or ():
            name = word.partition("=")[0]
            if name == "--":
                break
            if name.startswith("--") and not any(option.startswith(name) for option in self._option_string_actions):
                self.error(f"no such option: {name}{nearest(name, self._option_string_actions)}")
        self._in_pass = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._in_pass = False


def build_parser() -> argparse.ArgumentParser:
    """The parser of all registered subcommands."""
    from codmd import __version__

    parser = CommandParser(prog="codmd", description="Few-step video distillation with a relation term.")
    parser.add_argument("--version", action="version", version=f"codmd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=IntermixedParser)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def integer_in(low: int, high: int) -> Callable[[str], int]:
    """An argument type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected an integer from {low} to {high}")
        return value

    return parse


def at_least(low: float) -> Callable[[str], float]:
    """An argument type: a finite number >= `low`."""
    return _number(lambda value: value >= low, f"a finite number >= {low:g}")


def above(low: float) -> Callable[[str], float]:
    """An argument type: a finite number > `low`."""
    return _number(lambda value: value > low, f"a finite number > {low:g}")


def _number(allowed: Callable[[float], bool], description: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not allowed(value):
            raise argparse.ArgumentTypeError(f"got {text!r}; expected {description}")
        return value

    return parse


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack like Ctrl-C does, so that temporary files go and child processes end."""
    raise KeyboardInterrupt
