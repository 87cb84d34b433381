"""Options of the registry's "wan", checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from codmd import hub
from codmd.models.embeddings import read_embedding
from codmd.models.fingerprint import fingerprint
from codmd.models.options import ModelOptions
from codmd.models.tensor_files import INDEX_SUFFIX, folder_fingerprint

from .config import SHIPPED, has_experts, latent_channels, read_config
from .image import IMAGE_PARTS, first_frame
from .text import NEGATIVE_PROMPT
from .vae import strides, vae_folder
from .weights import fitting_config

RANDOM = "random"
ZEROS = "zeros"


@dataclass(frozen=True)
class WanOptions(ModelOptions):
    """Options of the registry's "wan".

    Attributes:
        weights: a diffusers folder or repository (owner/name, owner/name@revision), a single file (.safetensors,
            .pt), or "random".
        entry: of a file that holds several networks, the one to read; "" takes the generator.
        expert: of a pipeline that has two, "high" or "low"; "" takes both. `distill.expert` sets it for training.
        config: "1.3b", "14b", "i2v_14b", "ti2v_5b", "tiny", or a JSON file; "" takes the diffusers folder's own, or
            for a single file the shipped configuration that it fits.
        frames, height, width: of the latents; 21 x 60 x 104 is 81 frames of 480 x 832.
        compute: dtype of the matrix products and of attention.
        storage: dtype of the weights; "bfloat16" is for networks that are not trained.
        attention: backend by diffusers' name: native, flash, _flash_3, sage, ...
        gradient_checkpointing: recompute every block's activations in the backward pass.
        compile: compile the repeated block, once for all of them.
        text_encoder: folder or repository with `text_encoder` and `tokenizer`, for prompts given as text.
        null_embedding: the folder that `codmd encode` wrote (or a file with one embedding), or "zeros"; ""
            encodes `negative_prompt`.
        negative_prompt: the text of the unconditional branch.
        vae: folder or repository of an AutoencoderKLWan, or of a pipeline that has one, for decoding and first frames.
        image_encoder: folder or repository with `image_encoder` and `image_processor`, for first frames of Wan2.1-I2V.
        from_image: start every video from an image: Wan2.2-TI2V-5B, which can do without. Wan2.1-I2V and Wan2.2-I2V
            always do.
    """

    default_video = MappingProxyType({"frames": 81, "height": 480, "width": 832})

    weights: str = ""
    entry: str = ""
    expert: Literal["", "high", "low"] = ""
    config: str = ""
    frames: int = 21
    height: int = 60
    width: int = 104
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    storage: Literal["float32", "bfloat16"] = "float32"
    attention: str = "native"
    gradient_checkpointing: bool = False
    compile: bool = False
    text_encoder: str = ""
    null_embedding: str = ""
    negative_prompt: str = NEGATIVE_PROMPT
    vae: str = ""
    image_encoder: str = ""
    from_image: bool = False

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError('weights: not given; expected a diffusers folder, a weight file, or "random"')
        if self.weights == RANDOM and not self.config:
            raise ValueError(f"config: not given; random weights need one of {', '.join(SHIPPED)}, or a JSON file")
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a positive number of latent cells")
        for name in ("compute", "storage"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected 'float32' or 'bfloat16'")
        if self.storage == "bfloat16" and self.compute == "float32":
            raise ValueError("storage: bfloat16 weights cannot compute in float32; set compute or storage")

    def network(self) -> dict[str, Any]:
        """Arguments of `WanTransformer3DModel`, from `config` or found out from `weights`."""
        if self.config:
            return read_config(self.config)
        if expert := self.expert or ("high" if has_experts(self.weights) else ""):
            return read_config(self.weights, expert)
        path = hub.local(self.weights, "transformer")
        beside = path.parent if path.name.endswith(INDEX_SUFFIX) else path
        if path.is_dir() or (beside / "config.json").is_file():
            return read_config(beside)
        return fitting_config(path, self.entry)

    def for_inference(self) -> WanOptions:
        """Without recomputation, the weights stored in the dtype of the products."""
        return replace(self, gradient_checkpointing=False, storage=self.compute)

    def for_video(self, frames: int | None, height: int | None, width: int | None) -> WanOptions:
        """The latents that the VAE decodes to that many frames and pixels; None keeps a size.

        Raises:
            ValueError: a number that no latents decode to.
        """
        if (frames, height, width) == (None, None, None):
            return self
        network = self.network()
        time, space = strides(self.vae, latent_channels(network))
        sizes: dict[str, Any] = {}
        if frames is not None:
            if (frames - 1) % time:
                raise ValueError(f"frames: got {frames}; expected a multiple of {time}, plus 1")
            sizes["frames"] = (frames - 1) // time + 1
        for name, pixels, patch in zip(("height", "width"), (height, width), network["patch_size"][1:], strict=True):
            if pixels is not None:
                if pixels % (patch * space):
                    raise ValueError(f"{name}: got {pixels}; expected a multiple of {patch * space}")
                sizes[name] = pixels // space
        return replace(self, **sizes)

    def content(self, prompts: bool, guided: bool, pixels: bool) -> dict[str, tuple[str, str]]:
        """The embedding of the unconditional branch, text encoder, VAE and image encoder."""
        found = {}
        if guided and self.null_embedding not in ("", ZEROS):
            embedding = read_embedding(self.null_embedding)
            found["null_embedding"] = (self.null_embedding, fingerprint({"": embedding}))
        if self.text_encoder and (prompts or (guided and not self.null_embedding)):
            folder = hub.local(self.text_encoder, "text_encoder", "tokenizer") / "text_encoder"
            found["text_encoder"] = (self.text_encoder, folder_fingerprint(folder))
        images = prompts and first_frame(self.network(), self.from_image).given
        if self.vae and (pixels or images):
            found["vae"] = (self.vae, folder_fingerprint(vae_folder(self.vae)))
        if self.image_encoder and images:
            folder = hub.local(self.image_encoder, *IMAGE_PARTS) / IMAGE_PARTS[0]
            found["image_encoder"] = (self.image_encoder, folder_fingerprint(folder))
        return found

    def record(self, guided: bool) -> dict[str, Any]:
        """The dtype of the products, and the negative prompt of a guided sample."""
        return {"compute": self.compute, "negative_prompt": self.negative_prompt if guided else None}
