"""A residual network over short vector videos: the model of `codmd demo`, and the trainer's smallest subject."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from codmd.atomic import replacing

from .base import Condition, VideoDenoiser
from .options import ModelOptions
from .sharding import ShardPolicy


@dataclass(frozen=True)
class ToyConfig:
    """Size of a `ToyDenoiser`.

    Attributes:
        frames, channels: of a video (height = width = 1).
        width: of the hidden layers.
        blocks: residual blocks.
        frequencies: of the noise level's embedding.
    """

    frames: int = 8
    channels: int = 6
    width: int = 256
    blocks: int = 3
    frequencies: int = 16

    def __post_init__(self) -> None:
        for field in fields(ToyConfig):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}: got {value!r}; expected a positive integer")


@dataclass(frozen=True)
class ToyOptions(ToyConfig, ModelOptions):
    """Options of the registry's "toy": its size, and where its weights come from.

    Attributes:
        weights: a file that `ToyDenoiser.save` wrote, or "random".
    """

    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weights:
            raise ValueError('weights: not given; expected the path of a ToyDenoiser file, or "random"')


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
    loaded_by = "ToyDenoiser.load"
    lora_targets = ("up", "down")

    def __init__(self, config: ToyConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ToyConfig()
        self.latent_shape = (config.frames, config.channels, 1, 1)
        size = config.frames * config.channels
        self.register_buffer("frequency", self._frequencies(), persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * config.frequencies, config.width), nn.SiLU())
        self.input = nn.Linear(size, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.blocks))
        self.output = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, size))

    @classmethod
    def from_options(cls, options: ToyOptions) -> ToyDenoiser:
        """The registry's constructor; weights stay unread on the meta device."""
        model = cls(ToyConfig(**{field.name: getattr(options, field.name) for field in fields(ToyConfig)}))
        if options.weights != "random" and model.frequency.device.type != "meta":
            model.load_weights(options.weights)
        return model

    def _frequencies(self) -> Tensor:
        return torch.logspace(0, 2, self.config.frequencies)

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

    def shard_blocks(self, mesh: DeviceMesh, policy: ShardPolicy | None = None) -> None:
        """FSDP2 over the residual blocks, then the rest; the arithmetic stays in float32."""
        policy = policy or ShardPolicy()
        for block in self.blocks:
            policy.shard(block, mesh, full_precision=True)
        policy.shard(self, mesh, full_precision=True)

    def save_state(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """Writes weights and configuration as safetensors: to a temporary sibling, then renamed over `path`."""
        weights = {name: state[name].detach().to(dtype=dtype).contiguous() for name in state}
        expected = {name: value.shape for name, value in self.state_dict().items()}
        if {name: value.shape for name, value in weights.items()} != expected:
            raise ValueError(f"save: these are not the weights of a network of {self.config}")
        metadata = {"config": json.dumps(asdict(self.config)), "sha256": _digest(weights)}
        with replacing(path) as partial:
            save_file(weights, partial, metadata=metadata)
        if progress is not None:
            progress(sum(weight.nbytes for weight in weights.values()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ToyDenoiser:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, changed since it was written, or another kind of file.
        """
        config, weights = _read(path)
        model = cls(config)
        model.load_state_dict(weights)
        return model

    @contextmanager
    def open_weights(self, path: str | os.PathLike[str]) -> Iterator[Mapping[str, Tensor]]:
        """The weights of a file that `save` wrote, of the same size of network."""
        config, weights = _read(path)
        if config != self.config:
            raise ValueError(f"{path}: holds a network of {config}; expected {self.config}")
        yield weights

    def materialise(self, device: torch.device | str) -> None:
        """Memory on `device`, and the frequencies, which no file has."""
        self.to_empty(device=device)
        self.frequency.copy_(self._frequencies())

    @property
    def repeated_blocks(self) -> nn.ModuleList:
        """The residual blocks."""
        return self.blocks


def _read(path: str | os.PathLike[str]) -> tuple[ToyConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = ToyConfig(**json.loads(metadata["config"]))
        expected = {name: value.shape for name, value in ToyDenoiser(config).state_dict().items()}
        if {name: value.shape for name, value in weights.items()} != expected:
            raise ValueError("names or shapes differ from its configuration's")
        intact = metadata["sha256"] == _digest(weights)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a readable ToyDenoiser file: {error!r}") from error
    if not intact:
        raise ValueError(f"{path} is damaged: its weights do not match their checksum")
    return config, weights


def _digest(weights: dict[str, Tensor]) -> str:
    """Hex SHA-256 of all weights in the order of their names; safetensors itself checks sizes only."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
