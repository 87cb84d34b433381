"""First frames as Wan's networks take them: the VAE's latents and, where the network takes one, CLIP's embedding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from codmd import hub
from codmd.models.images import read_image

from .config import latent_channels
from .image import IMAGE_EMBEDDING, IMAGE_LATENTS, IMAGE_PARTS, GivenFirstFrame, first_frame
from .vae import WanVAE, strides

if TYPE_CHECKING:
    from .options import WanOptions


class ClipEmbedding:
    """The last but one layer of a CLIP vision model, [B, tokens, image_dim], as Wan2.1-I2V takes it.

    Args:
        processor: scales and cuts images.
        encoder: a `CLIPVisionModel`.
    """

    def __init__(self, processor: Any, encoder: Any) -> None:
        self.processor, self.encoder = processor, encoder.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: torch.device | str) -> ClipEmbedding:
        """Reads the `image_encoder` and `image_processor` subfolders of a diffusers pipeline; float32.

        Raises:
            FileNotFoundError: a subfolder is missing.
            ValueError: a file cannot be read, or lacks weights.
        """
        from transformers.utils import logging

        found = hub.local(folder, *IMAGE_PARTS)
        for name in IMAGE_PARTS:
            if not (found / name).is_dir():
                raise FileNotFoundError(f"image_encoder: {found / name}: no such folder")
        verbosity = logging.get_verbosity()
        bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # a missing weight is an error below, not a warning
        logging.disable_progress_bar()
        try:
            from transformers import CLIPImageProcessor, CLIPVisionModel  # which would advise to install torchvision

            processor = CLIPImageProcessor.from_pretrained(found / IMAGE_PARTS[1], local_files_only=True)
            loaded: Any = CLIPVisionModel.from_pretrained(
                found / IMAGE_PARTS[0],
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"image_encoder: {found} cannot be read: {error}") from error
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        encoder, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"image_encoder: {found} lacks {len(missing)} weights ({', '.join(missing[:3])})")
        return cls(processor, encoder.to(device))

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Embeddings of PIL images."""
        pixels = self.processor(images=list(images), return_tensors="pt").to(self.encoder.device)
        return self.encoder(**pixels, output_hidden_states=True).hidden_states[-2]

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, image_dim) of one embedding."""
        config = self.encoder.config
        return (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size


class WanImageEncoder:
    """First frames of videos of one size.

    An image is scaled until it covers the frame and cut around its centre. (diffusers' pipeline stretches it; the same
    for an image of the video's proportions.) CLIP sees the whole image, as there.

    Args:
        vae: of the latents.
        clip: None for networks without an image embedding.
        pixels: (frames, height, width) of the video that is encoded: the image, followed by grey.

    Attributes:
        shapes: name to shape of what one image becomes.
    """

    def __init__(
        self,
        vae: WanVAE,
        clip: ClipEmbedding | None,
        pixels: tuple[int, int, int],
        latent_shape: tuple[int, int, int, int],
    ) -> None:
        self.vae, self.clip, self.pixels = vae, clip, pixels
        self.shapes: dict[str, tuple[int, ...]] = {IMAGE_LATENTS: latent_shape}
        if clip is not None:
            self.shapes[IMAGE_EMBEDDING] = clip.shape

    @classmethod
    def load(cls, options: WanOptions, device: torch.device | str, vae: WanVAE | None = None) -> WanImageEncoder:
        """What the options' network takes, at their size.

        Args:
            vae: the options' own, if it has been read.

        Raises:
            FileNotFoundError, ValueError: the network takes no first frame, or a part is not given or cannot be read.
        """
        config = options.network()
        way = first_frame(config, options.from_image)
        if not isinstance(way, GivenFirstFrame):
            raise ValueError("from_image: false; this network starts no video from an image")
        if vae is None:
            if not options.vae:
                raise ValueError("vae: not given; a first frame needs the folder of an AutoencoderKLWan")
            vae = WanVAE.load(options.vae, device)
        clip = None
        if config.get("image_dim"):
            if not options.image_encoder:
                raise ValueError("image_encoder: not given; this network takes a CLIP embedding of the image")
            clip = ClipEmbedding.load(options.image_encoder, device)
            if clip.shape[1] != config["image_dim"]:
                raise ValueError(
                    f"image_encoder: {options.image_encoder} has embeddings of {clip.shape[1]} numbers; the network "
                    f"takes {config['image_dim']}"
                )
        channels, frames = latent_channels(config), way.latent_frames(options.frames)
        time, space = strides(options.vae, channels)
        pixels = time * (frames - 1) + 1, space * options.height, space * options.width
        return cls(vae, clip, pixels, (frames, channels, options.height, options.width))

    @torch.no_grad()
    def __call__(self, images: Sequence[Path]) -> dict[str, Tensor]:
        """`IMAGE_LATENTS` [B, F, C, H, W] and, with CLIP, `IMAGE_EMBEDDING`, of image files; float32.

        Raises:
            FileNotFoundError, ValueError: a file cannot be read as an image; names it.
        """
        opened = [read_image(path) for path in images]
        found = {IMAGE_LATENTS: torch.cat([self._latents(image) for image in opened])}
        if self.clip is not None:
            found[IMAGE_EMBEDDING] = self.clip(opened)
        return found

    def _latents(self, image: Any) -> Tensor:
        from diffusers.video_processor import VideoProcessor

        frames, height, width = self.pixels
        first = VideoProcessor().preprocess(image, height, width, resize_mode="crop")
        video = torch.zeros(1, frames, 3, height, width)
        video[:, 0] = first
        return self.vae.encode_centred(video)
