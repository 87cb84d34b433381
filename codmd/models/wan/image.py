"""How a Wan network is given the first frame of its video, as diffusers' `WanImageToVideoPipeline` gives it.

- not at all: text to video.
- *beside* the noisy latents (Wan2.1-I2V, Wan2.2-I2V-A14B): 4 channels that mark the given frame and the latents of the
  image followed by grey frames; Wan2.1-I2V also takes the image's CLIP embedding. All frames are generated.
- *in place* of the first latent frame (Wan2.2-TI2V-5B), whose tokens have the timestep 0: that frame is known.

A condition with a first frame is a mapping of `EMBEDDING` (the prompt's), `IMAGE_LATENTS` and, where the network takes
one, `IMAGE_EMBEDDING`; without one it is the prompt's embedding alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codmd.models.base import Condition
from codmd.models.embeddings import EMBEDDING

from .config import latent_channels
from .text import TOKENS

TIMESTEPS = 1000.0
IMAGE_LATENTS = "image_latents"
"""[B, F, C, H, W], normalised: of the image alone (in place, F = 1) or followed by grey frames (beside)."""
IMAGE_EMBEDDING = "image_embedding"
"""[B, 257, image_dim] of CLIP."""
IMAGE_TOKENS = 257
IMAGE_PARTS = ("image_encoder", "image_processor")
"""Subfolders of a diffusers pipeline that make it."""
IN_PLACE_CHANNELS = (48,)
"""Latent channels of the networks that were trained with a first frame in place: Wan2.2-TI2V-5B's."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""hidden_states [B, C, F, H, W], timestep, encoder_hidden_states, encoder_hidden_states_image of the transformer."""


@dataclass(frozen=True)
class FirstFrame(ABC):
    """One way of giving the first frame.

    Attributes:
        config: arguments of `WanTransformer3DModel`.
    """

    config: Mapping[str, Any]

    given = False
    """Whether there is one."""

    token_timesteps = False
    """Whether every token has a timestep of its own."""

    known_frames = 0
    """Latent frames at the start of every sample that are given, not generated."""

    @abstractmethod
    def inputs(self, x_t: Tensor, sigma: Tensor, cond: Condition) -> Inputs:
        """What the transformer takes for x_t [B, F, C, H, W] and sigma [B], both float32.

        Raises:
            ValueError: the condition is not of this network.
        """

    def with_known_frames(self, latents: Tensor, cond: Condition) -> Tensor:
        """Latents [B, F, C, H, W] with the given frames in their place."""
        return latents

    @abstractmethod
    def empty(self, batch: int, frames: int, height: int, width: int) -> Condition:
        """A condition of the largest size for latents of that size, its numbers undefined."""

    def _text(self, text: Any, batch: int) -> Tensor:
        dim = self.config["text_dim"]
        if text is None:
            raise ValueError("cond: got None; expected embeddings from encode() or null_cond()")
        if text.dim() != 3 or len(text) != batch or text.shape[2] != dim:
            raise ValueError(f"cond: shape {tuple(text.shape)}; expected ({batch}, L, {dim})")
        # float32 text keeps diffusers' time embedding, which takes its dtype from it, in float32.
        return text.float()


class NoFirstFrame(FirstFrame):
    """Text to video."""

    def inputs(self, x_t: Tensor, sigma: Tensor, cond: Condition) -> Inputs:
        if isinstance(cond, Mapping):
            raise ValueError(
                "cond: holds a first frame, which this network is not given; a network that can start from one is told "
                "so by from_image"
            )
        return x_t.transpose(1, 2), sigma * TIMESTEPS, self._text(cond, len(x_t)), None

    def empty(self, batch: int, frames: int, height: int, width: int) -> Condition:
        return torch.empty(batch, TOKENS, self.config["text_dim"])


class GivenFirstFrame(FirstFrame):
    """What both ways of giving it have in common."""

    given = True

    @abstractmethod
    def latent_frames(self, frames: int) -> int:
        """Frames of `IMAGE_LATENTS` for a sample of that many."""

    def _parts(self, x_t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
        """(text, image latents [B, F', C, H, W], image embedding), checked."""
        dim = self.config.get("image_dim")
        names = [EMBEDDING, IMAGE_LATENTS, *([IMAGE_EMBEDDING] if dim else [])]
        if not isinstance(cond, Mapping) or sorted(cond) != sorted(names):
            found = ", ".join(sorted(cond)) if isinstance(cond, Mapping) else "a prompt alone"
            raise ValueError(
                f"cond: got {found}; this network starts every video from an image: expected {', '.join(names)}"
            )
        batch, frames, *size = x_t.shape
        expected = (batch, self.latent_frames(frames), *size)
        latents, image = cond[IMAGE_LATENTS], cond.get(IMAGE_EMBEDDING)
        if latents.shape != expected:
            raise ValueError(f"cond: {IMAGE_LATENTS} of shape {tuple(latents.shape)}; expected {expected}")
        if image is not None and (image.dim() != 3 or len(image) != batch or image.shape[2] != dim):
            raise ValueError(f"cond: {IMAGE_EMBEDDING} of shape {tuple(image.shape)}; expected ({batch}, N, {dim})")
        return self._text(cond[EMBEDDING], batch), latents.float(), None if image is None else image.float()

    def empty(self, batch: int, frames: int, height: int, width: int) -> Condition:
        size = (batch, self.latent_frames(frames), latent_channels(self.config), height, width)
        cond = {EMBEDDING: torch.empty(batch, TOKENS, self.config["text_dim"]), IMAGE_LATENTS: torch.empty(size)}
        if dim := self.config.get("image_dim"):
            cond[IMAGE_EMBEDDING] = torch.empty(batch, IMAGE_TOKENS, dim)
        return cond


class Beside(GivenFirstFrame):
    """Channels beside the noisy latents: [x_t, mask, image latents]."""

    def latent_frames(self, frames: int) -> int:
        return frames

    def inputs(self, x_t: Tensor, sigma: Tensor, cond: Condition) -> Inputs:
        text, latents, image = self._parts(x_t, cond)
        batch, frames, channels, height, width = x_t.shape
        marks = x_t.new_zeros(batch, frames, self.config["in_channels"] - 2 * channels, height, width)
        marks[:, 0] = 1
        if image is not None:  # diffusers tells image tokens from text by counting 512 from the end
            text = F.pad(text, (0, 0, 0, TOKENS - text.shape[1]))
        hidden = torch.cat((x_t, marks, latents), dim=2)
        return hidden.transpose(1, 2), sigma * TIMESTEPS, text, image


class InPlace(GivenFirstFrame):
    """The clean first latent frame where x_t has a noisy one; a timestep a token, 0 for those of that frame."""

    token_timesteps = True
    known_frames = 1

    def latent_frames(self, frames: int) -> int:
        return self.known_frames

    def inputs(self, x_t: Tensor, sigma: Tensor, cond: Condition) -> Inputs:
        text, latents, image = self._parts(x_t, cond)
        hidden = torch.cat((latents, x_t[:, self.known_frames :]), dim=1)
        frame, *cell = self.config["patch_size"]
        tokens = math.prod(size // patch for size, patch in zip(x_t.shape[3:], cell, strict=True))
        timestep = (sigma * TIMESTEPS)[:, None].repeat(1, x_t.shape[1] // frame * tokens)
        timestep[:, :tokens] = 0
        return hidden.transpose(1, 2), timestep, text, image

    def with_known_frames(self, latents: Tensor, cond: Condition) -> Tensor:
        return torch.cat((cond[IMAGE_LATENTS].to(latents), latents[:, self.known_frames :]), dim=1)


def first_frame(config: Mapping[str, Any], from_image: bool) -> FirstFrame:
    """How the network of `config` is given a first frame.

    Args:
        from_image: asks for one; a network with channels for it always takes one.

    Raises:
        ValueError: it takes none.
    """
    channels, latents = config["in_channels"], latent_channels(config)
    if channels > 2 * latents:
        return Beside(config)
    if not from_image:
        return NoFirstFrame(config)
    if channels not in IN_PLACE_CHANNELS or channels != latents:
        raise ValueError(
            f"from_image: a network of {channels} input channels takes no first frame; expected Wan2.1-I2V, "
            "Wan2.2-I2V or Wan2.2-TI2V-5B"
        )
    return InPlace(config)
