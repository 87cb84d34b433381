"""`codmd train` in this process, on a toy small enough for a test, and what it logged."""

from __future__ import annotations

from typing import Any

import torch

from codmd import cli
from codmd.distill.run.log import read_log
from codmd.distill.run.parallel import Processes

TOY = ["toy", "model.frames=4", "model.channels=4", "model.width=16", "model.blocks=1", "distill.batch_size=4",
       "distill.critic_updates=2", "log.every=1"]  # fmt: skip
QUIET = "log.tracker=none"
RATES = ("seconds_per_update", "samples_per_second", "forwards_per_second", "peak_memory_gb", "mfu")
RECORD: dict[str, Any] = {
    "mode": "distill",
    "position": None,
    "nonfinite": {},
    "processes": 1,
    "versions": {},
    "config": {},
}
"""What `meta.json` keeps of a run beside its tensors."""
ALONE = Processes(0, 1, torch.device("cpu"), None, None)


def train(*arguments, status=0):
    assert cli.main(["train", *arguments]) == status


def curve(folder):
    """Every logged number but the rates and the memory, as it stands in the file."""
    lines = [line for line in read_log(folder / "log.jsonl") if "loss" in line]
    return [{name: value for name, value in line.items() if name not in RATES} for line in lines]
