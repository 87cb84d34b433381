"""Teacher, student and critic as three views of one network: low-rank adapters over a shared frozen base.

Which adapter runs is chosen inside each view's call, and the recomputation of a checkpointed block chooses again what
its forward pass had. No call changes `requires_grad`: an adapter switched off between forward and backward would
otherwise get no gradient, in silence.
"""

from __future__ import annotations

import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from .base import Condition, VideoDenoiser
from .sharding import ShardPolicy

TEACHER, STUDENT, CRITIC = "teacher", "student", "critic"
ADAPTERS = (STUDENT, CRITIC)


@dataclass(frozen=True)
class LoraOptions:
    """Size of the adapters.

    Attributes:
        rank: of every update B A.
        alpha: the update is scaled by alpha / rank.
        targets: name endings of the adapted linear layers; empty for the model's own choice.
    """

    rank: int = 64
    alpha: int = 64
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: got {self.rank}; expected at least 1")
        if self.alpha < 1:
            raise ValueError(f"alpha: got {self.alpha}; expected at least 1")


class LoraRoles:
    """One base with the adapters "student" and "critic"; both start as the base exactly (B = 0).

    Build the roles before sharding; on the meta device, shard, load the base's weights, then call `initialise`.

    Args:
        base: frozen from now on.
        options: see `LoraOptions`.
        seed: of the adapters' first factors, alike on every process.

    Raises:
        ValueError: a target names no linear layer of the base.
    """

    def __init__(self, base: VideoDenoiser, options: LoraOptions | None = None, seed: int = 0) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.base, self.options, self.seed = base, options or LoraOptions(), seed
        targets = self.options.targets or base.lora_targets
        for target in targets or [""]:
            if not any(isinstance(m, nn.Linear) and _ends(name, target) for name, m in base.named_modules()):
                raise ValueError(f"targets: no linear layer of {type(base).__name__} is called {target!r}")
        config = LoraConfig(r=self.options.rank, lora_alpha=self.options.alpha, target_modules=list(targets))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are meant
            for adapter in ADAPTERS:
                inject_adapter_in_model(config, base, adapter_name=adapter)
        base.requires_grad_(False)
        self._layers: dict[str, Any] = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
        for layer in self._layers.values():
            for adapter in ADAPTERS:
                for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
                    factor.to(torch.float32).requires_grad_(True)
        self._active = ""
        self._switch(TEACHER)
        if base.device.type != "meta":
            self.initialise()
        if base.checkpointing:
            self.enable_gradient_checkpointing()
        self.teacher = RoleView(self, TEACHER)
        self.student = RoleView(self, STUDENT)
        self.critic = RoleView(self, CRITIC)

    @torch.no_grad()
    def initialise(self) -> None:
        """A uniform with variance 1 / (3 fan-in), B zero; the same numbers for any number of processes."""
        for name, layer in self._layers.items():
            for adapter in ADAPTERS:
                first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{adapter}/{name}".encode()))
                bound = 1 / math.sqrt(first.shape[1])
                _fill(first, torch.rand(first.shape, generator=generator).mul_(2 * bound).sub_(bound))
                _fill(second, torch.zeros(second.shape))

    @contextmanager
    def activate(self, role: str) -> Iterator[None]:
        """Runs the base with the adapter of `role` (none for the teacher) inside the block."""
        before = self._active
        self._switch(role)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, role: str) -> None:
        if role != self._active:
            self._active = role
            for layer in self._layers.values():
                layer._active_adapter = [role] if role in ADAPTERS else []

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes blocks in the backward pass, each under the role of its forward pass."""
        self.base.enable_gradient_checkpointing(self._checkpointed)

    def _checkpointed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        role = self._active

        def run(*tensors: Any) -> Any:
            with self.activate(role):
                return block(*tensors)

        return checkpoint(run, *inputs, use_reentrant=False)

    def adapter_modules(self, role: str) -> nn.Module:
        """The factors of one role as a tree of their own: `blocks.0.attn1.to_q.lora_A` and so on."""
        root = nn.Module()
        for name, layer in self._layers.items() if role in ADAPTERS else ():
            parent = root
            for part in name.split("."):
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module("lora_A", layer.lora_A[role])
            parent.add_module("lora_B", layer.lora_B[role])
        return root

    @torch.no_grad()
    def merged_state_dict(self, role: str) -> dict[str, Tensor]:
        """The base's weights with W + (alpha / rank) B A, under the names of a base without adapters."""
        state = {}
        for name, value in self.base.state_dict().items():
            if ".lora_" in name:
                continue
            layer_name, _, leaf = name.rpartition(".base_layer.")
            if role in ADAPTERS and leaf == "weight":
                value = value + self._layers[layer_name].get_delta_weight(role).to(value.dtype)
            state[name.replace(".base_layer.", ".")] = value
        return state


class RoleView(VideoDenoiser):
    """One role over the shared base. Its parameters and state are its adapter's; the teacher has none."""

    def __init__(self, roles: LoraRoles, role: str) -> None:
        super().__init__()
        self.role = role
        self._roles = (roles,)  # in a tuple, so that the base is no submodule of its views
        self.latent_shape, self.known_frames = roles.base.latent_shape, roles.base.known_frames
        self.adapter = roles.adapter_modules(role)

    @property
    def roles(self) -> LoraRoles:
        """What the three views share."""
        return self._roles[0]

    @property
    def device(self) -> torch.device:
        return self.roles.base.device

    def forward(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """The base's velocity under this role's adapter."""
        with self.roles.activate(self.role):
            return self.roles.base(x_t, sigma, cond)

    def predict_x0(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """The base's x0 under this role's adapter."""
        with self.roles.activate(self.role):
            return self.roles.base.predict_x0(x_t, sigma, cond)

    def with_known_frames(self, latents: Tensor, cond: Condition) -> Tensor:
        return self.roles.base.with_known_frames(latents, cond)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return self.roles.base.add_noise(x0, noise, sigma)

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Condition:
        return self.roles.base.encode(prompts, images)

    def null_cond(self, batch: int) -> Condition:
        return self.roles.base.null_cond(batch)

    def without_prompt(self, cond: Condition, batch: int) -> Condition:
        return self.roles.base.without_prompt(cond, batch)

    def decode(self, latents: Tensor) -> Tensor:
        return self.roles.base.decode(latents)

    def tangents(self) -> AbstractContextManager[None]:
        return self.roles.base.tangents()

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """The factors of this role's adapter."""
        return self.adapter.parameters()

    def enable_gradient_checkpointing(self, function: Callable[..., Any] | None = None) -> None:
        """Recomputation for all three roles; how a block is called is the roles' own business."""
        if function is not None:
            raise ValueError("function: a role of a shared base chooses how blocks are recomputed")
        self.roles.enable_gradient_checkpointing()

    def shard_blocks(self, mesh: DeviceMesh, policy: ShardPolicy | None = None) -> None:
        raise ValueError("shard_blocks: shard the shared base, once, not its roles")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole network of this role, its adapter merged into the base, as the base would."""
        self.roles.base.save_state(path, self.roles.merged_state_dict(self.role))

    def save_state(self, path: Any, state: Any, dtype: Any = None, progress: Any = None) -> None:
        raise TypeError("RoleView: load the state into this view, then save it")

    @classmethod
    def from_options(cls, options: Any) -> VideoDenoiser:
        raise TypeError("RoleView: load the base and build LoraRoles over it")

    def open_weights(self, path: str | os.PathLike[str]) -> AbstractContextManager[Mapping[str, Tensor]]:
        raise TypeError("RoleView: load the base's weights, or a state dictionary into this view")


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _fill(parameter: Tensor, values: Tensor) -> None:
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        part = distribute_tensor(values.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(values)
