"""Processes forked from one that has imported the library and called nothing: imports are paid once a session.

A process that a shell starts imports torch for two seconds; tests start hundreds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each process would start a pool of compilers
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "torch._inductor.compile_fx", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.run",
    "pytest", "codmd.ops", "codmd.reference", "codmd.distill.run.training", "codmd.models.wan.network",
])  # fmt: skip


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns, or raises; ``BrokenProcessPool`` where it takes the process down."""
    with ProcessPoolExecutor(1, SERVER) as pool:
        return pool.submit(function, *arguments).result()


class Command:
    """``codmd ARGUMENTS`` in a process of its own, or under torchrun in ``processes`` of them, printing to a file.

    torchrun is its agent, which starts functions here and ends them all when one fails, as it does with programs.
    """

    def __init__(self, printed: Path, *arguments: str, processes: int = 0) -> None:
        self.printed = printed
        printed.touch()
        self.process: BaseProcess = SERVER.Process(target=_run, args=(str(printed), arguments, processes))
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    @property
    def status(self) -> int | None:
        """None while it runs; negative where a signal ended it."""
        return self.process.exitcode

    def finish(self) -> int:
        """Its status, once it has ended."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def text(self) -> str:
        """What it has printed."""
        return self.printed.read_text("utf-8", "replace")

    def ranks(self) -> dict[int, int]:
        """Rank to process id of the agent's processes that are there."""
        found = {}
        for file in self.printed.parent.glob(f"{self.printed.name}.*"):
            try:
                parent = int(Path(f"/proc/{file.suffix[1:]}/stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == self.pid:
                found[int(file.read_text())] = int(file.suffix[1:])
        return found


def _run(printed: str, arguments: tuple[str, ...], processes: int) -> None:
    with open(printed, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if processes:
        _under_torchrun(printed, arguments, processes)
    else:
        sys.exit(_command(arguments))


def _command(arguments: tuple[str, ...]) -> int:
    import torch

    from codmd import cli

    torch.set_num_threads(1)
    return cli.main(list(arguments))


def _under_torchrun(printed: str, arguments: tuple[str, ...], processes: int) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    config = LaunchConfig(
        1, 1, processes, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="fork",
    )  # fmt: skip
    elastic_launch(config, _rank)(printed, arguments)


def _rank(printed: str, arguments: tuple[str, ...]) -> None:
    new = Path(f"{printed}-{os.environ['RANK']}")
    new.write_text(os.environ["RANK"])
    new.rename(f"{printed}.{os.getpid()}")
    status = _command(arguments)
    if status:
        sys.exit(status)
