"""Two networks that divide the noise levels between them, as one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .base import Condition, VideoDenoiser, index_cond

Expert = Literal["high", "low"]
EXPERTS: tuple[Expert, Expert] = ("high", "low")
"""Of the noise levels from the boundary on, and of those below it."""


class ExpertPair(VideoDenoiser):
    """`high` at noise levels from `boundary` on, `low` below it.

    A batch may have levels of both; over several processes its levels have to be of one expert on all of them.
    """

    def __init__(self, high: VideoDenoiser, low: VideoDenoiser, boundary: float) -> None:
        super().__init__()
        self.high, self.low = high, low
        self.boundary: float = boundary
        self.latent_shape, self.frames_per_second = high.latent_shape, high.frames_per_second
        self.from_image, self.known_frames = high.from_image, high.known_frames

    @property
    def device(self) -> torch.device:
        return self.low.device

    def forward(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """Velocity of every sample by the expert of its level."""
        return self._routed(lambda expert, *batch: expert(*batch), x_t, sigma, cond)

    def predict_x0(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """Clean latents of every sample by the expert of its level."""
        return self._routed(lambda expert, *batch: expert.predict_x0(*batch), x_t, sigma, cond)

    def _routed(self, predict: Callable[..., Tensor], x_t: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        high = sigma >= self.boundary
        if high.all():
            return predict(self.high, x_t, sigma, cond)
        if not high.any():
            return predict(self.low, x_t, sigma, cond)
        found = torch.empty_like(x_t, dtype=torch.promote_types(x_t.dtype, torch.float32))
        for expert, chosen in ((self.high, high), (self.low, ~high)):
            rows = chosen.nonzero().flatten()
            found[rows] = predict(expert, x_t[rows], sigma[rows], index_cond(cond, rows))
        return found

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return self.low.add_noise(x0, noise, sigma)

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Condition:
        return self.low.encode(prompts, images)

    def null_cond(self, batch: int) -> Condition:
        return self.low.null_cond(batch)

    def empty_cond(self, batch: int) -> Condition:
        return self.low.empty_cond(batch)

    def free_encoders(self) -> None:
        self.low.free_encoders()

    @property
    def video_frames(self) -> int:
        return self.low.video_frames

    def load_decoder(self) -> Any:
        return self.low.load_decoder()

    @property
    def token_splits(self) -> list[int]:
        return self.low.token_splits

    def split_tokens(self, mesh: DeviceMesh) -> None:
        for expert in (self.high, self.low):
            expert.split_tokens(mesh)

    def materialise(self, device: torch.device | str) -> None:
        for expert in (self.high, self.low):
            expert.materialise(device)

    @classmethod
    def from_options(cls, options: Any) -> VideoDenoiser:
        raise TypeError("ExpertPair: load its two networks")

    def save_state(self, path: Any, state: Any, dtype: Any = None, progress: Any = None) -> None:
        raise TypeError("ExpertPair: save its two networks")

    def open_weights(self, path: str | os.PathLike[str]) -> AbstractContextManager[Mapping[str, Tensor]]:
        raise TypeError("ExpertPair: load its two networks")
