"""A whole Wan pipeline with tiny random weights, that of examples/wan_tiny.py, written in parts as tests need them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from examples.wan_tiny import PROMPTS, TEXT_DIM, text_encoder, vae

__all__ = [
    "IMAGE_DIM",
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
IMAGE_DIM = 24
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

    folder.mkdir(parents=True, exist_ok=True)
    network = write_ti2v_config(folder.parent)
    torch.manual_seed(0)
    models.build("wan", weights="random", config=network, **LATENT).save(folder / "transformer")
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


def write_ti2v_config(folder: Path) -> str:
    """A tiny network's configuration in that folder."""
    from codmd.models.wan.config import read_config

    path = folder / "ti2v.json"
    channels = {"in_channels": 48, "out_channels": 48}
    path.write_text(json.dumps({"_class_name": "WanTransformer3DModel", **read_config("tiny"), **channels}))
    return str(path)


def write_i2v_pipeline(folder: Path, clip: bool = True) -> Path:
    """As Wan2.1-I2V's, or without CLIP as one expert of Wan2.2-I2V-A14B: 36 input channels."""
    from codmd import models

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    models.build("wan", weights="random", config=write_i2v_config(folder.parent, clip), **LATENT).save(
        folder / "transformer"
    )
    write_text_encoder(folder)
    write_vae(folder)
    if clip:
        write_image_encoder(folder)
    return folder


def write_i2v_config(folder: Path, clip: bool) -> str:
    """A tiny network's configuration in that folder."""
    from codmd.models.wan.config import read_config

    path = folder / f"i2v_{clip}.json"
    image = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 48} if clip else {}
    network = {**read_config("tiny"), "in_channels": 36, **image}
    path.write_text(json.dumps({"_class_name": "WanTransformer3DModel", **network}))
    return str(path)


def write_index(folder: Path) -> None:
    """`model_index.json` and `scheduler` of a folder of `write_i2v_pipeline` or `write_ti2v_pipeline`."""
    from diffusers import UniPCMultistepScheduler

    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").save_pretrained(
        folder / "scheduler"
    )
    clip = (folder / "image_encoder").is_dir()
    parts = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "image_encoder": ["transformers", "CLIPVisionModel"] if clip else [None, None],
        "image_processor": ["transformers", "CLIPImageProcessor"] if clip else [None, None],
    }
    kind = "WanImageToVideoPipeline" if clip else "WanPipeline"
    index = {"_class_name": kind, "_diffusers_version": "0.42.1", "expand_timesteps": not clip, **parts}
    (folder / "model_index.json").write_text(json.dumps(index))


def write_image_encoder(folder: Path) -> None:
    """`image_encoder` and `image_processor` inside `folder`: 4 x 4 patches and a class token."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder / "image_processor")


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (96, 64)) -> Path:
    """A picture of smooth colours, (width, height)."""
    from PIL import Image

    coarse = torch.randint(0, 256, (2, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_pipeline(folder: Path) -> Path:
    """All of them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_transformer(folder)
    write_text_encoder(folder)
    write_vae(folder)
    return folder
