"""A whole Wan2.1 pipeline in miniature: every command of a real distillation runs on it, in seconds on a CPU.

`python examples/wan_tiny.py wan-tiny` writes a diffusers folder of transformer, VAE, text encoder, tokenizer and
scheduler with random weights, and `prompts.txt`. Its videos are noise; what it teaches is the commands.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

PROMPTS = ["a red fox runs over snow", "two boats on a quiet lake", "a city at night"]
TEXT_DIM = 32


def text_encoder(seed: int = 0) -> tuple[Any, Any]:
    """UMT5, and a tokenizer with a word for every word of `PROMPTS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = ["<pad>", "</s>", "<unk>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=len(words), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def vae(seed: int = 0) -> Any:
    """4x in time, 8x in space, 16 channels, as Wan2.1's."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    return AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def transformer(seed: int = 0) -> Any:
    """Of the configuration that codmd ships as "tiny"."""
    from codmd import models

    torch.manual_seed(seed)
    return models.build("wan", weights="random", config="tiny").transformer


def pipeline() -> Any:
    """All of them."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    encoder, tokenizer = text_encoder()
    return WanPipeline(tokenizer, encoder, vae(), scheduler, transformer())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/wan_tiny.py FOLDER")
    folder = Path(sys.argv[1])
    pipeline().save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
