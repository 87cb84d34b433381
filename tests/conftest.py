"""Shared fixtures: fresh memory is poisoned with NaN, one seed a test; what the interpreter's session skips."""

import pytest
import torch
from interpreted import INTERPRETED, needs_interpreter, patch_language_once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every",
        action="store_true",
        help="contract: every ambient state, every case traced and under the interpreter; static: every configuration; "
        "and what is marked so",
    )


LONGEST = (
    "test_static.py", "test_cuda_binary.py", "test_compile.py", "test_demo.py", "test_sanitizers.py",
    "test_cuda_host.py", "test_traced.py", "test_parallel.py", "test_train_killed.py", "test_train_command.py",
    "test_latency.py", "test_gpu_benchmarks.py", "test_launch_driver.py", "test_wan.py", "test_examples.py",
    "test_packaging.py",
)  # fmt: skip
"""Files that come first, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--every"):
        left_out = {item for item in items if item.get_closest_marker("every")}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True, scope="session")
def _language_patched_once():
    if INTERPRETED:
        needs_interpreter()
        patch_language_once()


@pytest.fixture(autouse=True)
def _deterministic_memory():
    """Fill uninitialised memory with NaN, so that an element no kernel wrote shows up."""
    if INTERPRETED:
        needs_interpreter()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """PyTorch on one thread: faster for tiny networks, much faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
