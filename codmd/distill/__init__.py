"""Distillation from Python: a recipe, three networks and a generator of cycles; `codmd train` loops over them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CycleLog": "update.cycle_log",
    "DistillConfig": "config.recipe",
    "Distiller": "update.trainer",
    "cycles": "loop",
    "sample_few_step": "update.rollout",
}
__all__ = ["CycleLog", "DistillConfig", "Distiller", "cycles", "sample_few_step"]

if TYPE_CHECKING:
    from .config.recipe import DistillConfig
    from .loop import cycles
    from .update.cycle_log import CycleLog
    from .update.rollout import sample_few_step
    from .update.trainer import Distiller
else:

    def __getattr__(name: str) -> Any:
        """A public name when it is first asked for; the parts import each other without this module."""
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
