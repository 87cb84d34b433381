"""Shared fixtures: fresh memory is poisoned with NaN, one seed a test, few threads."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic_memory():
    """Fill uninitialised memory with NaN, so that an element no kernel wrote shows up."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every",
        action="store_true",
        help="tests/contract in full: under every ambient state, and every case under the interpreter",
    )
