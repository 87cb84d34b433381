"""Shared fixtures: fresh memory is poisoned with NaN, one seed a test; what the interpreter's session skips."""

import pytest
import torch
from interpreted import INTERPRETED, needs_interpreter, patch_language_once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every",
        action="store_true",
        help="contract: every ambient state, and every case under the interpreter; static: every configuration",
    )


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
