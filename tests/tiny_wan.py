"""A whole Wan pipeline with tiny random weights, written as diffusers writes one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

PROMPTS = ["a red fox runs over snow", "two boats on a quiet lake", "a city at night"]
TEXT_DIM = 32
LATENT = {"frames": 3, "height": 4, "width": 6}
PIXELS = (9, 3, 32, 48)
"""Frames, channels, height and width that the tiny VAE decodes `LATENT` to."""


def write_text_encoder(folder: Path, seed: int = 0) -> None:
    """`text_encoder` (UMT5) and `tokenizer` (a word for every word of `PROMPTS`) inside `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = ["<pad>", "</s>", "<unk>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=len(words), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")


def write_vae(folder: Path, seed: int = 0) -> None:
    """`vae` inside `folder`: 4x in time, 8x in space, 16 channels, as Wan2.1's."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")


def write_transformer(folder: Path, seed: int = 0) -> None:
    """`transformer` inside `folder`, of the shipped tiny configuration."""
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


def write_pipeline(folder: Path) -> Path:
    """All of them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_transformer(folder)
    write_text_encoder(folder)
    write_vae(folder)
    return folder
