"""CoDMD: relation and distribution matching losses with fused kernels, and a thin loop around them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codmd import compat, conventions, distributed, metrics, ops, reference

__version__ = "0.1.0"
__all__ = ["__version__", "compat", "conventions", "distributed", "metrics", "ops", "reference"]


def __getattr__(name: str) -> Any:
    """A public module when it is first asked for; `import codmd` alone imports no torch, so the command is fast."""
    if name in __all__:
        return import_module(f"codmd.{name}")
    raise AttributeError(f"module 'codmd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
