"""Jobs in parallel child processes, one torch thread each, that never outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from .experiment import run_job


class JobFailed(RuntimeError):
    """A job raised, or its process died; the message carries what the child reported."""


def run_jobs(
    jobs: Sequence[Any],
    processes: int,
    progress: Callable[[int], None],
    run: Callable[[Any, Callable[[int], None]], Any] = run_job,
) -> list[Any]:
    """Runs all jobs on `processes` child processes and returns their outcomes in the order of `jobs`.

    Long jobs should come first. Any exception here, KeyboardInterrupt included, ends the children before it
    travels on; a child whose parent was killed notices the broken pipe and leaves by itself.

    Args:
        progress: called with the number of student updates made since the last call, over all jobs.
        run: what a child does with a job and its progress; a function of a module.

    Raises:
        JobFailed: with the child's own report.
    """
    context = multiprocessing.get_context("spawn")
    outcomes: dict[int, Any] = {}
    pending = list(enumerate(jobs))[::-1]
    running: dict[Connection, tuple[Any, int | None]] = {}
    try:
        for _ in range(min(processes, len(jobs))):
            ours, theirs = context.Pipe()
            child = context.Process(target=_work, args=(theirs, run), daemon=True)
            child.start()
            theirs.close()
            running[ours] = (child, None)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                child, index = running[connection]
                kind, payload = _receive(connection, child)
                if kind == "progress":
                    progress(payload)
                    continue
                if kind == "failed":
                    raise JobFailed(payload)
                if kind == "done" and index is not None:
                    outcomes[index] = payload
                if pending:
                    index, job = pending.pop()
                    running[connection] = (child, index)
                    connection.send(job)
                else:
                    connection.send(None)
                    connection.close()
                    del running[connection]
                    child.join()
    finally:
        for connection, (child, _) in running.items():
            child.terminate()
            child.join()
            connection.close()
    return [outcomes[index] for index in range(len(jobs))]


def _receive(connection: Connection, child: Any) -> tuple[str, Any]:
    try:
        return connection.recv()
    except EOFError:
        child.join()
        raise JobFailed(f"a worker process ended without an answer (exit code {child.exitcode})") from None


def _work(connection: Connection, run: Callable[[Any, Callable[[int], None]], Any]) -> None:
    """A child: answers "ready", then one "done" or "failed" for each job it is sent, until it is sent None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)
    try:
        connection.send(("ready", None))
        while (job := connection.recv()) is not None:
            answer: tuple[str, Any]
            try:
                answer = ("done", run(job, lambda count: connection.send(("progress", count))))
            except FloatingPointError as error:
                answer = ("failed", str(error))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception:
                answer = ("failed", traceback.format_exc())
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)
