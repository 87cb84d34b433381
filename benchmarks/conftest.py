"""Additions to pytest-benchmark: shapes by name, and speed-ups as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.shapes import SHAPES
from benchmarks.speed_bars import Speed, plot

TIMES = pytest.StashKey[dict[str, dict[str, float]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("codmd benchmarks")
    group.addoption("--shape", action="append", choices=list(SHAPES), help="latents to time (repeatable; wan-480p)")
    group.addoption("--threads", type=int, help="CPU threads (PyTorch's default)")
    group.addoption("--speed-plot", type=Path, metavar="PNG", help="draw the speed-ups")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMES] = {}
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", metafunc.config.getoption("--shape") or ["wan-480p"])


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Any:
    """``timed(case, side, run)``: times ``run`` under pytest-benchmark and keeps its median for the speed-ups."""

    def measure(case: str, side: str, run: Any) -> None:
        benchmark.group = case
        benchmark.pedantic(run, rounds=20, warmup_rounds=3)
        if benchmark.stats is not None:
            request.config.stash[TIMES].setdefault(case, {})[side] = 1e3 * benchmark.stats.stats.median

    return measure


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    speeds = [
        Speed(case, sides["codmd"], {name: ms for name, ms in sides.items() if name != "codmd"})
        for case, sides in config.stash[TIMES].items()
        if "codmd" in sides and len(sides) > 1
    ]
    if not speeds:
        return
    terminalreporter.section(f"speed-up of forward + backward, {torch.get_num_threads()} CPU threads")
    for speed in speeds:
        ratios = ", ".join(f"{ms / speed.codmd_ms:.1f}x {name}" for name, ms in speed.baselines_ms.items())
        terminalreporter.write_line(f"{speed.label:<40} {speed.codmd_ms:9.3f} ms  {ratios}")
    if path := config.getoption("--speed-plot"):
        path.parent.mkdir(parents=True, exist_ok=True)
        plot(speeds, path, torch.get_num_threads())
        terminalreporter.write_line(f"Plot: {path}")
