"""Optional dependencies: which of an extra's packages are missing, and the command that installs them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from codmd.cli import CommandError


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Imports inside may fail: then every package that the extra lacks is named, and how to install them.

    Args:
        extra: the command's optional dependencies, by their name in pyproject.toml.

    Raises:
        CommandError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = ", ".join(sorted({error.name or str(error)} | _lacking(extra), key=str.lower))
        raise CommandError(f"not installed: {missing}; install them with: {install_command(extra)}") from error


def install_command(extra: str) -> str:
    """The pip command for an extra: of the clone that this code is in, or of the installed package."""
    clone = Path(__file__).resolve().parents[1]
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{clone}[{extra}]')}"
    return f"pip install 'codmd[{extra}]'"


def requirements(extra: str) -> list[str]:
    """Names of an extra's packages and of those of extras in it; none where codmd runs without being installed."""
    try:
        lines = metadata.requires("codmd") or []
    except metadata.PackageNotFoundError:
        return []
    names: list[str] = []
    for line in lines:
        found = re.match(r"([\w.-]+)(?:\[([\w.,-]+)\])?.*extra == [\"']([\w.-]+)", line)
        if found and found[3] == extra:
            inner = [name for group in (found[2] or "").split(",") for name in requirements(group)]
            names += inner if found[1] == "codmd" else [found[1]]
    return names


def _lacking(extra: str) -> set[str]:
    installed = {found.metadata["Name"].lower().replace("_", "-") for found in metadata.distributions()}
    return {name for name in requirements(extra) if name.lower().replace("_", "-") not in installed}
