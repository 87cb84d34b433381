"""A residual network over short vector videos: the model of `codmd demo`, and the trainer's smallest subject."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Condition, VideoDenoiser


@dataclass(frozen=True)
class ToyConfig:
    """Size of a `ToyDenoiser`: videos of `frames` x `channels` numbers (height = width = 1)."""

    frames: int = 8
    channels: int = 6
    width: int = 256
    blocks: int = 3
    frequencies: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}; expected a positive integer")


class ResidualBlock(nn.Module):
    """h + W2 silu(W1 norm(h) + time)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        return hidden + self.down(F.silu(self.up(self.norm(hidden)) + time))


class ToyDenoiser(VideoDenoiser):
    """Velocity prediction by a residual MLP on the flattened video [B, F*C], conditioned on sigma alone."""

    frequency: Tensor

    def __init__(self, config: ToyConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ToyConfig()
        self.latent_shape = (config.frames, config.channels, 1, 1)
        size = config.frames * config.channels
        self.register_buffer("frequency", torch.logspace(0, 2, config.frequencies), persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * config.frequencies, config.width), nn.SiLU())
        self.input = nn.Linear(size, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.blocks))
        self.output = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, size))

    def forward(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """Velocity [B, F, C, 1, 1] in float32; `cond` must be None."""
        if cond is not None:
            raise TypeError("ToyDenoiser is unconditional: pass cond=None")
        if x_t.shape[1:] != self.latent_shape:
            raise ValueError(f"x_t: shape {tuple(x_t.shape)}; expected (B, {', '.join(map(str, self.latent_shape))})")
        phase = sigma.float()[:, None] * self.frequency
        time = self.time(torch.cat((phase.cos(), phase.sin()), dim=1))
        hidden = self.input(x_t.flatten(1).float())
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.output(hidden).view_as(x_t)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights and configuration as safetensors: to a temporary sibling, then renamed over `path`."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            weights = self.state_dict()
            metadata = {"config": json.dumps(asdict(self.config)), "sha256": _digest(weights)}
            save_file(weights, partial, metadata=metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ToyDenoiser:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, changed since it was written, or another kind of file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model = cls(ToyConfig(**json.loads(metadata["config"])))
            model.load_state_dict(weights)
            intact = metadata["sha256"] == _digest(weights)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a readable ToyDenoiser file: {error!r}") from error
        if not intact:
            raise ValueError(f"{path} is damaged: its weights do not match their checksum")
        return model


def _digest(weights: dict[str, Tensor]) -> str:
    """Hex SHA-256 of all weights in the order of their names; safetensors itself checks sizes only."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
