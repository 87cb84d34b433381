"""Run a function on several gloo processes; every rank's failure reaches the test."""

from __future__ import annotations

import gc
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fresh import SERVER


def _entry(rank: int, world: int, store: str, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        function(rank, world, *arguments)
        dist.barrier()
    finally:
        gc.collect()  # networks hold their groups in reference cycles; a group must not outlive the interpreter
        dist.destroy_process_group()


def run_processes(function, world: int, *arguments) -> None:
    """``function(rank, world, *arguments)`` on ``world`` processes; raises what a process raised."""
    with tempfile.TemporaryDirectory() as folder:
        everything = world, str(Path(folder) / "store"), function, arguments
        mp.start_processes(_entry, everything, world, start_method=SERVER.get_start_method())
