"""The GPU suite's first run must work: everything of it that a CPU can run, runs here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import needs_interpreter

pytest.importorskip("triton")
from benchmarks import gpu_checks, gpu_record, gpu_timing, roofline

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_dry_run_passes_its_checks_and_times_nothing(tmp_path):
    needs_interpreter()
    done = command("benchmarks.gpu_suite", "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert len(results["checks"]) >= 12
    assert all(check["passed"] for check in results["checks"])
    assert results["timings"] == []


def test_a_gate_that_fails_blanks_the_row(tmp_path):
    timed = {
        "op": "relation_loss", "shape": "wan-480p", "triton_ms": 0.01, "eager_ms": 0.3, "compiled_ms": 0.05,
        "gb_s": 1600.0, "percent_of_copy": 40.0, "launches": 2, "extra_mb": 0.03,
    }  # fmt: skip
    refused = {"op": "dmd_loss", "shape": "wan-480p", "triton_missing": "the accuracy gate failed: loss error 1"}
    check = {"name": "accuracy: x", "passed": False, "detail": "loss error 1"}
    results = {
        "device": "a device", "date": "2000-01-01", "torch": "0", "triton": "0", "seconds": 1.0, "copy_tb_s": 4.0,
        "checks": [check], "timings": [timed, refused],
    }  # fmt: skip
    text = gpu_record.summary(results)
    assert "30.0x eager, 5.0x compiled" in text
    assert "no triton: the accuracy gate failed" in text
    assert "FAILED accuracy: x" in text
    assert "| dmd_loss | wan-480p |  |  |  |  |  |" in gpu_record.markdown(results)
    assert "| 10.0 |  | 300.0 | 50.0 |  | 40.0 |" in roofline.table(roofline.rows(), results)
    gpu_record.plot(results, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000


@pytest.mark.parametrize("name", gpu_timing.OPERATORS)
@pytest.mark.parametrize("lean", [False, True])
def test_the_baselines_compute_what_the_operators_do(name, lean):
    op, options = gpu_timing.OPERATORS[name]
    case = gpu_checks.Case(op, (2, 3, 2, 4, 8), torch.float32, options)
    made = gpu_checks.wide(gpu_checks.inputs(case, "cpu"))
    expected, _ = gpu_checks.gradient(case, made, None)
    found = gpu_timing.baseline(case, lean)(**made)
    # The baselines round to float32 on their way, and their relation loss cancels.
    torch.testing.assert_close(found.detach().double(), expected.double(), rtol=1e-3, atol=1e-6)


def test_the_gate_rejects_a_wrong_gradient(monkeypatch):
    case = gpu_checks.Case("relation_loss", (2, 3, 2, 4, 8), torch.float32, {"pool": "mean"})
    made = gpu_checks.inputs(case, "cpu")
    assert gpu_checks.errors(case, made, "reference") == ""
    honest = gpu_checks.gradient

    def off(case, made, backend):
        loss, gradient = honest(case, made, backend)
        return loss, gradient * (1.001 if backend == "reference" else 1)

    monkeypatch.setattr(gpu_checks, "gradient", off)
    assert "gradient error 1.0e-03" in gpu_checks.errors(case, made, "reference")


def test_host_time_is_measured_down_to_the_driver(tmp_path):
    path = tmp_path / "launch.json"
    done = command("benchmarks.launch", "--rounds", "1", "--json", str(path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(path.read_text())
    assert found["idle_driver"] == (not torch.cuda.is_available())
    assert all(value > 0 for value in found["us"].values())
