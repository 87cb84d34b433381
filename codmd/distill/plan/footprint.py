"""The memory of one network: weights from their shapes, activations from a run on fake tensors.

Peaks of activations are measured on fake tensors (shapes and lifetimes, no numbers) at two depths of the network and
extended linearly to its own, because every block is alike. Attention is taken to keep queries, keys, values, output
and one number a row, as flash kernels do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from codmd import models
from codmd.distill.config.sections import ModelSettings
from codmd.distill.update.trigflow import field_difference, field_jvp
from codmd.models.base import Condition, VideoDenoiser
from codmd.models.lora import ADAPTERS, LoraOptions, LoraRoles
from codmd.private import fake_tensors, one_of

DEPTHS = (2, 4)
EXCHANGES = ("_c10d_functional::all_to_all_single", "_c10d_functional::all_gather_into_tensor")
"""The collectives of Ulysses: around attention, and at the end."""


@dataclass(frozen=True)
class Footprint:
    """One network, or one base with the adapters of student and critic, in numbers of parameters and bytes.

    Attributes:
        parameters: of all of it, both adapters included.
        largest_block: parameters of its largest repeated block.
        outside_blocks: parameters of what no block holds: embeddings, the last layer.
        trained: parameters that one update changes: the network's, or one adapter's.
        trained_block: how many of them the largest block has.
        training: bytes alive at the worst moment of a forward and backward pass of one micro-batch, beside weights
            and their gradients.
        kept: bytes that the forward pass leaves for the backward pass.
        inference: bytes alive at the worst moment of a forward pass without gradient.
        tangent: bytes alive at the worst moment of the derivative of a consistency term; 0 without one.
        exchanged_training, exchanged_inference: bytes that one process receives in those passes from those that it
            shares a sample with; of inference, for a micro-batch.
    """

    parameters: int
    largest_block: int
    outside_blocks: int
    trained: int
    trained_block: int
    training: int
    kept: int
    inference: int
    tangent: int
    exchanged_training: int
    exchanged_inference: int


def footprint(
    settings: ModelSettings,
    batch: int,
    inference_batch: int,
    lora: LoraOptions | None = None,
    context: int = 1,
    tangent: Literal["jvp", "difference"] | None = None,
) -> Footprint:
    """Measures one network.

    Args:
        batch: samples of a forward pass with gradient, and of the critic's without.
        inference_batch: samples of the teacher's forward pass.
        lora: freeze the network and train adapters over it.
        context: processes that share every sample.
        tangent: how the derivative of a consistency term is found; None without one.
    """
    options = _unfilled(settings)
    with torch.device("meta"):
        network = models.build(settings.name, **options)
        roles = 1
        if lora is not None:
            LoraRoles(network, lora)
            roles = len(ADAPTERS)
        blocks = [(_count(block.parameters()), _trained(block) // roles) for block in network.repeated_blocks]
        whole, trained = _count(network.parameters()), _trained(network) // roles
    depths = [min(depth, len(blocks)) for depth in DEPTHS]
    with _joined(context) as mesh:
        peaks = [_peaks(settings.name, options, depth, batch, inference_batch, lora, mesh, tangent) for depth in depths]
    extended = (_extend(values, depths, len(blocks)) for values in zip(*peaks, strict=True))
    largest, trained_block = (max(counts) for counts in zip(*blocks, strict=True))
    outside_blocks = whole - sum(count for count, _ in blocks)
    return Footprint(whole, largest, outside_blocks, trained, trained_block, *extended)


def token_splits(settings: ModelSettings) -> list[int]:
    """Numbers of processes that the network can spread a sample over, and this release of PyTorch can plan for."""
    with torch.device("meta"):
        splits = models.build(settings.name, **_unfilled(settings)).token_splits
    with one_of(1) as joined:
        return splits if joined else [1]


def stored_bytes(settings: ModelSettings) -> int:
    """Bytes of a network's weights in the dtypes that its options keep them in."""
    with torch.device("meta"):
        network = models.build(settings.name, **{**vars(settings.options), "weights": "random"})
    return sum(weight.numel() * weight.element_size() for weight in network.parameters())


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _trained(module: nn.Module) -> int:
    return _count(parameter for parameter in module.parameters() if parameter.requires_grad)


def _unfilled(settings: ModelSettings) -> dict[str, Any]:
    """Options of a network that reads no file, its weights in the dtype that sharded ones are gathered in."""
    known = {field.name for field in fields(models.options_class(settings.name))}
    options = vars(settings.options)
    changes = {"weights": "random", "storage": options.get("compute"), "compile": False}
    return {**options, **{name: value for name, value in changes.items() if name in known}}


def _extend(values: tuple[int, ...], depths: list[int], depth: int) -> int:
    (shallow, deep), (first, last) = values, depths
    slope = (deep - shallow) / (last - first) if last > first else 0
    return round(shallow + slope * (depth - first))


def _peaks(
    name: str,
    options: dict[str, Any],
    depth: int,
    batch: int,
    inference_batch: int,
    lora: LoraOptions | None,
    mesh: DeviceMesh | None,
    tangent: Literal["jvp", "difference"] | None,
) -> tuple[int, int, int, int, int, int]:
    """The last six of `Footprint`, of a network cut to `depth` blocks."""
    with torch.device("meta"):
        network: VideoDenoiser = models.build(name, **options)
        del network.repeated_blocks[depth:]
        if mesh is not None:
            network.split_tokens(mesh)
        student = critic = teacher = network
        if lora is not None:
            roles = LoraRoles(network, lora)
            student, critic, teacher = roles.student, roles.critic, roles.teacher
    with fake_tensors(), LiveBytes() as live, flash_attention():
        _leave_meta(network)
        micro_batch, guided = _inputs(network, batch), _inputs(network, inference_batch)
        start = live.restart()
        output = student(*micro_batch)
        kept = live.now - start
        output.float().square().mean().backward()
        training, exchanged = live.peak - start, live.exchanged
        del output
        start = live.restart()
        with torch.no_grad():
            critic(*micro_batch)
            exchanged_inference = live.exchanged - exchanged
            teacher(*guided)
        inference = live.peak - start
        start = live.restart()
        if tangent is not None:
            x_t, t, cond = micro_batch[0].double(), micro_batch[1].double(), micro_batch[2]
            derivative = field_jvp if tangent == "jvp" else field_difference
            with layer_norms_in_parts():
                derivative(student, x_t, t, torch.empty_like(x_t), torch.empty_like(t), cond)
        return training, kept, inference, live.peak - start, exchanged, exchanged_inference


@contextmanager
def _joined(context: int) -> Iterator[DeviceMesh | None]:
    """The first of `context` processes that exchange shapes and no numbers."""
    if context == 1:
        yield None
        return
    with one_of(context) as joined:
        if not joined:
            raise ValueError("parallel.context: this release of PyTorch cannot plan for it; expected 1")
        yield init_device_mesh("cpu", (1, 1, context), mesh_dim_names=("data", "ring", "ulysses"))


def _inputs(network: VideoDenoiser, batch: int) -> tuple[Tensor, Tensor, Condition]:
    return torch.empty(batch, *network.latent_shape), torch.empty(batch), network.empty_cond(batch)


def _leave_meta(network: nn.Module) -> None:
    """Gives a network of the meta device weights of the default one, whose gradients go as soon as they are there."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            fresh = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
            module.register_parameter(name, fresh)
            if fresh.requires_grad:
                fresh.register_post_accumulate_grad_hook(_drop_gradient)
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators have made and that are still alive.

    Attributes:
        now, peak: bytes alive, and the most since the last `restart`.
        exchanged: bytes that collectives between the processes of a sample have brought.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.exchanged = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def restart(self) -> int:
        """Forgets the peak; returns the bytes alive."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in EXCHANGES:
            self.exchanged += result.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


@contextmanager
def flash_attention() -> Iterator[None]:
    """Puts a stand-in with the memory of a flash kernel in the place of `scaled_dot_product_attention`.

    A function mode would not reach the recomputation of blocks, which runs inside the backward pass.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextmanager
def layer_norms_in_parts() -> Iterator[None]:
    """Scales and shifts after `layer_norm`, whose own forward mode with weights fails on fake tensors (torch 2.13)."""
    original = F.layer_norm

    def norm(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        out = original(input, normalized_shape, None, None, eps)
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    F.layer_norm = norm
    try:
        yield
    finally:
        F.layer_norm = original


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        rows = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
