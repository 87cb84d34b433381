"""The one contract between a video model and everything above it.

The objective, the rollout and the trainer know a model only as a `VideoDenoiser`: latents, noise level and
condition in, velocity or x0 out. What a model's own network expects (timesteps, packed tokens, a reversed time
axis, epsilon) is converted inside its subclass and nowhere else.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from .embeddings import PromptEncoder
from .images import ImageEncoder
from .provenance import Provenance
from .sharding import ShardPolicy, copy_weights

Condition = Any
"""What `encode` returns: a tensor or a mapping of tensors, batch first; None for an unconditional model."""


class VideoEncoder(Protocol):
    """From videos to the latents that a model is trained on.

    Attributes:
        frames_per_second: of the videos.
        dtype: of the latents, and of the encoder's weights.
        fingerprint: of these weights.
    """

    frames_per_second: int
    dtype: torch.dtype
    fingerprint: str

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a video's latents.

        Raises:
            ValueError: naming a number that no latents have.
        """
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] of pixels [B, T, 3, height, width] in [0, 1]."""
        ...


def per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """`sigma` [B] in float32 (or wider), shaped to broadcast over `like` [B, ...]."""
    if sigma.shape != (like.shape[0],):
        raise ValueError(f"sigma: shape {tuple(sigma.shape)}; expected ({like.shape[0]},), one level per sample")
    sigma = sigma.to(torch.promote_types(like.dtype, torch.float32))
    return sigma.view(-1, *[1] * (like.dim() - 1))


def cat_cond(conditions: Sequence[Condition]) -> Condition:
    """Conditions of several batches as the condition of the joint batch (concatenated along dimension 0).

    Sequences of tokens [B, L, D] of different lengths are zero-padded to the longest, as text embeddings are.
    """
    first = conditions[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {name: _cat([cond[name] for cond in conditions]) for name in first}
    return _cat(conditions)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].dim() == 3:
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [F.pad(t, (0, 0, 0, longest - t.shape[1])) if t.shape[1] < longest else t for t in tensors]
    return torch.cat(list(tensors))


def index_cond(cond: Condition, index: int | slice | Tensor) -> Condition:
    """The condition of some samples of a batch; an integer selects one sample and keeps the batch dimension."""
    if cond is None:
        return None
    if isinstance(index, int):
        index = slice(index, index + 1 or None)
    if isinstance(cond, Mapping):
        return {name: value[index] for name, value in cond.items()}
    return cond[index]


def move_cond(cond: Condition, device: torch.device | str) -> Condition:
    """The condition on another device."""
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {name: value.to(device, non_blocking=True) for name, value in cond.items()}
    return cond.to(device, non_blocking=True)


class VideoDenoiser(nn.Module, ABC):
    """A flow-matching video model: x_t = (1 - sigma) x0 + sigma noise, velocity v = noise - x0.

    Latents are [B, F, C, H, W]; sigma is [B] in [0, 1], float32. Calls go through `forward`, so that hooks of
    sharding and compilation wrappers run. A model with another parameterisation overrides `add_noise` and
    `predict_x0` too.
    """

    latent_shape: tuple[int, int, int, int]
    """(F, C, H, W) of one sample."""

    from_image = False
    """Whether every sample starts from an image, which its condition holds."""

    known_frames = 0
    """Frames at the start of every sample that its condition gives: no loss looks at them."""

    lora_targets: tuple[str, ...] = ()
    """Name endings of the linear layers that low-rank adapters go to."""

    frames_per_second = 16
    """Of the videos that it was trained on."""

    boundary: float | None = None
    """The lowest noise level of the high-noise expert, in a model of two and in one of them; None elsewhere."""

    checkpointing = False
    """Whether blocks are recomputed in the backward pass."""

    loaded_by = ""
    """How what `save` wrote is loaded elsewhere, for messages."""

    pipeline_loaded_by = ""
    """How what `save_pipeline` wrote is loaded elsewhere, for messages."""

    adapter_loaded_by = ""
    """How what `save_adapter` wrote is loaded elsewhere, for messages."""

    student_steps = ""
    """The step lists of its published students, for messages."""

    negative_prompt = ""
    """The text of the unconditional branch where none is given."""

    @classmethod
    def pipeline_options(cls, source: Path) -> dict[str, str]:
        """Options that a folder of weights answers by what else it holds: a text encoder, a decoder."""
        return {}

    @classmethod
    def student_sigmas(cls, source: Path) -> tuple[float, ...]:
        """The step list that a folder of a student's weights has beside them; empty where it has none."""
        return ()

    @classmethod
    def student_transition(cls, source: Path) -> Literal["renoise", "euler"]:
        """How a student whose step list is `student_sigmas` goes from one level to the next."""
        return "renoise"

    @classmethod
    def prompt_encoder(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> PromptEncoder:
        """The text encoder in a folder.

        Raises:
            FileNotFoundError, ValueError: it cannot be read, or the model has none.
        """
        raise ValueError(f"{cls.__name__} is unconditional: it has no text encoder")

    @classmethod
    def video_encoder(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> VideoEncoder:
        """The encoder of videos in a folder.

        Raises:
            FileNotFoundError, ValueError: it cannot be read, or the model has none.
        """
        raise ValueError(f"{cls.__name__} has no encoder: its latents are not images")

    @property
    def device(self) -> torch.device:
        """Where latents, sigma and conditions belong."""
        return next(self.parameters()).device

    @abstractmethod
    def forward(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """Velocity at x_t [B, F, C, H, W] and noise level sigma [B], in float32 or wider.

        That of known frames has no meaning.
        """

    def predict_x0(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """Clean latents x0 = x_t - sigma v, [B, F, C, H, W], in float32 or wider."""
        velocity = self(x_t, sigma, cond)
        return self.with_known_frames(x_t - per_sample(sigma, x_t) * velocity, cond)

    def with_known_frames(self, latents: Tensor, cond: Condition) -> Tensor:
        """Clean latents [B, F, C, H, W] with the frames that the condition gives in their place."""
        return latents

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t = (1 - sigma) x0 + sigma noise, with sigma [B]."""
        level = per_sample(sigma, x0)
        return (1 - level) * x0 + level * noise

    @classmethod
    def image_encoder(cls, options: Any, device: torch.device | str) -> ImageEncoder:
        """What encodes first frames for the network of these options.

        Raises:
            FileNotFoundError, ValueError: it cannot be read, or the network starts no video from an image.
        """
        raise ValueError(f"{cls.__name__} starts no video from an image")

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Condition:
        """The condition of a batch of prompts and, where the model is given first frames, their image files."""
        raise ValueError(f"{type(self).__name__} is unconditional: it encodes no prompts; pass cond=None")

    def null_cond(self, batch: int) -> Condition:
        """The condition of the unconditional branch of guidance, for a batch of that size."""
        raise ValueError(f"{type(self).__name__} is unconditional: it has no null condition; use guidance=None")

    def without_prompt(self, cond: Condition, batch: int) -> Condition:
        """The unconditional branch beside `cond`: what it holds but the prompt, such as a first frame, stays."""
        return self.null_cond(batch)

    def empty_cond(self, batch: int) -> Condition:
        """A condition of the largest size, its numbers undefined; None for an unconditional model."""
        return None

    def free_encoders(self) -> None:
        """Gives back the memory of what `encode` alone uses; the next call loads it again."""

    @property
    def video_frames(self) -> int:
        """Frames that one sample decodes to."""
        raise ValueError(f"{type(self).__name__} has no decoder: its latents are not images")

    def load_decoder(self) -> Any:
        """Reads the decoder now, for whoever wants its errors early.

        Raises:
            FileNotFoundError, ValueError: there is none, or it cannot be read.
        """
        raise ValueError(f"{type(self).__name__} has no decoder: its latents are not images")

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents [B, F, C, H, W]: [B, T, 3, height, width], float32 in [0, 1]."""
        return self.load_decoder()(latents)

    @property
    def repeated_blocks(self) -> nn.ModuleList:
        """The blocks that are sharded and recomputed one by one."""
        raise ValueError(f"{type(self).__name__} has no repeated blocks")

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """What an optimizer of this role updates (an adapter's own weights when a base is shared)."""
        return (p for p in self.parameters() if p.requires_grad)

    def enable_gradient_checkpointing(self, function: Callable[..., Any] | None = None) -> None:
        """Recomputes blocks in the backward pass; `function(block, *inputs)` replaces the way each is called."""
        raise ValueError(f"{type(self).__name__} has no gradient checkpointing; set gradient_checkpointing to false")

    def tangents(self) -> AbstractContextManager[None]:
        """Within it, under `torch.no_grad()`, `forward` takes dual numbers of `torch.autograd.forward_ad`."""
        return nullcontext()

    def shard_blocks(self, mesh: DeviceMesh, policy: ShardPolicy | None = None) -> None:
        """Shards every repeated block, then the rest, over `mesh` (1-D: full; 2-D: replicas x shards), in place."""
        raise ValueError(f"{type(self).__name__} cannot be sharded")

    @property
    def token_splits(self) -> list[int]:
        """Numbers of processes that `split_tokens` can spread a sample over."""
        return [1]

    def split_tokens(self, mesh: DeviceMesh) -> None:
        """Spreads the tokens of every sample over the dimension "ulysses" of `mesh`, in place.

        Every process of it passes the same inputs and gets the whole output; the gradient that it then has of a
        weight is its own tokens' part, to be summed over them.

        Raises:
            ValueError: the number of processes is none of `token_splits`.
        """
        raise ValueError(f"{type(self).__name__} has no context parallelism; leave parallel.context at 1")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes configuration and weights, all or nothing, in a form that `load_weights` reads."""
        self.save_state(path, self.state_dict())

    @abstractmethod
    def save_state(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """`save` with other weights (an average, a merged adapter) under the names of `state_dict`.

        Args:
            state: looked up one at a time; may read lazily. This model's own weights may be on the meta device.
            dtype: of the floating-point weights written; None keeps each one's.
            progress: called with the bytes of every weight written.
        """

    @classmethod
    @abstractmethod
    def from_options(cls, options: Any) -> VideoDenoiser:
        """The registry's constructor; on the meta device the weights stay unread.

        Raises:
            FileNotFoundError, ValueError: an option or the weights cannot be used.
        """

    def save_pipeline(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Tensor],
        base: str,
        provenance: Provenance,
        dtype: torch.dtype | None,
        progress: Callable[[int], Any],
    ) -> None:
        """Writes a student with all that its users need to sample it, all or nothing.

        Args:
            state, dtype, progress: as of `save_state`.
            base: a folder or a repository, which has what is not trained.
            provenance: of the student, for its model card.

        Raises:
            FileNotFoundError, ValueError: the base lacks something.
        """
        raise ValueError(f"{type(self).__name__} has no pipeline; convert it without --pipeline")

    def save_adapter(
        self, path: str | os.PathLike[str], factors: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> None:
        """Writes a low-rank adapter alone, in the form that the model's own users load over its base.

        Args:
            factors: A and B of every update B A, `<name of the layer>.lora_A.weight` and so on, names as in
                `state_dict`.
            dtype: of the factors written; None keeps each one's.
        """
        raise ValueError(f"{type(self).__name__} has no form for adapters alone; convert it merged into its base")

    @abstractmethod
    def open_weights(self, path: str | os.PathLike[str]) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Weights of this very network from a file that the model knows, by the names of `state_dict`, read lazily.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """

    def load_weights(self, path: str | os.PathLike[str], device: torch.device | str | None = None) -> None:
        """Replaces this model's weights, in place; each process reads its own part when the model is sharded.

        A model built on the meta device is materialised on `device` first.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        with self.open_weights(path) as tensors:
            self.fill(tensors, device)

    def fill(self, weights: Mapping[str, Tensor], device: torch.device | str | None = None) -> None:
        """`load_weights` from tensors by the names of `state_dict`; each is looked up once."""
        if self.device.type == "meta":
            self.materialise(device or "cpu")
        copy_weights(self, weights)

    def materialise(self, device: torch.device | str) -> None:
        """Gives a model of the meta device memory on `device`, and the values of its tables."""
        self.to_empty(device=device)
