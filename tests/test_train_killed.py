"""`kill -9` under two processes, of both or of one, in training and in a save: the curve goes on bit for bit."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fresh import Command
from train_cases import curve

from codmd.distill.run.integrity import problems, read_meta

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of torchrun in /proc"),
]

PROCESSES = 2
UPDATES = 60
"""Of the undisturbed run; a killed one is caught long before."""
TOY = ["toy", "model.frames=4", "model.channels=4", "model.width=16", "model.blocks=1", "distill.batch_size=4",
       "distill.critic_updates=1", "distill.ema_decay=0.9", "distill.grad_clip=0.5", "log.every=1",
       "log.tracker=none", "seed=5"]  # fmt: skip


class Group(Command):
    """`codmd train` on two gloo processes under torchrun's agent; what they print goes to a file."""

    def __init__(self, run, *arguments):
        arguments = ["train", *TOY, f"out={run}", *arguments]
        super().__init__(run.with_name(f"{run.name}.txt"), *arguments, processes=PROCESSES)

    def wait_for(self, condition):
        while not condition():
            assert self.status is None, self.text()
            time.sleep(0.0005)

    def kill(self):
        """All at once, torchrun first: nobody is left to end the others in order."""
        ranks = self.ranks()
        for process in (self.pid, *ranks.values()):
            os.kill(process, signal.SIGKILL)
        self.finish()
        for process in ranks.values():
            wait_until_gone(process)


def state_of(process):
    """R, S, D: it runs or waits; T: it is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until_gone(process):
    while Path(f"/proc/{process}").exists():
        time.sleep(0.001)


@contextmanager
def group(run, *arguments):
    """A group of which nothing is left behind, whatever happens to the test."""
    started = Group(run, *arguments)
    try:
        yield started
    finally:
        for process in (started.pid, *started.ranks().values()):
            if started.status is None:
                os.kill(process, signal.SIGKILL)
        started.finish()


def updates(run):
    """Updates logged so far."""
    return len(curve(run)) if (run / "log.jsonl").exists() else 0


def partial(run):
    return list((run / "checkpoints").glob(".*.partial"))


def own_files(run):
    """What the processes have written of a checkpoint that is not complete."""
    return [file for folder in partial(run) for file in folder.glob("*.safetensors")]


def stop_in_a_save(started, condition):
    """Stops every process while `condition` holds, and leaves them so."""
    started.wait_for(lambda: len(started.ranks()) == PROCESSES)
    ranks = started.ranks().values()
    while True:
        started.wait_for(condition)
        for process in ranks:
            os.kill(process, signal.SIGSTOP)
        started.wait_for(lambda: {state_of(process) for process in ranks} == {"T"})
        if condition():
            return
        for process in ranks:  # the save was faster
            os.kill(process, signal.SIGCONT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The curve of a run that nobody kills."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with group(run, f"updates={UPDATES}", "checkpoint.every=1000") as started:
        assert started.finish() == 0, started.text()
    lines = curve(run)
    assert [line["update"] for line in lines] == list(range(1, UPDATES + 1))
    return lines


def assert_goes_on(run, undisturbed):
    """The same command continues by itself, and what it logs is what would have been logged."""
    last = updates(run) + 3
    with group(run, f"updates={last}") as started:
        assert started.finish() == 0, started.text()
    assert f"continuing from {run}" in started.text()
    assert curve(run) == undisturbed[:last]
    assert not partial(run)
    newest = max((run / "checkpoints").glob("step_*"))
    assert (read_meta(newest)["step"], read_meta(newest)["processes"]) == (last, PROCESSES)
    states = read_meta(newest)["tensors"]
    assert {f"random.rank_{rank:05d}.cpu" for rank in range(PROCESSES)} <= set(states)


def assert_no_half_checkpoint(run):
    """Whatever has the name of a checkpoint is one."""
    for path in (run / "checkpoints").glob("step_*"):
        assert problems(path) == []


def test_a_group_killed_in_training_and_in_a_save_continues_bit_for_bit(tmp_path, undisturbed):
    run = tmp_path / "run"
    with group(run, f"updates={UPDATES}", "checkpoint.every=4") as started:
        started.wait_for(lambda: updates(run) > 6)
        started.kill()
    killed_at = updates(run)
    assert 6 < killed_at < UPDATES

    with group(run, f"updates={UPDATES}", "checkpoint.every=1") as started:
        stop_in_a_save(started, lambda: own_files(run))
        started.kill()
    assert own_files(run), "killed in the middle of a save"
    assert_no_half_checkpoint(run)
    assert_goes_on(run, undisturbed)


def test_one_killed_process_ends_the_run_and_the_next_continues_bit_for_bit(tmp_path, undisturbed):
    run = tmp_path / "run"
    with group(run, f"updates={UPDATES}", "checkpoint.every=4") as started:
        started.wait_for(lambda: updates(run) > 6)
        ranks = started.ranks()
        os.kill(ranks[1], signal.SIGKILL)
        assert started.finish() != 0
    wait_until_gone(ranks[0])
    assert updates(run) < UPDATES

    with group(run, f"updates={UPDATES}", "checkpoint.every=1") as started:
        stop_in_a_save(started, lambda: partial(run))
        ranks = started.ranks()
        os.kill(ranks[0], signal.SIGKILL)
        os.kill(ranks[1], signal.SIGCONT)
        assert started.finish() != 0
    wait_until_gone(ranks[1])
    assert_no_half_checkpoint(run)
    assert_goes_on(run, undisturbed)
