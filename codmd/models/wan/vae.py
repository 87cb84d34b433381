"""Pixels from Wan's normalised latents and latents from pixels, through diffusers' `AutoencoderKLWan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from codmd import hub
from codmd.files import read_json
from codmd.models.fingerprint import fingerprint

STRIDES = {16: (4, 8), 48: (4, 16)}
"""Latent channels of the published VAEs, Wan2.1's and that of Wan2.2-TI2V-5B, to frames and pixels per latent cell."""
FRAMES_PER_SECOND = {16: 16, 48: 24}
"""The same channels to the videos that their models were trained on (Wan2.2's published configurations)."""


def strides(folder: str | os.PathLike[str], channels: int) -> tuple[int, int]:
    """(frames, pixels in height and width) per latent cell.

    Args:
        folder: of the VAE, as `WanVAE.load` takes it; "" for the published one with that many channels.
        channels: of the network's latents.

    Raises:
        FileNotFoundError, ValueError: there is no such VAE, or it is of other latents.
    """
    if not folder:
        if channels not in STRIDES:
            raise ValueError(f"vae: not given, and no published one has latents of {channels} channels")
        return STRIDES[channels]
    path = vae_folder(folder) / "config.json"
    config = read_json(path)
    found = config.get("z_dim", 16) if isinstance(config, dict) else None
    if found != channels:
        raise ValueError(f"vae: {path} has latents of {found} channels; the network has {channels}")
    return config.get("scale_factor_temporal") or 4, config.get("scale_factor_spatial") or 8


def vae_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder with the VAE's config.json: `folder` itself, or its `vae` subfolder.

    Raises:
        FileNotFoundError: there is none.
    """
    found = hub.local(folder, "vae")
    path = found / "vae" if (found / "vae").is_dir() else found
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"vae: {path / 'config.json'}: no such file; expected an AutoencoderKLWan's folder")
    return path


class WanVAE:
    """`AutoencoderKLWan` of z = latents * std + mean, per channel.

    Args:
        vae: with `latents_mean` and `latents_std` in its configuration.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean).view(shape)
        self.std = torch.tensor(vae.config.latents_std).view(shape)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> WanVAE:
        """Reads a folder with the VAE's config.json, or a pipeline's folder with `vae` in it.

        Raises:
            FileNotFoundError: there is no VAE.
            ValueError: its files cannot be read, or lack weights.
        """
        from diffusers import AutoencoderKLWan
        from diffusers.utils import logging

        path = vae_folder(folder)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # a missing weight is an error below, not a warning
        try:
            vae, info = AutoencoderKLWan.from_pretrained(
                path, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"vae: {path} cannot be read: {error}") from error
        finally:
            logging.set_verbosity(verbosity)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"vae: {path} lacks {len(missing)} weights ({', '.join(missing[:3])})")
        return cls(vae.to(device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, T, 3, height, width], float32 in [0, 1]; T = 4 (F - 1) + 1."""
        channels = self.mean.shape[1]
        if latents.dim() != 5 or latents.shape[2] != channels:
            raise ValueError(f"latents: shape {tuple(latents.shape)}; expected (B, F, {channels}, H, W)")
        device = next(self.vae.parameters()).device
        z = latents.to(device, torch.float32).transpose(1, 2)
        z = z * self.std.to(device) + self.mean.to(device)
        pixels = self.vae.decode(z, return_dict=False)[0]
        return (pixels.clamp(-1, 1) * 0.5 + 0.5).transpose(1, 2)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] of pixels [B, T, 3, height, width] in [0, 1]: the mode, float32."""
        return self.encode_centred(2 * pixels - 1)

    @torch.no_grad()
    def encode_centred(self, pixels: Tensor) -> Tensor:
        """The same of pixels in [-1, 1]."""
        weight = next(self.vae.parameters())
        z = self.vae.encode(pixels.to(weight.device, weight.dtype).transpose(1, 2), return_dict=False)[0].mode().float()
        return ((z - self.mean.to(weight.device)) / self.std.to(weight.device)).transpose(1, 2)


class WanVideoEncoder:
    """The `VideoEncoder` of a Wan VAE's folder; see there."""

    def __init__(self, folder: Path, device: torch.device | str, dtype: torch.dtype) -> None:
        self._vae = WanVAE.load(folder, device, dtype)
        self._channels = self._vae.mean.shape[1]
        self._strides = strides(folder, self._channels)
        self.frames_per_second = FRAMES_PER_SECOND.get(self._channels, 16)
        self.dtype = dtype
        self.fingerprint = fingerprint(self._vae.vae.state_dict())

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, H, W) of the latents of a video.

        Raises:
            ValueError: naming a number that the VAE has no cells for.
        """
        time, space = self._strides
        if (frames - 1) % time:
            raise ValueError(f"frames: got {frames}; expected a multiple of {time}, plus 1")
        for name, pixels in (("height", height), ("width", width)):
            if pixels % space:
                raise ValueError(f"{name}: got {pixels}; expected a multiple of {space}")
        return (frames - 1) // time + 1, self._channels, height // space, width // space

    def __call__(self, pixels: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] in `dtype`."""
        return self._vae.encode(pixels).to(self.dtype)
