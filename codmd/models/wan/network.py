"""Wan behind the adapter contract, on diffusers' `WanTransformer3DModel`.

Latents outside are normalised (zero mean, unit variance per channel) and [B, F, C, H, W]; diffusers' are
[B, C, F, H, W]. sigma in [0, 1] becomes Wan's timestep 1000 sigma. A condition is [B, L, text_dim], the text
encoder's output, zero behind the prompt's last token; with a first frame it is a mapping, see `image`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from codmd import hub
from codmd.atomic import creating_folder
from codmd.models.base import Condition, VideoDenoiser
from codmd.models.embeddings import EMBEDDING, read_embedding
from codmd.models.provenance import Provenance
from codmd.models.sharding import ShardPolicy
from codmd.models.tensor_files import Renamed

from .attention import set_attention, supports_backward
from .card import card
from .config import boundary_of, build_transformer, has_experts, latent_channels
from .context import split_tokens, token_splits
from .export import write_adapter_folder, write_diffusers_folder
from .image import first_frame
from .image_encoder import WanImageEncoder
from .options import RANDOM, ZEROS, WanOptions
from .pipeline import FROM_IMAGE, FROM_TEXT, open_base, write_parts
from .precision import compute_in_float32, float32_modules, store_in_bfloat16
from .tangents import tangent_attention
from .text import NEGATIVE_PROMPT, WanPromptEncoder
from .vae import FRAMES_PER_SECOND, WanVAE, WanVideoEncoder, strides
from .weights import open_wan

PREFIX = "transformer."
"""Of every weight's name in `state_dict`."""


class WanDenoiser(VideoDenoiser):
    """Velocity prediction by `WanTransformer3DModel`: float32 outside, `options.compute` inside.

    The constructor gives random weights; `codmd.models.build` and `load` read them.
    """

    loaded_by = "WanTransformer3DModel.from_pretrained"
    student_steps = "a student of Wan2.1 1.3B has 1,0.9,0.757,0.522 and one of 14B 1,0.937,0.833,0.624"
    negative_prompt = NEGATIVE_PROMPT
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, options: WanOptions) -> None:
        super().__init__()
        self.options = options
        self.network_config = options.network()
        self.transformer: Any = build_transformer(self.network_config)
        compute_in_float32(self.transformer)
        set_attention(self.transformer, options.attention)
        patch = self.transformer.config.patch_size
        self.latent_shape = (options.frames, latent_channels(self.transformer.config), options.height, options.width)
        self.first_frame = first_frame(self.transformer.config, options.from_image)
        self.from_image, self.known_frames = self.first_frame.given, self.first_frame.known_frames
        self.frames_per_second = FRAMES_PER_SECOND.get(self.latent_shape[1], self.frames_per_second)
        pipeline = FROM_IMAGE if self.from_image else FROM_TEXT
        self.pipeline_loaded_by, self.adapter_loaded_by = f"{pipeline}.from_pretrained", f"{pipeline}.load_lora_weights"
        for name, multiple in zip(("frames", "height", "width"), patch, strict=True):
            if getattr(options, name) % multiple:
                raise ValueError(f"{name}: got {getattr(options, name)}; expected a multiple of the patch, {multiple}")
        if options.storage == "bfloat16":
            store_in_bfloat16(self.transformer)
        if options.gradient_checkpointing:
            self.enable_gradient_checkpointing()
        if options.compile:
            self.transformer.compile_repeated_blocks(fullgraph=True)
        if options.expert and options.weights != RANDOM:
            self.boundary = boundary_of(options.weights)
        if options.expert == "low":
            self.adapter_loaded_by = f"{self.adapter_loaded_by} (load_into_transformer_2=True)"
        self._offloaded = False
        self._prompt_encoder: WanPromptEncoder | None = None
        self._image_encoder: WanImageEncoder | None = None
        self._vae: WanVAE | None = None
        self._null: Tensor | None = None

    @classmethod
    def from_options(cls, options: WanOptions) -> VideoDenoiser:
        """The registry's constructor, of a `WanExperts` for a pipeline of two; weights stay unread on the meta device.

        Raises:
            FileNotFoundError, ValueError: an option, the configuration or the weights cannot be used.
        """
        if options.weights != RANDOM and not options.expert and has_experts(options.weights):
            from .experts import WanExperts

            return WanExperts.from_options(options)
        if options.weights == RANDOM or torch.get_default_device().type == "meta":
            return cls(options)
        with torch.device("meta"):
            model = cls(options)
        model.load_weights(options.weights)
        return model

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> VideoDenoiser:
        """A model from a diffusers folder or a single file, with other options as given."""
        return cls.from_options(WanOptions(weights=str(path), **options))

    @classmethod
    def pipeline_options(cls, source: Path) -> dict[str, str]:
        """Text encoder, VAE and image encoder of a pipeline's folder or repository."""
        parts = hub.components(source)
        return {name: str(source) for name in ("text_encoder", "vae", "image_encoder") if name in parts}

    @classmethod
    def student_sigmas(cls, source: Path) -> tuple[float, ...]:
        """Of the pipeline that `codmd convert --pipeline` wrote, on this machine or the Hub."""
        from codmd.scheduler import FOLDER, read_sigmas

        return read_sigmas(hub.local(source, FOLDER))

    @classmethod
    def student_transition(cls, source: Path) -> Literal["renoise", "euler"]:
        """Of the same pipeline."""
        from codmd.scheduler import FOLDER, read_transition

        return read_transition(hub.local(source, FOLDER))

    @classmethod
    def prompt_encoder(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> WanPromptEncoder:
        """UMT5, as diffusers' pipelines keep it."""
        return WanPromptEncoder.load(folder, device, dtype)

    @classmethod
    def video_encoder(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> WanVideoEncoder:
        """The encoder of an `AutoencoderKLWan`, or of a pipeline's."""
        return WanVideoEncoder(folder, device, dtype)

    @property
    def device(self) -> torch.device:
        """Where latents, sigma and conditions belong."""
        return self.transformer.rope.freqs_cos.device

    def forward(self, x_t: Tensor, sigma: Tensor, cond: Condition = None) -> Tensor:
        """Velocity noise - x0, [B, F, C, H, W] float32.

        Args:
            x_t: [B, F, C, H, W], any float dtype; any size that the patches divide.
            sigma: [B], float32.
            cond: [B, L, text_dim], or a mapping of `image` where the network is given a first frame.
        """
        if x_t.dim() != 5 or x_t.shape[2] != self.latent_shape[1]:
            raise ValueError(f"x_t: shape {tuple(x_t.shape)}; expected (B, F, {self.latent_shape[1]}, H, W)")
        inputs = self.first_frame.inputs(x_t.float(), sigma.float(), cond)
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.options.compute == "bfloat16"):
            (velocity,) = self.transformer(*inputs, return_dict=False)
        return velocity.float().transpose(1, 2)

    def with_known_frames(self, latents: Tensor, cond: Condition) -> Tensor:
        """The first frame of Wan2.2-TI2V-5B where it is given."""
        return self.first_frame.with_known_frames(latents, cond)

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Condition:
        """UMT5 embeddings [B, 512, text_dim] on the model's device, zero behind each prompt's last token.

        Args:
            images: a file a prompt, for a network that is given a first frame: then a mapping of `image`.
        """
        text = self._text_encoder(prompts)
        if not images:
            return text
        if self._image_encoder is None:
            vae = self._load_vae() if self.options.vae else None
            self._image_encoder = WanImageEncoder.load(self.options, self.device, vae)
        return {EMBEDDING: text, **self._image_encoder(images)}

    @property
    def _text_encoder(self) -> WanPromptEncoder:
        if self._prompt_encoder is None:
            if not self.options.text_encoder:
                raise ValueError("text_encoder: not given; prompts as text need its folder (or use codmd encode)")
            self._prompt_encoder = WanPromptEncoder.load(self.options.text_encoder, self.device)
        return self._prompt_encoder

    @classmethod
    def image_encoder(cls, options: WanOptions, device: torch.device | str) -> WanImageEncoder:
        """The VAE and, for Wan2.1-I2V, CLIP."""
        return WanImageEncoder.load(options, device)

    def null_cond(self, batch: int) -> Tensor:
        """The embedding of the unconditional branch, [batch, L, text_dim], read or encoded once."""
        if self._null is None:
            if self.options.null_embedding == ZEROS:
                self._null = torch.zeros(1, 1, self.transformer.config.text_dim, device=self.device)
            elif self.options.null_embedding:
                self._null = read_embedding(self.options.null_embedding).to(self.device)
            else:
                self._null = self._text_encoder([self.options.negative_prompt])
        return self._null.expand(batch, -1, -1)

    @property
    def video_frames(self) -> int:
        """Frames that one sample decodes to."""
        time, _ = strides(self.options.vae, self.latent_shape[1])
        return time * (self.latent_shape[0] - 1) + 1

    def without_prompt(self, cond: Condition, batch: int) -> Condition:
        """The negative prompt beside the same first frame, as diffusers' pipelines guide."""
        null = self.null_cond(batch)
        return {**cond, EMBEDDING: null} if isinstance(cond, Mapping) else null

    def empty_cond(self, batch: int) -> Condition:
        """[batch, 512, text_dim] and, of a network that is given a first frame, that; its numbers undefined."""
        frames, _, height, width = self.latent_shape
        return self.first_frame.empty(batch, frames, height, width)

    @property
    def repeated_blocks(self) -> nn.ModuleList:
        """The transformer's blocks."""
        return self.transformer.blocks

    def load_decoder(self) -> Callable[[Tensor], Tensor]:
        """The VAE, read once; for whoever wants its errors early.

        Raises:
            FileNotFoundError, ValueError: there is none, or it cannot be read.
        """
        if not self.options.vae:
            raise ValueError("vae: not given; decoding needs the folder of an AutoencoderKLWan")
        return self._load_vae().decode

    def _load_vae(self) -> WanVAE:
        if self._vae is None:
            self._vae = WanVAE.load(self.options.vae, self.device)
        return self._vae

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that require a gradient.

        Raises:
            ValueError: weights stored in bfloat16 (small Adam steps round to nothing) or an attention backend
                without a backward pass.
        """
        if self.options.storage != "float32":
            raise ValueError("storage: bfloat16 weights cannot be trained; use storage float32")
        if not supports_backward(self.options.attention):
            raise ValueError(f"attention: {self.options.attention!r} has no backward pass; it cannot train a network")
        return super().trainable_parameters()

    def enable_gradient_checkpointing(self, function: Callable[..., Any] | None = None) -> None:
        """Recomputes every block in the backward pass; `function(block, *inputs)` replaces the way it is called."""
        self.transformer.enable_gradient_checkpointing(function)
        self.checkpointing = True

    def tangents(self) -> AbstractContextManager[None]:
        """Attention that carries tangents."""
        return tangent_attention(self.transformer)

    def shard_blocks(self, mesh: DeviceMesh, policy: ShardPolicy | None = None) -> None:
        """FSDP2 over every block, over the time embedding in float32, then over the rest; in place."""
        policy = policy or ShardPolicy()
        self._offloaded = policy.offload
        if self.options.compute == "float32":
            policy = replace(policy, param_dtype=None)
        for module in float32_modules(self.transformer):
            policy.shard(module, mesh, full_precision=True)
        for block in self.transformer.blocks:
            policy.shard(block, mesh)
        policy.shard(self.transformer, mesh)

    @property
    def token_splits(self) -> list[int]:
        """Divisors of both the heads and the tokens of a sample."""
        return token_splits(self.transformer.config, self.latent_shape)

    def split_tokens(self, mesh: DeviceMesh) -> None:
        """Ulysses over the dimension "ulysses" of `mesh`, in place."""
        split_tokens(self.transformer, self.latent_shape, mesh, self.first_frame.token_timesteps)

    def save_state(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """Writes a diffusers folder (config.json, safetensors) that `WanTransformer3DModel.from_pretrained` loads."""
        bare = Renamed(state, {name.removeprefix(PREFIX): name for name in state})
        write_diffusers_folder(path, self.network_config, bare, dtype, progress)

    def save_pipeline(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Tensor],
        base: str,
        provenance: Provenance,
        dtype: torch.dtype | None,
        progress: Callable[[int], Any],
    ) -> None:
        """Writes a folder that diffusers' pipeline samples in the student's steps, with its model card."""
        with creating_folder(path) as folder:
            self.write_parts(folder, base, provenance, progress)
            self.save_state(folder / "transformer", state, dtype, progress)

    def write_parts(
        self, folder: Path, base: str, provenance: Provenance, progress: Callable[[int], Any]
    ) -> dict[str, Any]:
        """Writes all of a pipeline but its networks into `folder`, the card among it; returns the index written.

        Raises:
            FileNotFoundError, ValueError: the base lacks something.
        """
        opened = open_base(base, self.from_image)
        frames, channels, height, width = self.latent_shape
        time, space = strides(opened.folder, channels)
        pixels = (time * (frames - 1) + 1, space * height, space * width)
        index, error = write_parts(
            folder, opened, provenance.recipe["sigmas"], provenance.recipe.get("transition", "renoise"), progress
        )
        (folder / "README.md").write_text(
            card(provenance, self.latent_shape, pixels, self.frames_per_second, error, self.from_image), "utf-8"
        )
        return index

    def save_adapter(
        self, path: str | os.PathLike[str], factors: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> None:
        """Writes a folder that `WanPipeline.load_lora_weights` takes; the names are diffusers' already."""
        write_adapter_folder(path, factors, dtype)

    @contextmanager
    def open_weights(self, path: str | os.PathLike[str]) -> Iterator[Mapping[str, Tensor]]:
        """The transformer's weights from any file that `codmd convert` reads, one tensor at a time."""
        with open_wan(path, self.network_config, self.options.entry, self.options.expert) as tensors:
            yield Renamed(tensors, {f"{PREFIX}{name}": name for name in tensors})

    def materialise(self, device: torch.device | str) -> None:
        """Memory on `device` (the host's for offloaded weights), and the rotary tables, which no weight file has."""
        self.transformer.to_empty(device="cpu" if self._offloaded else device)
        self._restore_rope(device)

    def free_encoders(self) -> None:
        """Gives back the memory of text encoder and image encoder; the next `encode` loads them again."""
        self._prompt_encoder = self._image_encoder = None

    def _restore_rope(self, device: torch.device | str) -> None:
        """Computes the rotary tables, which no weight file has; they live on the device even when weights do not."""
        config = self.transformer.config
        with torch.device("cpu"):
            rope = type(self.transformer.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
        for name, table in rope.named_buffers():
            setattr(self.transformer.rope, name, table.to(device))
