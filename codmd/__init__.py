"""CoDMD: relation and distribution matching losses with fused kernels, and a thin loop around them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "compat",
    "conventions",
    "distill",
    "distributed",
    "metrics",
    "models",
    "ops",
    "reference",
    "scheduler",
]

if TYPE_CHECKING:
    from codmd import compat, conventions, distill, distributed, metrics, models, ops, reference, scheduler
else:

    def __getattr__(name: str) -> ModuleType:
        """A public module when it is first asked for: alone, `import codmd` imports no torch and takes no time."""
        if name in __all__:
            return import_module(f"codmd.{name}")
        raise AttributeError(f"module 'codmd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
