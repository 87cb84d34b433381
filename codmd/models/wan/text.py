"""Prompt embeddings as Wan takes them: UMT5's output, zero behind the prompt's last token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from codmd import hub
from codmd.models.embeddings import warn_of_cuts

TOKENS = 512
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""What Wan2.1 steers away from: its published negative prompt."""


class WanPromptEncoder:
    """UMT5 on one device.

    Args:
        tokenizer: of the encoder.
        encoder: a `UMT5EncoderModel`.
        tokens: length of every embedding.

    Attributes:
        width, dtype: of every token's embedding.
    """

    def __init__(self, tokenizer: Any, encoder: Any, tokens: int = TOKENS) -> None:
        self.tokenizer, self.encoder, self.tokens = tokenizer, encoder.eval().requires_grad_(False), tokens
        self.width, self.dtype = int(encoder.config.d_model), encoder.dtype

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: torch.device | str, dtype: torch.dtype = torch.bfloat16
    ) -> WanPromptEncoder:
        """Reads the `text_encoder` and `tokenizer` subfolders of a diffusers pipeline.

        Raises:
            FileNotFoundError: a subfolder is missing.
            ValueError: a file cannot be read, or lacks weights.
        """
        from transformers import AutoTokenizer, UMT5EncoderModel
        from transformers.utils import logging

        folder = hub.local(folder, "text_encoder", "tokenizer")
        for name in ("text_encoder", "tokenizer"):
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"text_encoder: {folder / name}: no such folder")
        verbosity = logging.get_verbosity()
        bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # a missing weight is an error below, not a warning
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, trust_remote_code=False
            )
            loaded: Any = UMT5EncoderModel.from_pretrained(
                folder / "text_encoder",
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"text_encoder: {folder} cannot be read: {error}") from error
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        encoder, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"text_encoder: {folder} lacks {len(missing)} weights ({', '.join(missing[:3])})")
        return cls(tokenizer, encoder.to(device))

    def length(self, prompt: str) -> int:
        """Tokens of a prompt, its end included."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return len(self.tokenizer(prompt_clean(prompt), add_special_tokens=True).input_ids)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, tokens, text_dim] in the encoder's dtype; longer prompts are cut, with a warning."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        if not prompts:
            raise ValueError("prompts: got none")
        warn_of_cuts(self, prompts)
        device = next(self.encoder.parameters()).device
        tokens = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(device)
        hidden = self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return torch.where(tokens.attention_mask[..., None] > 0, hidden, 0)
