"""Wan2.2-A14B's pipeline of two experts: `transformer` for high noise, `transformer_2` for low."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codmd import hub
from codmd.atomic import creating_folder
from codmd.models.experts import EXPERTS, ExpertPair
from codmd.models.provenance import Provenance
from codmd.models.tensor_files import Joined, Renamed

from .config import FOLDERS, boundary_of
from .network import WanDenoiser
from .options import WanOptions


class WanExperts(ExpertPair):
    """Both experts; every weight's name in `state_dict` begins with "high." or "low."."""

    high: WanDenoiser
    low: WanDenoiser
    loaded_by = "WanTransformer3DModel.from_pretrained, subfolder transformer and transformer_2"
    pipeline_loaded_by = WanDenoiser.pipeline_loaded_by

    def __init__(self, options: WanOptions) -> None:
        high, low = (WanDenoiser(replace(options, expert=expert)) for expert in EXPERTS)
        super().__init__(high, low, boundary_of(options.weights))
        self.options = options

    @classmethod
    def from_options(cls, options: WanOptions) -> WanExperts:
        """Both networks; weights stay unread on the meta device.

        Raises:
            FileNotFoundError, ValueError: an option, a configuration, the boundary or the weights cannot be used.
        """
        if torch.get_default_device().type == "meta":
            return cls(options)
        with torch.device("meta"):
            model = cls(options)
        model.load_weights(options.weights)
        return model

    @contextmanager
    def open_weights(self, path: str | os.PathLike[str]) -> Iterator[Mapping[str, Tensor]]:
        """The weights of both, one tensor at a time."""
        with ExitStack() as stack:
            parts = [
                prefixed(expert, stack.enter_context(getattr(self, expert).open_weights(path))) for expert in EXPERTS
            ]
            yield Joined(*parts)

    def save_state(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """Writes `transformer` and `transformer_2`, and the boundary in an index."""
        with creating_folder(path) as folder:
            self._save_networks(folder, state, dtype, progress)
            self._write_index(folder, {"_class_name": "WanPipeline"})

    def save_pipeline(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Tensor],
        base: str,
        provenance: Provenance,
        dtype: torch.dtype | None,
        progress: Callable[[int], Any],
    ) -> None:
        """Writes a folder that `WanPipeline.from_pretrained` samples in the student's steps, with its model card."""
        with creating_folder(path) as folder:
            self._write_index(folder, self.low.write_parts(folder, base, provenance, progress))
            self._save_networks(folder, state, dtype, progress)

    def _save_networks(self, folder: Path, state: Mapping[str, Tensor], dtype: Any, progress: Any) -> None:
        for expert in EXPERTS:
            names = {name.removeprefix(f"{expert}."): name for name in state if name.startswith(f"{expert}.")}
            getattr(self, expert).save_state(folder / FOLDERS[expert], Renamed(state, names), dtype, progress)

    def _write_index(self, folder: Path, index: Mapping[str, Any]) -> None:
        network = ["diffusers", "WanTransformer3DModel"]
        content = {**index, **dict.fromkeys(FOLDERS.values(), network), "boundary_ratio": self.boundary}
        (folder / hub.INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def prefixed(expert: str, weights: Mapping[str, Tensor]) -> Renamed:
    """The weights of one expert by the names that they have in `WanExperts.state_dict`."""
    return Renamed(weights, {f"{expert}.{name}": name for name in weights})
