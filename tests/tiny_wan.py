"""A whole Wan pipeline with tiny random weights, that of examples/wan_tiny.py, written in parts as tests need them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from examples.wan_tiny import PROMPTS, TEXT_DIM, text_encoder, vae

__all__ = [
    "LATENT",
    "PIXELS",
    "PROMPTS",
    "TEXT_DIM",
    "write_pipeline",
    "write_text_encoder",
    "write_transformer",
    "write_vae",
]
LATENT = {"frames": 3, "height": 4, "width": 6}
PIXELS = (9, 3, 32, 48)
"""Frames, channels, height and width that the tiny VAE decodes `LATENT` to."""


def write_text_encoder(folder: Path, seed: int = 0) -> None:
    """`text_encoder` and `tokenizer` inside `folder`."""
    for name, part in zip(("text_encoder", "tokenizer"), text_encoder(seed), strict=True):
        part.save_pretrained(folder / name)


def write_vae(folder: Path, seed: int = 0) -> None:
    """`vae` inside `folder`."""
    vae(seed).save_pretrained(folder / "vae")


def write_transformer(folder: Path, seed: int = 0) -> None:
    """`transformer` inside `folder`, as codmd writes it."""
    from codmd import models

    torch.manual_seed(seed)
    models.build("wan", weights="random", config="tiny", **LATENT).save(folder / "transformer")


def write_ti2v_pipeline(folder: Path) -> Path:
    """As Wan2.2-TI2V-5B's: 48 latent channels, 16 pixels a cell."""
    from diffusers import AutoencoderKLWan

    from codmd import models
    from codmd.models.wan.config import read_config

    folder.mkdir(parents=True, exist_ok=True)
    network = folder.parent / "ti2v.json"
    channels = {"in_channels": 48, "out_channels": 48}
    network.write_text(json.dumps({"_class_name": "WanTransformer3DModel", **read_config("tiny"), **channels}))
    torch.manual_seed(0)
    models.build("wan", weights="random", config=str(network), **LATENT).save(folder / "transformer")
    write_text_encoder(folder)
    AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, in_channels=12,
        out_channels=12, is_residual=True, patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    ).save_pretrained(folder / "vae")  # fmt: skip
    return folder


def write_a14b_pipeline(folder: Path) -> Path:
    """As Wan2.2-T2V-A14B's: two experts, here of 39 thousand parameters, and their boundary."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    from examples.wan_tiny import transformer

    encoder, tokenizer = text_encoder()
    experts = {"transformer": transformer(0), "transformer_2": transformer(1)}
    scheduler = FlowMatchEulerDiscreteScheduler()
    WanPipeline(tokenizer, encoder, vae(), scheduler, boundary_ratio=0.875, **experts).save_pretrained(folder)
    return folder


def write_pipeline(folder: Path) -> Path:
    """All of them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_transformer(folder)
    write_text_encoder(folder)
    write_vae(folder)
    return folder
