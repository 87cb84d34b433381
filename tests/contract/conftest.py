"""The backends that a claim is tested on, and the ambient states under which their operators run."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import cuda_simulation
import pytest
from ambient import STATES
from interpreted import INTERPRETED
from losses import RELATION, Calls

from codmd import backends

BACKENDS = ("triton",) if INTERPRETED else ("reference", "cpp", "cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "call" in metafunc.fixturenames:
        states = STATES if metafunc.config.getoption("--every") else ["plain"]
        cases = [Calls(backend, state) for backend in BACKENDS for state in states]
        names = [case.backend if case.state == "plain" else f"{case.backend}, {case.state}" for case in cases]
        metafunc.parametrize("call", cases, ids=names, indirect=True)


def of_every_pixel(params: dict) -> bool:
    return params.get("loss") is RELATION and params.get("options", {}).get("pool", "") is None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--every``: a sample of what takes a second.

    Under the interpreter that is one case of a claim and loss, and of claims about the operator, which is one for all
    backends, those of every pixel, the one shape that depends on the backend. Traced, it is every case on C++ and a
    third of them on the reference and on CUDA.
    """
    if config.getoption("--every"):
        return
    on_a_backend = [item for item in items if "call" in getattr(item, "fixturenames", ())]
    if INTERPRETED:
        claims: dict[tuple, list[pytest.Item]] = {}
        for item in on_a_backend:
            if item.get_closest_marker("operator") and not of_every_pixel(item.callspec.params):
                continue
            claims.setdefault((item.function, item.callspec.params.get("loss")), []).append(item)
        kept = {cases[crc32(cases[0].name.encode()) % len(cases)] for cases in claims.values()}
    else:
        kept = {
            item for item in on_a_backend
            if item.path.name != "test_traced.py" or item.callspec.params["call"].backend == "cpp"
            or crc32(item.name.encode()) % 3 == 0
        }  # fmt: skip
    left_out = {item for item in on_a_backend if item not in kept}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Terms and gradients on one backend; that of CUDA with its threads simulated on the host."""
    backend = request.param.backend
    if backend == "cuda":
        if not cuda_simulation.COMPILER:
            pytest.skip("no C++ compiler")
        for _ in cuda_simulation.serve(monkeypatch):
            yield request.param
        return
    if backend != "triton" and backends.load(backend)[0] is None:
        pytest.skip(f"{backend}: {backends.load(backend)[1]}")
    yield request.param
