"""`auto` follows the table that a measurement writes, and without one its fixed order."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from codmd import backends

SIZES = {"wan-480p": 2_096_640, "wan-480p-b2": 4_193_280, "wan-480p-b8": 16_773_120}
TABLE = {"sm_90": {"relation_loss": [[3_000_000, "cuda"], [None, "triton"]]}}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is said to be there, with every backend; a tensor of a size, dtype and device."""
    modules = {name: SimpleNamespace(load_error="", name=name) for name in backends.BACKENDS}
    monkeypatch.setattr(backends, "load", lambda name: (modules[name], ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CODMD_BACKEND", raising=False)
    caches = (backends._refusal, backends._resolve, backends._measured)
    for cache in caches:
        cache.cache_clear()

    def select(size, dtype=torch.bfloat16, operator="relation_loss", requested="auto", device="cuda"):
        tensor = SimpleNamespace(device=torch.device(device), dtype=dtype, numel=lambda: size)
        return backends.select(requested, tensor, operator).name

    yield select
    for cache in caches:
        cache.cache_clear()


def test_auto_takes_the_fastest_backend_of_the_size_the_operator_and_the_gpu(gpu, monkeypatch):
    monkeypatch.setattr(backends, "FASTEST", TABLE)
    assert [gpu(size) for size in (1, 2_096_640, 3_000_000, 3_000_001)] == ["cuda", "cuda", "cuda", "triton"]
    assert gpu(1, torch.float16) == "cuda"
    assert gpu(1, torch.float32) == "triton"
    assert gpu(1, operator="objective") == "triton"
    assert gpu(1, requested="triton") == "triton"
    assert gpu(1, device="cpu") == "cpp"
    monkeypatch.setenv("CODMD_BACKEND", "reference")
    assert gpu(1) == "reference"


def test_another_gpu_or_no_table_keeps_the_order(gpu, monkeypatch):
    monkeypatch.setattr(backends, "FASTEST", {"sm_100": TABLE["sm_90"]})
    assert gpu(1) == "triton"
    monkeypatch.setattr(backends, "FASTEST", {})
    assert gpu(1) == "triton"


def test_the_fastest_backend_gives_way_where_it_cannot_run(gpu, monkeypatch):
    monkeypatch.setattr(backends, "FASTEST", TABLE)
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: (None, "not built") if name == "cuda" else load(name))
    assert gpu(1) == "triton"


def test_doctor_names_what_was_measured(gpu, monkeypatch):
    monkeypatch.setattr(backends, "FASTEST", TABLE)
    assert backends._all_measured("cuda") == [("relation_loss", "cuda up to 3,000,000 elements, triton")]
    assert backends._all_measured("cpu") == []


def timing(op, shape, triton, cuda):
    return {"op": op, "shape": shape, "triton_ms": triton, "cuda_ms": cuda}


def test_the_table_has_the_winner_at_each_measured_size():
    roofline = pytest.importorskip("benchmarks.roofline")
    results = {
        "capability": "sm_90",
        "timings": [
            timing("relation_loss", "wan-480p-b8", 0.05, 0.06),
            timing("relation_loss", "wan-480p", 0.03, 0.02),
            timing("relation_loss", "wan-480p-b2", 0.04, 0.03),
            {"op": "relation_loss", "shape": "wan-720p", "cuda_ms": 0.01},
            timing("relation_loss, pool=None", "wan-480p", 0.02, 0.03),
            # One operator serves both losses, so the sum decides.
            timing("dmd_loss", "wan-480p", 0.02, 0.03),
            timing("codmd_loss", "wan-480p", 0.05, 0.03),
        ],
    }
    between = round((SIZES["wan-480p-b2"] * SIZES["wan-480p-b8"]) ** 0.5)
    table = roofline.fastest(results)
    assert table == {"sm_90": {"relation_loss": [(between, "cuda"), (None, "triton")], "objective": [(None, "cuda")]}}
    assert json.loads(json.dumps(table))["sm_90"]["objective"] == [[None, "cuda"]]
    assert roofline.fastest(None) == roofline.fastest(results | {"timings": results["timings"][4:5]}) == {}


def test_every_operator_asks_for_its_own_name(monkeypatch):
    from codmd import ops

    asked = []
    select = backends.select

    def noted(requested, tensor, operator=""):
        asked.append((operator, tensor.numel()))
        return select(requested, tensor, operator)

    monkeypatch.setattr(backends, "select", noted)
    latents = [torch.randn(2, 3, 2, 4, 4) for _ in range(3)]
    compiled = torch.compile(lambda x, r, f, pool: ops.relation_loss(x, r, f, pool=pool), backend="aot_eager")
    for pool, name in (("mean", "relation_loss"), (None, "whole_relation_loss")):
        for call in (lambda x, r, f, pool: ops.relation_loss(x, r, f, pool=pool), compiled):
            asked.clear()
            leaf = latents[0].clone().requires_grad_()
            call(leaf, *latents[1:], pool).backward()
            assert asked
            assert set(asked) == {(name, leaf.numel())}
    asked.clear()
    ops.dmd_loss(latents[0], real=latents[1], fake=latents[2])
    ops.codmd_loss(latents[0], real=latents[1], fake=latents[2])
    assert set(asked) == {("objective", latents[0].numel())}
