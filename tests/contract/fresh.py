"""Functions run in a process that is forked from one which has imported the library and called nothing."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each process would start a pool of compilers
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._inductor.compile_fx", "pytest", "codmd.ops", "codmd.reference"])


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns, or raises; ``BrokenProcessPool`` where it takes the process down."""
    with ProcessPoolExecutor(1, SERVER) as pool:
        return pool.submit(function, *arguments).result()
