"""A measurement that is cut short keeps what it has: children, record and order of the GPU suite, with stand-ins."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import gpu_checks, gpu_record, gpu_suite, gpu_timing, workers

STAND_IN = """
import json, os, sys, time
kind, record, log, descriptor = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[5])
report = lambda **message: os.write(descriptor, json.dumps(message).encode() + b"\\n")
found = json.load(open(record))
done = {check["name"] for check in found["checks"]} | {
    f"{row['op']} {row['shape']} {part}" for row in found["timings"] for part in "abc" if f"{part}_missing" in row}
tasks = [f"{kind} {k}" for k in range(6)] if kind in ("checks", "compile") else [
    [f"op{k}", "wan-480p" if kind == "first" else "wan-720p", part] for k in range(3) for part in "abc"]
for task in tasks:
    if (task if isinstance(task, str) else " ".join(task)) in done:
        continue
    report(begin=task)
    time.sleep(0.01)
    with open(log, "a") as file:
        file.write(json.dumps(task) + "\\n")
    report(task=task, found={"passed": True} if isinstance(task, str) else {f"{task[2]}_missing": "a stand-in"})
"""


def stand_in(code=STAND_IN):
    """A child that needs no torch: about 20 ms of start."""
    return [sys.executable, "-S", "-c", textwrap.dedent(code)]


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """The whole command on a device that is said to be there, its children stand-ins; a function that runs it."""
    log = tmp_path / "log"
    log.touch()

    def commands(kind, out, parts=1):
        return {f"{kind}-0": [*stand_in(), kind, str(out / "gpu.json"), str(log)]}

    monkeypatch.setattr(gpu_suite, "commands", commands)
    monkeypatch.setattr(gpu_suite, "sanitizer_commands", lambda out, known: {})
    monkeypatch.setattr(gpu_suite, "unfinished", lambda record: 0)
    monkeypatch.setattr(gpu_suite, "write_pages", lambda results, folder: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_record, "sources", lambda: "sources")
    taken = tmp_path / "taken"
    taken.touch()
    take = gpu_record.Record.take

    def noted(self, task, found):
        take(self, task, found)
        with taken.open("a") as file:
            file.write(json.dumps(task) + "\n")

    monkeypatch.setattr(gpu_record.Record, "take", noted)

    def forked():
        process = os.fork()
        if not process:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                status = gpu_suite.main(["--out", str(tmp_path)])
            finally:
                os._exit(status)  # whatever was raised: the rest of this process is pytest's
        return process

    return forked, tmp_path / "gpu.json", log, taken


def kept(path):
    """What a record holds, one string a result."""
    found = json.loads(path.read_text())
    parts = [
        f"{row['op']} {row['shape']} {part}" for row in found["timings"] for part in "abc" if f"{part}_missing" in row
    ]
    return [check["name"] for check in found["checks"]] + parts


def reported(log):
    return [
        " ".join(task) if isinstance(task, list) else task for task in map(json.loads, log.read_text().splitlines())
    ]


def test_what_was_done_is_in_the_file_at_ten_random_interruptions(suite):
    start, path, log, taken = suite
    draw, lost = random.Random(5), 0
    for interruption in range(10):
        before = len(reported(log))
        process = start()
        target = before + draw.randrange(5)
        while len(reported(log)) < target and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        os.kill(process, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[interruption % 3])
        os.waitpid(process, 0)
        if path.exists():
            assert set(reported(taken)) <= set(kept(path))
            assert len(kept(path)) == len(set(kept(path)))
            lost += len(set(reported(log)) - set(kept(path)))
    process = start()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    everything = [f"{kind} {k}" for kind in ("checks", "compile") for k in range(6)]
    everything += [f"op{k} {s} {part}" for s in ("wan-480p", "wan-720p") for k in range(3) for part in "abc"]
    assert sorted(kept(path)) == sorted(everything)
    # Measured again is what was on its way to a command that was killed, and one task of a child left behind.
    assert len(reported(log)) - len(everything) <= lost + 10
    assert not list(path.parent.glob(".gpu.json.partial-*"))


def test_another_device_or_other_sources_do_not_go_on_with_a_record(tmp_path):
    identity = {"device": "a device", "sources": "1", "date": "2000-01-01"}
    gpu_record.Record(tmp_path / "gpu.json", identity)
    gpu_record.Record(tmp_path / "gpu.json", identity | {"date": "2000-01-02"})
    for change in ({"device": "another"}, {"sources": "2"}):
        with pytest.raises(SystemExit, match="another --out"):
            gpu_record.Record(tmp_path / "gpu.json", identity | change)


def run_stage(tmp_path, code, monkeypatch=None, **limits):
    """What a stage of one child takes and what fails; the child appends to the file ``done``."""
    for name, value in limits.items():
        monkeypatch.setattr(workers, name, value)
    taken, failed = [], []
    prelude = """
    import json, os, sys, time, signal, pathlib
    done, descriptor = pathlib.Path(sys.argv[1]), int(sys.argv[3])
    report = lambda **message: os.write(descriptor, json.dumps(message).encode() + b"\\n")
    known = done.read_text().split() if done.exists() else []
    def finish(task):
        done.write_text(" ".join([*known, task]))
        known.append(task)
    """
    command = [*stand_in(textwrap.dedent(prelude) + textwrap.dedent(code)), str(tmp_path / "done")]
    statuses = workers.stage(
        {"child": command}, tmp_path, time.monotonic() + 1e6,
        lambda task, found: taken.append((task, found)), lambda task, reason: failed.append((task, reason)),
    )  # fmt: skip
    return taken, failed, statuses


def test_a_task_that_ends_its_process_costs_its_own_result_alone(tmp_path):
    taken, failed, statuses = run_stage(tmp_path, """
    for task in "abc":
        if task not in known:
            report(begin=task)
            finish(task)
            if task == "b":
                print("an illegal memory access was encountered", flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            report(task=task, found={"value": 1})
    """)  # fmt: skip
    assert taken == [("a", {"value": 1}), ("c", {"value": 1})]
    ((task, reason),) = failed
    assert task == "b"
    assert reason == "the process ended with -11: an illegal memory access was encountered"
    assert statuses == {"child": 0}


def test_a_task_that_hangs_is_killed_with_what_it_started(tmp_path, monkeypatch):
    taken, failed, _ = run_stage(tmp_path, """
    import subprocess
    for task in "ab":
        if task not in known:
            report(begin=task)
            finish(task)
            if task == "a":
                sleeper = subprocess.Popen(["sleep", "600"])
                (done.parent / "sleeper").write_text(str(sleeper.pid))
                time.sleep(600)
            report(task=task, found=None)
    """, monkeypatch, CHILD_S=1.0)  # fmt: skip
    assert (taken, failed) == ([("b", None)], [("a", "not finished after 1 s")])
    sleeper = Path(f"/proc/{(tmp_path / 'sleeper').read_text()}/stat")
    assert not sleeper.exists() or sleeper.read_text().split()[2] == "Z"


def test_a_child_that_cannot_begin_fails_once(tmp_path):
    taken, failed, statuses = run_stage(tmp_path, "raise SystemExit('no such module')")
    assert (taken, failed) == ([], [("child", "the process ended with 1: no such module")])
    assert statuses == {"child": 1}


def test_nothing_begins_after_the_deadline(tmp_path):
    never = [*stand_in("raise SystemExit(3)")]
    assert workers.stage({"child": never}, tmp_path, time.monotonic() - 1, print, print) == {}


def test_a_worker_stops_between_tasks_and_after_what_leaves_the_device_useless(monkeypatch):
    said = []

    def report(**message):
        said.append(message)

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    tasks = [("a", lambda: {"value": 1}), ("b", lambda: None)]
    assert workers.work(tasks, report) == 0
    assert [message.get("task") for message in said] == [None, "a", None, "b"]
    said.clear()
    assert workers.work(tasks, report, broken) == workers.UNFINISHED
    assert said[-1] == {"task": "a", "found": {"value": 1}}
    said.clear()
    monkeypatch.setattr(workers, "PATIENCE_S", workers.CHILD_S)
    assert workers.work(tasks, report) == workers.UNFINISHED
    assert said == []


def test_one_shape_comes_first_and_whole_and_autotuning_of_the_others_last():
    plan = gpu_timing.planned()
    of_first = [task for task in plan if task[1] == gpu_timing.FIRST]
    assert plan[: len(of_first)] == of_first
    assert {part for _, _, part in of_first} == set(gpu_record.PARTS) - {"cuda"}
    others = [part == "autotuned" for _, shape, part in plan if shape != gpu_timing.FIRST]
    assert others == sorted(others)
    assert len(set(plan)) == len(plan)
    done = [{"op": op, "shape": shape, gpu_record.PARTS[part]: 1.0} for op, shape, part in plan[:1]]
    refused = [{"op": op, "shape": shape, f"{part}_missing": "why"} for op, shape, part in plan[-1:]]
    assert gpu_timing.left(done + refused, False) == plan[1:-1]
    assert all(shape == gpu_timing.FIRST and part != "autotuned" for _, shape, part in gpu_timing.left([], True))


def test_a_failure_of_one_part_leaves_the_others(monkeypatch, tmp_path):
    case = gpu_checks.Case("relation_loss", gpu_checks.TINY, torch.float32, {"pool": "mean"})
    monkeypatch.setattr(gpu_timing, "rotated_inputs", lambda name, shape: (case, [gpu_checks.inputs(case, "cpu")]))
    monkeypatch.setattr(gpu_timing, "milliseconds", lambda call, rotated: (0.25, 1980))
    monkeypatch.setattr(gpu_timing, "gate", lambda case, made, backend: "" if backend == "triton" else "loss error 1")

    def fails(*_):
        raise RuntimeError("profiler")

    monkeypatch.setattr(gpu_timing, "launches", fails)
    monkeypatch.setattr(gpu_timing, "extra_bytes", fails)
    record = gpu_record.Record(tmp_path / "gpu.json", {"device": "a device"})
    record.take("copy", {"copy_tb_s": 3.0})
    for part in ("triton", "launches", "cuda", "extra", "compiled"):
        record.take(["relation_loss", "wan-480p", part], gpu_timing.measure("relation_loss", "wan-480p", part))
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["timings"]
    assert (row["triton_ms"], row["triton_sm_mhz"], row["compiled_ms"]) == (0.25, 1980, 0.25)
    assert row["percent_of_copy"] == pytest.approx(100 * row["gb_s"] / 3000)
    assert row["launches_missing"] == row["extra_missing"] == "RuntimeError: profiler"
    assert row["cuda_missing"] == "the accuracy gate failed: loss error 1"


def test_compiled_baselines_are_whole_graphs_and_each_is_compiled_afresh(monkeypatch):
    compiled = []

    def recorded(loss, **options):
        compiled.append(options)
        return torch._dynamo.optimize("eager", nopython=options["fullgraph"])(loss)

    monkeypatch.setattr(torch, "compile", recorded)
    for name, (op, options) in gpu_timing.OPERATORS.items():
        case = gpu_checks.Case(op, gpu_checks.TINY, torch.float32, options)
        made = gpu_checks.inputs(case, "cpu")
        found = gpu_timing.baseline_call(case, "autotuned")(made)
        torch.testing.assert_close(found, gpu_timing.baseline_call(case, "eager")(made), rtol=1e-3, atol=1e-5, msg=name)
    assert {options["mode"] for options in compiled} == {"max-autotune-no-cudagraphs"}


def test_the_sanitized_cases_are_among_the_checks_that_compile_their_kernels():
    checked = {case.name for case in gpu_checks.cases(small=False)}
    assert {case.name for case in gpu_checks.SANITIZED} <= checked
    assert len(gpu_checks.SANITIZED) == 3


def test_every_call_differentiates_by_one_gradient_of_the_loss_that_is_made_once(monkeypatch):
    given = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda loss, leaf, upstream: given.append(upstream) or grad(loss, leaf, upstream)
    )
    case = gpu_checks.Case("relation_loss", gpu_checks.TINY, torch.float32, {"pool": "mean"})
    made = gpu_checks.inputs(case, "cpu")
    gpu_checks.gradient(case, made, "reference")
    gpu_timing.baseline_call(case, "eager")(made)
    assert given[0] is given[1]
    assert given[0].item() == 1
