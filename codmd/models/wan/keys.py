"""Names of Wan's weights: wrapper prefixes, and the original naming against diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIXES = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "module.",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "net.",
    "transformer.",
)
"""What training wrappers and other tools put into names: the first three anywhere, the others in front."""

ANYWHERE = PREFIXES[:3]

# Original name to diffusers name; a cross-attention norm is norm3 in one and norm2 in the other.
ORIGINAL = [
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"^(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"^(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"^(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"^(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"^(blocks\.\d+)\.self_attn\.(norm_[qk])\.", r"\1.attn1.\2."),
    (r"^(blocks\.\d+)\.cross_attn\.(norm_[qk])\.", r"\1.attn2.\2."),
    (r"^(blocks\.\d+)\.cross_attn\.([kv])_img\.", r"\1.attn2.add_\2_proj."),
    (r"^(blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.attn2.norm_added_k."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
]


def strip_prefixes(name: str) -> str:
    """The name as the bare transformer has it."""
    for inner in ANYWHERE:
        name = name.replace(inner, "")
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """Diffusers name to the name found, for stripped or wrapped names in either naming.

    Raises:
        ValueError: two names become one.
    """
    stripped = {name: strip_prefixes(name) for name in names}
    original = any(".self_attn." in name for name in stripped.values())
    found: dict[str, str] = {}
    for name, bare in stripped.items():
        target = _from_original(bare) if original else bare
        if target in found:
            raise ValueError(f"{found[target]!r} and {name!r} are the same weight, {target!r}")
        found[target] = name
    return found


def _from_original(name: str) -> str:
    for pattern, replacement in ORIGINAL:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    return name


LORAS = (
    ("kohya's names", r"^lora_(unet|te\d*|transformer)_|\.lora_(down|up)\.weight$"),
    ("PEFT's names", r"^base_model\.model\..*\.lora_[AB]\."),
    ("diffusers' names", r"\.lora(_[AB]\.|\.down\.|\.up\.)"),
    ("LyCORIS", r"\.(lokr_w[12]|hada_w[12]_[ab])"),
)
"""Whose low-rank adapters have such names."""

SCALES = re.compile(r"(^|\.)(scale_weight|weight_scale(_inv)?|scale_input|input_scale|scaled_fp8)$")
"""Names of the factors that belong to scaled 8-bit weights."""


def refuse_parts(names: Iterable[str]) -> None:
    """Refuses what is no whole network, or would lose its scales.

    Raises:
        ValueError: saying what it is.
    """
    names = list(names)
    for kind, pattern in LORAS:
        if any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"is a LoRA ({kind}), not a network; merge it into its base first: in diffusers load_lora_weights, "
                "fuse_lora, unload_lora_weights, save_pretrained"
            )
    if scale := next(filter(SCALES.search, names), None):
        raise ValueError(f"holds scaled 8-bit weights (as {scale!r} shows); expected bfloat16, float16 or float32")
